"""An ONNX student against the same student in PyTorch, end to end, in turn.

    python -m benchmarks latency                                    GFL-R18 with random weights at 320 x 320
    python -m benchmarks latency --detector d_fine s                another one, of a published size
    python -m benchmarks latency --checkpoint student.safetensors --onnx student.onnx --images FOLDER

`end_to_end` begins with the bytes of an image file and ends with boxes in that file's pixels; `h2d+compute+d2h` is the
network with its suppression, from and to host memory. Beside a detector of transformers stands the library's own model
with its post-processing. All runners get the same number of threads. The figures come
from `deploy.latency`: warm-up until stable, interleaved rounds, 95 % confidence from a bootstrap over rounds, and a
randomisation test of each difference; `compress benchmark --json` keeps every sample.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.lib import options, random_student
from benchmarks.lib.library_model import LibraryRunner, random_detr
from benchmarks.lib.photographs import CLASSES, write_photographs
from benchmarks.lib.results import Case, Row
from compress.detectors.base import Detector
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.export.deployable import Deployable, TorchRunner
from compress.export.folded import folded
from deploy.core.errors import UserError
from deploy.core.image_folder import image_files
from deploy.graph.export import export_onnx
from deploy.latency import Scope, benchmark
from deploy.latency.results import BenchmarkReport, Estimate
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner

SCOPES_MEASURED: tuple[Scope, ...] = ("preprocess", "h2d+compute+d2h", "end_to_end")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="FILE.safetensors, FILE.pth or zoo:NAME; default: random weights")
    parser.add_argument(
        "--detector", nargs=2, metavar=("FAMILY", "SIZE"), help="random weights of d_fine or rt_detr_v2"
    )
    parser.add_argument("--onnx", type=Path, help="file exported from that checkpoint; default: export it now")
    parser.add_argument("--more", type=Path, nargs="+", default=[], help="more files of it, as int8; measured in turn")
    parser.add_argument("--images", type=Path, help="folder of image files; default: made ones of 640 x 480")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 320), help="height width, without --onnx")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of a scope and batch size")
    options.threads(parser, 2)


def run(args: argparse.Namespace) -> Iterator[Case]:
    if args.onnx and not args.checkpoint:
        raise UserError("--onnx needs the --checkpoint that it was exported from")
    if args.detector and args.checkpoint:
        raise UserError("--detector has random weights; leave out --checkpoint")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as name:
        images = images_of(args.images, Path(name))
        runners = runners_of(args, images, Path(name))
        report = benchmark(runners, images, batch_sizes=args.batch_sizes, scopes=SCOPES_MEASURED, seconds=args.seconds)
    for warning in report.warnings:
        print(f"warning: {warning}")
    height, width = runners["onnx"].card.input_size
    model = args.checkpoint or (f"{' '.join(args.detector)}, random weights" if args.detector else random_student.NAME)
    yield Case(f"{model}, {height} x {width}, {args.threads} threads", rows(report))


def runners_of(args: argparse.Namespace, images: list[Path], folder: Path) -> dict[str, Runner]:
    """The student in PyTorch, its ONNX file, and further files of it."""
    detector = detector_of(args, images)
    path = args.onnx or folder / "student.onnx"
    if args.onnx:
        onnx = OnnxRunner(path, threads=args.threads)
        if len(onnx.card.class_names) != detector.num_classes:
            raise UserError(f"{path} has {len(onnx.card.class_names)} classes, the checkpoint {detector.num_classes}")
        module = Deployable.from_card(detector, onnx.card)
    else:
        card = random_student.card_of(detector.num_classes, tuple(args.size))
        module = Deployable.from_card(detector, card)
        samples = random_student.canvases(images[:2], card)
        export_onnx(folded(module), card, path, samples=samples, reference=module, max_batch=max(args.batch_sizes))
        onnx = OnnxRunner(path, threads=args.threads)
    runners: dict[str, Runner] = {"torch eager": TorchRunner(module, onnx.card), "onnx": onnx}
    if args.detector:
        runners["transformers eager"] = LibraryRunner(detector, onnx.card)
    return runners | {file.name: OnnxRunner(file, threads=args.threads) for file in args.more}


def detector_of(args: argparse.Namespace, images: list[Path]) -> Detector:
    """The checkpoint's, or one of random weights."""
    if args.checkpoint:
        return load_teacher_checkpoint(args.checkpoint)[0]
    if args.detector:
        family, size = args.detector
        card = random_student.card_of(CLASSES, tuple(args.size))
        return random_detr(family, size, random_student.canvases(images[:4], card))
    return random_student.random_student()


def rows(report: BenchmarkReport) -> list[Row]:
    """Percentiles, means and throughputs with their intervals; then the ratios of the runners."""

    def row(variant: str, metric: str, estimate: Estimate, unit: str, n: int | None, notes: str = "") -> Row:
        spread = "" if estimate.low is None else "95 %"
        return Row(variant, metric, estimate.value, unit, estimate.low, estimate.high, spread, n, notes=notes)

    made = []
    for cell in report.cells:
        variant, n = f"{cell.runner}, {cell.scope}, batch {cell.batch_size}", sum(map(len, cell.samples_ms))
        made += [row(variant, name, estimate, "ms", n) for name, estimate in cell.latency_ms.items()]
        made.append(row(variant, "mean", cell.mean_ms, "ms", n))
        made.append(row(variant, "throughput", cell.throughput_ips, "images/s", n))
    for pair in report.comparisons:
        variant = f"{pair.other} over {pair.base}, {pair.where}"
        made.append(row(variant, f"ratio of {pair.figure}", pair.ratio, "×", None, pair.verdict))
    return made


def images_of(given: Path | None, folder: Path) -> list[Path]:
    """The image files of a folder, or 32 made ones."""
    if given is None:
        write_photographs(folder, 32)
        return sorted(folder.glob("*.jpg"))
    return image_files(given, "--images: ")
