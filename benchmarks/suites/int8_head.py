"""Time of int8 files for the CPU: GroupNorm or BatchNorm in the head, with and without the form for the CPU.

    python -m benchmarks int8_head

GFL students with a ResNet-18 of random weights in ONNX Runtime, and in OpenVINO where it is installed: the network with
its suppression, all files of a size in turn (see `measure`). The first is GroupNorm as `deploy.quantize` alone makes
it; all others have the form for the CPU (`deploy.quantize.cpu_form`). *Outputs too* has the output layers in int8,
which the guided search takes where it may.
Once with 200 (location, class) pairs above the score threshold, and once with a thousand, all that suppression takes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime

from benchmarks.lib import options
from benchmarks.lib.exported_student import student
from benchmarks.lib.measure import Call, interleave
from benchmarks.lib.photographs import write_photographs
from benchmarks.lib.results import Case, Row
from compress.export.folded import folded
from deploy.core.image import read_image_bytes
from deploy.graph.export import export_onnx
from deploy.quantize import qdq
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer
from deploy.runtimes.onnx import session_options
from deploy.runtimes.openvino import OpenVINORunner

BEFORE = "GroupNorm, as quantized"
BARS = {"BatchNorm": "<= 0.8", "BatchNorm, outputs too, in OpenVINO": "<= 0.65"}
"""Of the time of `BEFORE`, at 320."""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.threads(parser, 2)
    options.repeats(parser, 9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 512], help="sides of the input")
    parser.add_argument("--candidates", type=int, nargs="+", default=[200, 1000], help="above the score threshold")
    parser.add_argument("--exports", type=Path, help="folder to keep the exported files in, or to take them from")


def run(args: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="bench-int8-head-") as temporary:
        folder = args.exports or Path(temporary)
        (folder / "photographs").mkdir(exist_ok=True, parents=True)
        write_photographs(folder / "photographs", 8)
        rows: list[Row] = []
        for size in args.sizes:
            for candidates in args.candidates:
                rows += _rows(size, candidates, folder, args)
        yield Case(f"{args.threads} thread{'s' * (args.threads > 1)}", rows)


# --- details --------------------------------------------------------------------------------------------


def _rows(size: int, candidates: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    photographs = sorted((folder / "photographs").glob("*.jpg"))
    cases: dict[str, Call] = {}
    for norm, name in (("group", "GroupNorm"), ("batch", "BatchNorm")):
        data = [read_image_bytes(path) for path in photographs]
        module, card, samples = student("resnet18", size, data, head_norm=norm, passing=candidates)
        whole = folder / f"{norm}_{size}_{candidates}.onnx"
        if not whole.is_file():
            export_onnx(folded(module), card, whole, samples=samples, max_batch=2)
        quantizer, canvas = Quantizer(whole, choose_images(photographs, len(photographs)), "cpu"), samples[:1]
        if norm == "group":
            with mock.patch.object(qdq, "for_cpu"):
                before = quantizer.save(whole.with_suffix(".before.int8.onnx"), max_batch=2)
            cases[BEFORE] = _call(before.path, canvas, args.threads)
        plain = quantizer.save(whole.with_suffix(".int8.onnx"), max_batch=2)
        every = quantizer.save(whole.with_suffix(".all.int8.onnx"), (), max_batch=2)
        for variant, path in ((name, plain.path), (f"{name}, outputs too", every.path)):
            cases[variant] = _call(path, canvas, args.threads)
            if find_spec("openvino"):
                cases[f"{variant}, in OpenVINO"] = partial(_run, OpenVINORunner(path, threads=args.threads), canvas)
    timings = interleave(cases, repeats=args.repeats)
    label = f"resnet18 at {size}, {candidates} candidates"
    rows = [timing.row(f"{label}: {name}") for name, timing in timings.items()]
    for name in list(cases)[1:]:
        bar = BARS.get(name, "") if size == 320 else ""
        ratio = timings[name].ms / timings[BEFORE].ms
        rows.append(Row(f"{label}: {name} over {BEFORE}", "share of the time", ratio, bar=bar))
    return rows


def _run(runner: OpenVINORunner, canvas: np.ndarray) -> None:
    runner(canvas)


def _call(path: Path, canvas: np.ndarray, threads: int) -> Call:
    session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])

    def call() -> None:
        session.run(None, {"images": canvas})

    return call
