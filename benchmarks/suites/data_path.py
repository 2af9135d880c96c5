"""Our training loader against mmdet's pipeline: JPEG 640 x 480 → uint8 800 x 1067, flip, batches of 2, 2 workers.

    python -m benchmarks data_path --mmdet-python PATH/TO/python

Each side runs in its own environment as a process of its own; one round is the same number of batches from one
side, then from the other. Both loaders run on without an end and keep their workers, so that no round contains
the start of a worker. Two figures: `loader` is what the training process receives (ours: one padded RGB batch;
mmdet's: a list of BGR images), `loader + normalise` is the float batch that enters the network (ours with the
detector's normalisation, mmdet's with its data preprocessor). Without `--mmdet-python` only our side is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.measure import Call, environment_of_child, interleave
from benchmarks.lib.mmdet import check_python
from benchmarks.lib.photographs import CLASSES, write_photographs
from benchmarks.lib.provenance import versions
from benchmarks.lib.results import ROOT, Case, Row

SHORT, LONG = 800, 1333
BATCH, WORKERS = 2, 2
PARTS = ("loader", "loader + normalise")


def add_options(parser: argparse.ArgumentParser) -> None:
    options.mmdet(parser)
    options.repeats(parser, 9)
    options.allocators(parser)
    parser.add_argument("--images", type=int, default=256, help="files to make and to read")
    parser.add_argument("--batches", type=int, default=128, help="batches a round")


def run(args: argparse.Namespace) -> Iterator[Case]:
    check_python(args.mmdet_python)
    with tempfile.TemporaryDirectory(prefix="bench-jpeg-") as name:
        write_photographs(Path(name), args.images)
        for allocator in args.allocators:
            yield Case(f"allocator {allocator}", measure(args, Path(name), allocator))


def measure(args: argparse.Namespace, folder: Path, allocator: str) -> list[Row]:
    """Measure both sides in turn; this process itself only waits."""
    pythons = {"ours": sys.executable}
    if args.mmdet_python:
        pythons["mmdet"] = str(args.mmdet_python)
    sides = {name: _Side(name, python, folder, allocator) for name, python in pythons.items()}
    try:
        cases: dict[str, Call] = {
            f"{name}, {part}": lambda side=side, part=part: side.run(part, args.batches)
            for part in PARTS
            for name, side in sides.items()
        }
        timings = interleave(cases, repeats=args.repeats, min_repeat_s=0)
    finally:
        for side in sides.values():
            side.close()
    rows = []
    for name, timing in timings.items():
        side_versions = sides[name.partition(",")[0]].versions
        notes = "" if side_versions == versions() else side_versions
        rows.append(replace(timing.row(name, "time a round"), notes=notes))
        rows.append(Row(name, "throughput", 1e3 * args.batches * BATCH / timing.ms, "images/s", n=timing.repeats))
    if "mmdet" in sides:
        ratio = timings["mmdet, loader"].ms / timings["ours, loader"].ms
        rows.append(Row("ours, loader", "times as fast", ratio, "×", n=args.repeats, bar=">= 1"))
    return rows


class _Side:
    """A process that draws batches when it is told to: a line in, a line of JSON out."""

    def __init__(self, name: str, python: str, folder: Path, allocator: str) -> None:
        code = "from benchmarks.suites.data_path import draw_batches; import sys; draw_batches(*sys.argv[1:])"
        self.process = subprocess.Popen(
            [python, "-c", code, name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment_of_child(allocator, threads=2),
        )
        self.name = name
        self.versions = str(self._answer())

    def run(self, part: str, batches: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"part": part, "batches": batches}) + "\n")
        self.process.stdin.flush()
        self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.process.wait()}; see above")
        return json.loads(line)


# --- the two sides --------------------------------------------------------------------------------------


def draw_batches(side: str, folder: str) -> None:
    """Draw as many batches as each line of standard input asks for; runs in the process of a side."""
    answers = sys.stdout
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        batches, normalise = _ours(Path(folder)) if side == "ours" else _theirs(Path(folder))
        print(json.dumps(versions()), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            start = perf_counter()
            for _ in range(request["batches"]):
                batch = next(batches)
                if request["part"] == "loader + normalise":
                    normalise(batch)
            print(json.dumps({"seconds": perf_counter() - start}), file=answers, flush=True)


def _ours(folder: Path) -> tuple[Iterator[Any], Callable[[Any], object]]:
    import torch

    from compress.data.coco import CocoDetection
    from compress.data.loader import train_loader
    from compress.data.transforms import train_transform
    from compress.detectors.base import MEAN, STD

    dataset = CocoDetection(folder / "annotations.json", folder, train_transform(SHORT, LONG))
    loader = train_loader(dataset, batch_size=BATCH, seed=0, workers=WORKERS)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))

    def normalise(batch: Any) -> object:
        """Normalise as the trainer and `GFL.features` do."""
        images = batch.to("cpu").images
        return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)

    return iter(loader), normalise


def _theirs(folder: Path) -> tuple[Iterator[Any], Callable[[Any], object]]:
    """mmdet's default: OpenCV in the workers, uint8 to the training process, normalised there."""
    import cv2
    from mmdet.datasets import CocoDataset
    from mmdet.models.data_preprocessors import DetDataPreprocessor
    from mmdet.utils import register_all_modules
    from mmengine.dataset import InfiniteSampler, pseudo_collate
    from torch.utils.data import DataLoader

    register_all_modules(init_default_scope=True)
    cv2.setNumThreads(0)  # what mmdet's default_runtime.py sets
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "Resize", "scale": (LONG, SHORT), "keep_ratio": True},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PackDetInputs"},
    ]
    dataset = CocoDataset(
        ann_file=str(folder / "annotations.json"),
        data_prefix={"img": f"{folder}/"},
        pipeline=pipeline,
        metainfo={"classes": tuple(f"class {k}" for k in range(CLASSES))},
    )
    loader = DataLoader(
        dataset,
        BATCH,
        sampler=InfiniteSampler(dataset, seed=0),
        num_workers=WORKERS,
        collate_fn=pseudo_collate,
        persistent_workers=True,
    )
    preprocessor = DetDataPreprocessor(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32
    )
    return iter(loader), lambda batch: preprocessor(batch, True)
