"""What our commands add to the runtime below them: throughput of validation, peak memory of three commands.

    python -m benchmarks overhead

The model is a GFL with a ResNet-18 of random weights at 320 x 320 (as in `latency`), in float32 and in int8.

throughput  images a second through `detect_all`, which `compress validate` runs: files are read, decoded, laid on the
            canvas and the boxes carried back; beside the bare runner on ready canvases of the same pictures, in turns
memory      the largest resident set of processes of their own: a bare ONNX Runtime session that runs the same batch,
            `compress validate`, `compress benchmark`, and `compress serve` after `REQUESTS` requests
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.lib import child, options
from benchmarks.lib.load import closed_loop
from benchmarks.lib.measure import ForeignCpu, range_row
from benchmarks.lib.photographs import write_photographs
from benchmarks.lib.results import ROOT, Case, Row
from benchmarks.lib.server import started
from deploy.core.card import card_from_file
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.detect import detect_all, prepare

IMAGES, BATCH, REQUESTS = 64, 8, 400
THROUGHPUT_BAR = ">= 0.9"

_BARE = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
images = numpy.random.default_rng(0).integers(0, 256, [int(n) for n in sys.argv[3:]], numpy.uint8)
for _ in range(8):
    session.run(None, {"images": images})
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.threads(parser, None)
    options.repeats(parser, 7)


def run(args: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as name:
        folder = Path(name) / "photographs"
        folder.mkdir()
        write_photographs(folder, IMAGES)
        child.call("benchmarks.suites.overhead:make_files", name, str(folder))
        notes = f"GFL-R18, random weights, 320 x 320, {args.threads} threads, batches of {BATCH}"
        # A process counts as its own the memory that its parent had: while this one is small, it does not matter.
        rows = memory(Path(name) / "float32.onnx", folder, args.threads)
        yield Case("memory", [replace(row, notes=notes) for row in rows])
        for precision in ("float32", "int8"):
            with ForeignCpu() as other:
                rows = throughput(Path(name) / f"{precision}.onnx", folder, args.threads, args.repeats)
            busy = f", busy: others used {other.share:.0%} of the CPUs" if other.share >= 0.1 else ""
            yield Case(f"throughput, {precision}", [replace(row, notes=notes + busy) for row in rows])


def make_files(to: str, photographs: str) -> None:
    """Write float32.onnx and int8.onnx."""
    from benchmarks.lib.random_student import export_random_student
    from deploy.quantize.calibrate import choose_images
    from deploy.quantize.file import Quantizer

    whole = Path(to) / "float32.onnx"
    export_random_student(str(whole), 320, 320)
    pictures = choose_images(sorted(Path(photographs).glob("*.jpg")), 8)
    Quantizer(whole, pictures, "cpu").save(Path(to) / "int8.onnx", max_batch=2)


def throughput(onnx: Path, folder: Path, threads: int, rounds: int) -> list[Row]:
    """Images a second of both sides, and the ratio in each round."""
    runner = OnnxRunner(onnx, threads=threads)
    files = dict(enumerate(sorted(folder.glob("*.jpg"))))
    canvases = np.concatenate([prepare(path, runner.card)[1].images for path in files.values()])

    def bare() -> None:
        for first in range(0, IMAGES, BATCH):
            runner(canvases[first : first + BATCH])

    sides: dict[str, Callable[[], object]] = {
        "bare runner": bare,
        "validation": lambda: detect_all({"file": runner}, files, BATCH),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn:  # the first is to warm up
                rates[name].append(IMAGES / (time.perf_counter() - start))
    rows = [range_row(name, "throughput", values, "images/s") for name, values in rates.items()]
    ratios = np.divide(rates["validation"], rates["bare runner"]).tolist()
    return [*rows, replace(range_row("validation over the bare runner", "ratio", ratios, "×"), bar=THROUGHPUT_BAR)]


def memory(onnx: Path, folder: Path, threads: int) -> list[Row]:
    """Peak megabytes, and how many times those of the bare session."""
    size = card_from_file(onnx).input_size
    shape = [str(n) for n in (BATCH, 3, *size)]
    ours = [sys.executable, "-m", "compress"]
    data = ["--data", str(folder / "annotations.json"), "--images", str(folder)]
    few, fast = ["--threads", str(threads)], ["--seconds", "1", "--rounds", "2", "--warm-up", "0.1"]
    peaks = {
        "bare session": _peak_mb([sys.executable, "-c", _BARE, str(onnx), str(threads), *shape]),
        "compress validate": _peak_mb([*ours, "validate", str(onnx), *data, "--batch-size", str(BATCH), *few]),
        "compress benchmark": _peak_mb([*ours, "benchmark", str(onnx), "--batch", str(BATCH), *few, *fast]),
        "compress serve": _peak_of_server([*ours, "serve", str(onnx), "--max-batch", str(BATCH), *few], folder),
    }
    rows = []
    for name, peak in peaks.items():
        rows.append(Row(name, "peak memory", peak, "MB"))
        if name != "bare session":
            rows.append(Row(name, "over the bare session", peak / peaks["bare session"], "×"))
    return rows


# --- details --------------------------------------------------------------------------------------------


def _peak_mb(command: list[str]) -> float:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # a gate of random weights may fail
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return usage.ru_maxrss / 1e3


def _peak_of_server(command: list[str], folder: Path) -> float:
    bodies = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    command = [*command, "--port", "0", "--deadline-ms", "600000", "--log-level", "warning"]
    with started(command) as (target, process):
        shots = asyncio.run(closed_loop(target, bodies, clients=2 * BATCH, count=REQUESTS))
        if any(shot.status != 200 for shot in shots):
            raise RuntimeError("the server refused a photograph")
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert peak is not None
        return int(peak[1]) / 1e3
