"""An ONNX student against the same student in PyTorch, end to end, in turn.

    python -m benchmarks latency                                    GFL-R18 with random weights at 320 x 320
    python -m benchmarks latency --checkpoint student.safetensors --onnx student.onnx --images FOLDER

`end_to_end` begins with the bytes of an image file and ends with boxes in that file's pixels; `h2d+compute+d2h` is the
network with its suppression, from and to host memory. All runners get the same number of threads. The figures come
from `deploy.latency`: warm-up until stable, interleaved rounds, 95 % confidence from a bootstrap over rounds, and a
randomisation test of each difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.lib import measure
from benchmarks.suites.data_path import write_photographs
from compress.detectors.backbones import build_backbone
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.detectors.gfl import GFL
from compress.export.deployable import Deployable, TorchRunner
from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.core.files import write_json
from deploy.core.image import decode_image, fit_canvas, read_image_bytes
from deploy.graph.export import export_onnx
from deploy.latency import Scope, benchmark, comparison_table, report_table
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner

CLASSES, SPREAD = 80, 2.0
SCOPES_MEASURED: tuple[Scope, ...] = ("preprocess", "h2d+compute+d2h", "end_to_end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="FILE.safetensors, FILE.pth or zoo:NAME; default: random weights")
    parser.add_argument("--onnx", type=Path, help="file exported from that checkpoint; default: export it now")
    parser.add_argument("--more", type=Path, nargs="+", default=[], help="more files of it, as int8; measured in turn")
    parser.add_argument("--images", type=Path, help="folder of image files; default: made ones of 640 x 480")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 320), help="height width, without --onnx")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of a cell")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "latency.json")
    args = parser.parse_args()
    if args.onnx and not args.checkpoint:
        parser.error("--onnx needs the --checkpoint that it was exported from")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as name:
        try:
            _run(args, Path(name))
        except UserError as error:
            parser.error(str(error))


def _run(args: argparse.Namespace, folder: Path) -> None:
    images = _images(args.images, folder)
    detector = load_teacher_checkpoint(args.checkpoint)[0] if args.checkpoint else _random_detector()
    path = args.onnx or folder / "student.onnx"
    if args.onnx:
        onnx = OnnxRunner(path, threads=args.threads)
        if len(onnx.card.class_names) != detector.num_classes:
            raise UserError(f"{path} has {len(onnx.card.class_names)} classes, the checkpoint {detector.num_classes}")
        module = Deployable.from_card(detector, onnx.card)
    else:
        card = _card(detector.num_classes, tuple(args.size))
        module = Deployable.from_card(detector, card)
        export_onnx(module, card, path, samples=_canvases(images[:2], card), max_batch=max(args.batch_sizes))
        onnx = OnnxRunner(path, threads=args.threads)
    runners: dict[str, Runner] = {"torch eager": TorchRunner(module, onnx.card), "onnx": onnx}
    runners |= {file.name: OnnxRunner(file, threads=args.threads) for file in args.more}
    counts = {name: runner(_canvases(images[:4], onnx.card)).count.tolist() for name, runner in runners.items()}
    report = benchmark(runners, images, batch_sizes=args.batch_sizes, scopes=SCOPES_MEASURED, seconds=args.seconds)
    write_json(
        args.out,
        measure.record(
            model=args.checkpoint or "GFL-R18, random weights",
            onnx_mib=round(path.stat().st_size / 2**20, 1),
            threads=args.threads,
            detections_of_first_images=counts,
            benchmark=report.model_dump(mode="json"),
        ),
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report_table(report))
    console.print(comparison_table(report.comparisons, tolerance=0.0))
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"detections in the first images: {counts}")
    print(f"written: {args.out}")


def _random_detector() -> GFL:
    """Class logits are spread a little, so that suppression has boxes to work on, as in a trained detector."""
    torch.manual_seed(0)
    detector = GFL(CLASSES, build_backbone("resnet18", weights="none", frozen_stages=-1, norm_eval=False))
    with torch.no_grad():
        detector.head.gfl_cls.weight.mul_(SPREAD)
    return detector.eval()


def _card(classes: int, size: tuple[int, int]) -> ModelCard:
    return ModelCard(
        name="benchmark",
        class_names=[f"class {k}" for k in range(classes)],
        category_ids=list(range(1, classes + 1)),
        input_size=size,
    )


def _images(given: Path | None, folder: Path) -> list[Path]:
    if given is None:
        write_photographs(folder, 32)
        return sorted(folder.glob("*.jpg"))
    found = sorted(p for p in given.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise UserError(f"--images: no .jpg or .png files in {given}")
    return found


def _canvases(images: list[Path], card: ModelCard) -> np.ndarray:
    return np.stack([fit_canvas(decode_image(read_image_bytes(path), str(path)), card)[0] for path in images])


if __name__ == "__main__":
    main()
