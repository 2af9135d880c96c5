"""OpenVINO against ONNX Runtime, and both against PyTorch eager, on the CPU.

    python -m benchmarks openvino speed
    python -m benchmarks openvino accuracy --name bccd --files student.onnx student.int8.onnx student.bf16.onnx \
        --val val.json --images FOLDER

`speed`: GFL with a ResNet-18 of random weights at each of `--sizes`, one image. Every side is a process of its own on
the same cores with the same number of threads; all take turns (see `measure`), and each row says the CPU time that its
calls took. PyTorch's threads wait actively, so a busy machine slows eager far more than the others: take ratios to it
on a quiet one. Detections of the float32 file are compared before any time is taken. *outputs too*: int8 in the output
layers as well, which the guided search chooses where it may.
`accuracy`: mAP of exported files in both runtimes, the first file being the float32 one; bf16 in OpenVINO alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.lib import child, options
from benchmarks.lib.exported_student import end_to_end, exported_student
from benchmarks.lib.measure import Call, interleave
from benchmarks.lib.photographs import write_photographs
from benchmarks.lib.results import Case, Row
from deploy.core.canvas import fit_canvas
from deploy.core.card import network_precision
from deploy.core.errors import UserError
from deploy.core.image import decode_image, read_image_bytes
from deploy.core.precisions import file_for
from deploy.graph.precision import compute_in
from deploy.runtimes.base import Runner
from deploy.runtimes.open import open_runner, open_runners
from deploy.runtimes.openvino import openvino_core
from deploy.validate.accuracy import validate

BACKBONE = "resnet18"
FP32, INT8, OUTPUTS_TOO, BF16 = "fp32", "int8 cpu", "int8 cpu, outputs too", "bf16"
EAGER = "torch eager"
RUNTIMES = {"ONNX Runtime": "cpu", "OpenVINO": "openvino"}
BUDGET = 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=("speed", "accuracy"))
    options.threads(parser, 2)
    options.repeats(parser, 9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 512], metavar="PIXELS")
    parser.add_argument("--exports", type=Path, help="folder to keep the exported files in, or to take them from")
    accuracy = parser.add_argument_group("accuracy, which needs all of them")
    accuracy.add_argument("--name", help="of the data")
    accuracy.add_argument("--files", type=Path, nargs="+", help="the float32 file first")
    for option in ("--val", "--images"):
        accuracy.add_argument(option, type=Path)


def run(args: argparse.Namespace) -> Iterator[Case]:
    if args.part == "accuracy":
        missing = [f"--{name}" for name in ("name", "files", "val", "images") if getattr(args, name) is None]
        if missing:
            raise UserError(f"accuracy needs {' '.join(missing)}")
        yield Case(f"accuracy, {args.name}", _accuracy(args))
        return
    with tempfile.TemporaryDirectory(prefix="bench-openvino-") as scratch:
        folder = args.exports or Path(scratch)
        for size in args.sizes:
            threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
            yield Case(f"speed at {size}, {threads}", _speed(folder, size, args.threads, args.repeats))


# ---------------------------------------------------------------------------------------------- accuracy


def _accuracy(args: argparse.Namespace) -> list[Row]:
    runners = open_runners(args.files, [*RUNTIMES.values()])
    first = next(iter(runners))
    found = {result.name: result for result in validate(runners, args.val, args.images, reference=first)}
    rows = []
    for name, result in found.items():
        precision, quantized = network_precision(result.precision), runners[name].card.quantization is not None
        variant = f"{Path(name).name}: {result.backend}"
        rows.append(Row(variant, "mAP", round(result.metrics.map, 3), n=result.images, notes=f"network in {precision}"))
        bar = f"<= {BUDGET}" if quantized or precision == BF16 else ""
        rows.append(Row(variant, "mAP drop", round(result.map_drop or 0.0, 3), n=result.images, bar=bar))
        other = name.replace("(openvino)", "(cpu)")
        if other != name and other in found:
            drop = found[other].metrics.map - result.metrics.map
            bar = "-0.2 to 0.2" if quantized else "-0.01 to 0.01"
            rows.append(Row(variant, "mAP below ONNX Runtime's", round(drop, 3), n=result.images, bar=bar))
    return rows


# ------------------------------------------------------------------------------------------------- speed


def _speed(folder: Path, size: int, threads: int, repeats: int) -> list[Row]:
    files = {name: Path(path) for name, path in child.call(f"{__name__}:export", str(folder), size).items()}
    photograph = sorted((folder / "photographs").glob("*.jpg"))[0]
    rows = _compared(files, photograph, threads)
    with ExitStack() as stack:
        sides = {
            f"{runtime} {name}": stack.enter_context(_Side(provider, path, photograph, threads))
            for runtime, provider in RUNTIMES.items()
            for name, path in files.items()
            if name != BF16 or (runtime == "OpenVINO" and _has_bf16())
        }
        sides[EAGER] = stack.enter_context(_Side(None, folder, photograph, threads, size))
        cases: dict[str, Call] = {f"network, {name}": side.network for name, side in sides.items() if name != EAGER}
        cases |= {f"end to end, {name}": side.end_to_end for name, side in sides.items()}
        timings = interleave(cases, repeats=repeats)
    where = f"cores {', '.join(map(str, _cores(threads)))}"
    for name, timing in timings.items():
        row = timing.row(name)
        settings = sides[name.partition(", ")[2]].settings
        rows.append(replace(row, notes="; ".join(filter(None, (row.notes, where, settings)))))
        rows += timing.part_rows(name)
    return rows + _ratios({name: timing.ms for name, timing in timings.items()})


def export(folder: str, size: int) -> dict[str, str]:
    """Make the files in `folder`, in a process of its own, because torch leaves threads behind. Name → path."""
    place = Path(folder)
    (place / "photographs").mkdir(exist_ok=True, parents=True)
    write_photographs(place / "photographs", 8)
    files = exported_student(BACKBONE, size, place, _pictures(place))[0]
    files[BF16] = file_for(files[FP32], BF16)
    compute_in("bf16", files[FP32], files[BF16])
    return {name: str(path) for name, path in files.items()}


def _compared(files: Mapping[str, Path], photograph: Path, threads: int) -> list[Row]:
    """Differences between the detections of the float32 file in the two runtimes."""
    one, other = (open_runner(files[FP32], (provider,), threads=threads) for provider in RUNTIMES.values())
    canvas = fit_canvas(decode_image(read_image_bytes(photograph)), one.card)[0][None]
    a, b = one(canvas), other(canvas)
    score, box = np.abs(a.scores - b.scores).max(), np.abs(a.boxes - b.boxes).max()
    found = int(a.count[0])
    return [
        Row("OpenVINO fp32", "largest difference of scores", float(score), n=found, bar="<= 1e-4"),
        Row("OpenVINO fp32", "largest difference of boxes", float(box), "px", n=found, bar="<= 0.05"),
    ]


def _ratios(ms: Mapping[str, float]) -> list[Row]:
    rows = []
    for name, base, bar in (
        (FP32, FP32, "<= 1"),
        (INT8, INT8, "<= 0.8"),
        (OUTPUTS_TOO, OUTPUTS_TOO, "<= 0.8"),
        (BF16, FP32, "<= 0.55"),
    ):
        if (key := f"network, OpenVINO {name}") in ms:
            ratio = ms[key] / ms[f"network, ONNX Runtime {base}"]
            rows.append(Row(f"OpenVINO {name} over ONNX Runtime {base}", "share of time", ratio, bar=bar))
    eager = f"end to end, {EAGER}"
    ends = {name.removeprefix("end to end, "): own for name, own in ms.items() if name.startswith("end to end, ")}
    times = {name: ms[eager] / own for name, own in ends.items() if name != EAGER}
    rows += [Row(f"end to end, {name} over {EAGER}", "times as fast", times[name], "×") for name in times]
    best = max(times, key=lambda name: times[name])
    rows.append(Row(f"end to end, the best over {EAGER}", "times as fast", times[best], "×", bar=">= 5", notes=best))
    return rows


class _Side:
    """A runner in a process of its own, which does one call at a time when it is asked. `settings`: what it runs with.

    provider: of the file at `path`; None: PyTorch eager with the exports in the folder `path`, of that size.
    """

    def __init__(
        self, provider: str | None, path: Path, photograph: Path, threads: int, size: int | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, provider, path, photograph, threads, size)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Side:
        self.settings: str = self._connection.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send(None)
        self._process.join()

    def network(self) -> dict[str, float]:
        return self._call("network")

    def end_to_end(self) -> dict[str, float]:
        return self._call("end to end")

    def _call(self, scope: str) -> dict[str, float]:
        self._connection.send(scope)
        found: dict[str, float] = self._connection.recv()
        return found


def _work(
    connection: Connection, provider: str | None, path: Path, photograph: Path, threads: int, size: int | None
) -> None:
    """The process of a side. A call answers with the seconds of all its threads on a CPU."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores(threads))
    runner: Runner
    if provider is None:
        import torch

        assert size is not None, "eager is made for a size"
        torch.set_num_threads(threads)
        runner = exported_student(BACKBONE, size, path, _pictures(path))[1]
    else:
        runner = open_runner(path, (provider,), threads=threads)
    data = read_image_bytes(photograph)
    canvas = fit_canvas(decode_image(data), runner.card)[0][None]
    work = {"network": lambda: runner(canvas), "end to end": lambda: end_to_end(runner, data)}
    settings = dict(getattr(runner, "settings", {"threads": threads}))
    connection.send(", ".join(f"{name} {value}" for name, value in settings.items()))
    while (scope := connection.recv()) is not None:
        before = time.process_time()
        work[scope]()
        connection.send({"all threads on a CPU": time.process_time() - before})


def _cores(threads: int) -> list[int]:
    """The cores that every side is pinned to: as many as threads, of those that this process may use."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return list(usable)[:threads]


def _pictures(folder: Path) -> list[bytes]:
    return [read_image_bytes(path) for path in sorted((folder / "photographs").glob("*.jpg"))]


def _has_bf16() -> bool:
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
