"""Cost in accuracy and gain in speed of FP16 and INT8, in ONNX Runtime on the CPU.

    python -m benchmarks quantized speed
    python -m benchmarks quantized accuracy --name bccd --checkpoint student.safetensors --train train.json \
        --val val.json --images FOLDER --size 256 320 --limits 240 320

`accuracy`: mAP on the validation images of the float file, of FP16, of INT8 for `cpu` and for `tensorrt` in four
variants: everything in int8, output layers included (*all*); output layers in float (*naive*, the default); and the
guided search with a budget of 0.5 points (*guided*), which decides on training images that are not for calibration.
`speed`: students with random weights, all cases of a size in turn (see `measure`); int8 with its output
layers in float, which is the default, and with them in int8, which the guided search takes where it may.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from benchmarks.lib import options
from benchmarks.lib.exported_student import end_to_end, exported_student
from benchmarks.lib.measure import Call, Timing, interleave
from benchmarks.lib.photographs import write_photographs
from benchmarks.lib.results import Case, Row, cost_bar
from compress.config.data import Split
from compress.config.deploy import Deploy
from compress.export.deployable import TorchRunner
from compress.export.onnx import export_checkpoint
from compress.run.quantize import split_files, write_search_split
from deploy.core.canvas import fit_canvas
from deploy.core.card import network_precision
from deploy.core.errors import UserError
from deploy.core.image import decode_image, read_image_bytes
from deploy.graph.structure import BOXES, SCORES
from deploy.quantize.calibrate import check_apart, choose_images
from deploy.quantize.file import Quantizer
from deploy.quantize.guided import search
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner, session_options
from deploy.validate.accuracy import ArtifactResult, validate

CALIBRATION, BUDGET = 128, 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=("speed", "accuracy"))
    options.threads(parser, 2)
    options.repeats(parser, 9)
    parser.add_argument("--exports", type=Path, help="folder to keep the exported files in, or to take them from")
    accuracy = parser.add_argument_group("accuracy, which needs all but --limits")
    accuracy.add_argument("--name", help="of the data")
    accuracy.add_argument("--checkpoint", type=Path)
    for option in ("--train", "--val", "--images"):
        accuracy.add_argument(option, type=Path)
    accuracy.add_argument("--size", type=int, nargs=2, help="height width")
    accuracy.add_argument("--limits", type=int, nargs=2, help="short long")


def run(args: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="bench-quantized-") as folder:
        if args.part == "speed":
            yield Case(
                f"speed, {args.threads} thread{'s' * (args.threads > 1)}", _speed(args, args.exports or Path(folder))
            )
            return
        missing = [
            f"--{name}"
            for name in ("name", "checkpoint", "train", "val", "images", "size")
            if getattr(args, name) is None
        ]
        if missing:
            raise UserError(f"accuracy needs {' '.join(missing)}")
        yield Case(f"accuracy, {args.name}", _accuracy(args, Path(folder)))


# ---------------------------------------------------------------------------------------------- accuracy


def _accuracy(args: argparse.Namespace, folder: Path) -> list[Row]:
    size = (args.size[0], args.size[1])
    resize_short_long = tuple(args.limits) if args.limits else None
    files = {"fp32": folder / "student.onnx", "fp16": folder / "student.fp16.onnx"}
    val = split_files(args.val, args.images)
    for precision, path in files.items():
        export_checkpoint(
            args.checkpoint,
            path,
            Deploy(),
            input_size=size,
            images=val,
            resize_short_long=resize_short_long,
            precision=precision,
        )
    calibration = choose_images(split_files(args.train, args.images), CALIBRATION)
    check_apart(calibration, val)
    labels = Split(annotations=args.train, images=args.images)
    split = write_search_split(labels, calibration, 300, folder / "decide.json")
    notes: dict[str, str] = {}
    for target in ("cpu", "tensorrt"):
        quantizer = Quantizer(files["fp32"], calibration, target)
        for name, kept in (("all", ()), ("naive", None)):
            files[f"int8 {target} {name}"] = quantizer.save(folder / f"{target}.{name}.onnx", kept).path
        found = search(quantizer, split.annotations, split.images, folder / f"{target}.json", max_map_drop=BUDGET)
        if found.chosen is not None:
            name = f"int8 {target} guided"
            files[name] = quantizer.save(folder / f"{target}.guided.onnx", found.chosen.float_layers).path
            notes[name] = f"layers in float: {', '.join(found.chosen.float_layers) or 'none'}"
    runners: dict[str, Runner] = {name: OnnxRunner(path) for name, path in files.items()}
    rows: list[Row] = []
    for judged in validate(runners, args.val, args.images, reference="fp32", max_map_drop=BUDGET):
        name, size_mb = judged.name, files[judged.name].stat().st_size / 1e6
        rows += _accuracy_rows(judged, size_mb, len(val), notes.get(name, ""))
    return rows


def _accuracy_rows(judged: ArtifactResult, size_mb: float, images: int, notes: str) -> list[Row]:
    """mAP and drop in points, size, and where there are detections calibration error and agreement, of one file."""
    name = judged.name
    bar = "-0.1 to 0.1" if name == "fp16" else f"<= {BUDGET}" if name.endswith("guided") else ""
    notes = "; ".join(filter(None, (notes, f"network in {network_precision(judged.precision)}")))
    made = [
        Row(name, "mAP", round(judged.metrics.map, 3), n=images, notes=notes),
        Row(name, "mAP drop", round(judged.map_drop or 0.0, 3), n=images, bar=bar),
        Row(name, "size", round(size_mb, 3), "MB"),
    ]
    if math.isfinite(judged.d_ece):
        made.append(Row(name, "calibration error", round(judged.d_ece, 4), n=images))
    if judged.agreement and math.isfinite(judged.agreement.share):
        made.append(Row(name, "agreement", round(judged.agreement.share, 4), n=images))
    return made


# ------------------------------------------------------------------------------------------------- speed


def _speed(args: argparse.Namespace, folder: Path) -> list[Row]:
    torch.set_num_threads(args.threads)
    (folder / "photographs").mkdir(exist_ok=True, parents=True)
    write_photographs(folder / "photographs", 8)
    photographs = [read_image_bytes(path) for path in sorted((folder / "photographs").glob("*.jpg"))]
    rows: list[Row] = []
    for backbone, size in (("resnet18", 320), ("resnet50", 320), ("resnet18", 512)):
        files, eager = exported_student(backbone, size, folder, photographs)
        timings = interleave(_calls(files, eager, photographs[0], args.threads), repeats=args.repeats)
        label = f"{backbone} at {size}"
        rows += [timing.row(f"{label}: {name}") for name, timing in timings.items()]
        rows += _speed_ratios(label, timings, with_suppression=size != 512)
    return rows


def _calls(files: dict[str, Path], eager: TorchRunner, photograph: bytes, threads: int) -> dict[str, Call]:
    """The network alone, with and without suppression, and from a file's bytes to boxes."""
    canvas = fit_canvas(decode_image(photograph), eager.card)[0][None]
    models = {"fp32": files["fp32"].read_bytes(), "fp32 without suppression": _until_dense(files["fp32"])}
    models |= {name: path.read_bytes() for name, path in files.items() if name != "fp32"}
    cases: dict[str, Call] = {}
    for name, model in models.items():
        session = _session(model, threads)
        cases[f"model, {name}"] = lambda session=session: _ignore(session.run(None, {"images": canvas}))
    runners: dict[str, Runner] = {name: OnnxRunner(path, threads=threads) for name, path in files.items()}
    for name, runner in {**runners, "torch eager": eager}.items():
        cases[f"end to end, {name}"] = lambda runner=runner: end_to_end(runner, photograph)
    return cases


def _speed_ratios(label: str, timings: dict[str, Timing], *, with_suppression: bool) -> list[Row]:
    """Compute how many times as fast; or, of the largest size, the share of suppression in a whole call."""
    ms = {name: timing.ms for name, timing in timings.items()}
    made = []
    if with_suppression:
        for name in ("int8 cpu", "int8 cpu, outputs too"):
            ratio = ms["model, fp32"] / ms[f"model, {name}"]
            made.append(Row(f"{label}: model, {name} over fp32", "times as fast", ratio, "×", bar=">= 2.5"))
    else:
        dense = ms["model, fp32 without suppression"]
        share = (ms["model, fp32"] - dense) / (ms["end to end, fp32"] - ms["model, fp32"] + dense)
        made.append(Row(f"{label}: suppression", "share of end to end", share, bar=cost_bar(0.1)))
    for name, wanted in (("fp32", 1.4), ("int8 cpu", 4), ("int8 cpu, outputs too", 4)):
        ratio = ms["end to end, torch eager"] / ms[f"end to end, {name}"]
        variant = f"{label}: end to end, {name} over torch eager"
        made.append(Row(variant, "times as fast", ratio, "×", bar=f">= {wanted}"))
    return made


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])


def _until_dense(path: Path) -> bytes:
    model = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (SCORES, BOXES)
    )
    content: bytes = model.SerializeToString()
    return content


def _ignore(_: Any) -> None:
    return None
