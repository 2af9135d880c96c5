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
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.lib import measure
from benchmarks.suites.vs_mmdet import HOW_TO_BUILD
from deploy.core.files import write_json

FILE_SIZE, SHORT, LONG = (640, 480), 800, 1333
BATCH, WORKERS, CLASSES, BOXES, QUALITY = 2, 2, 80, 7, 90
CASES = ("loader", "loader + normalise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mmdet-python",
        type=Path,
        default=os.environ.get("MMDET_PYTHON"),
        help="interpreter of an environment with mmdet 3.3 (default: $MMDET_PYTHON)",
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "data_path.json")
    parser.add_argument("--images", type=int, default=256, help="files to make and to read")
    parser.add_argument("--batches", type=int, default=128, help="batches a round")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--allocators", nargs="+", choices=measure.ALLOCATORS, default=list(measure.ALLOCATORS))
    parser.add_argument("--strict", action="store_true", help="exit 1 when our loader is slower")
    parser.add_argument("--child", choices=("ours", "mmdet"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _serve(args.child, args.folder)
        return
    if args.mmdet_python is None:
        print(HOW_TO_BUILD)
    elif not args.mmdet_python.exists():
        parser.error(f"--mmdet-python: {args.mmdet_python} does not exist")
    with tempfile.TemporaryDirectory(prefix="bench-jpeg-") as name:
        folder = Path(name)
        kib = write_photographs(folder, args.images)
        runs = {allocator: _measure(args, folder, allocator) for allocator in args.allocators}
    bars = [bar for run in runs.values() for bar in run["bars"]]
    files = {"count": args.images, "mean_kib": round(kib, 1), "size": FILE_SIZE, "jpeg_quality": QUALITY}
    compared = args.mmdet_python is not None
    report = measure.record(compared=compared, files=files, workers=WORKERS, batch=BATCH, runs=runs, bars=bars)
    write_json(args.out, report)
    _print(report)
    print(f"written: {args.out}")
    if args.strict and not all(bar["met"] for bar in bars):
        sys.exit(1)


def _measure(args: argparse.Namespace, folder: Path, allocator: str) -> dict[str, Any]:
    """Both sides in turn; the coordinator itself only waits."""
    sides = {"ours": sys.executable}
    if args.mmdet_python:
        sides["mmdet"] = str(args.mmdet_python)
    processes = {name: _Side(name, python, folder, allocator) for name, python in sides.items()}
    try:
        cases: dict[str, measure.Case] = {
            f"{name} {case}": lambda process=process, case=case: process.run(case, args.batches)
            for case in CASES
            for name, process in processes.items()
        }
        rows = measure.interleave(cases, repeats=args.repeats, min_repeat_s=0)
        for row in rows.values():
            row["images_per_second"] = 1e3 * args.batches * BATCH / row["ms"]["median"]
        facts = {name: process.facts for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.close()
    bars = []
    if "mmdet" in sides:
        ratio = rows["mmdet loader"]["ms"]["median"] / rows["ours loader"]["ms"]["median"]
        bars.append({**measure.bar("loader not slower than mmdet's", 1.0, ratio), "allocator": allocator})
    return {"rows": rows, "sides": facts, "bars": bars}


class _Side:
    """A process that draws batches when it is told to: a line in, a line of JSON out."""

    def __init__(self, name: str, python: str, folder: Path, allocator: str) -> None:
        command = [python, "-m", "benchmarks", "data_path", "--child", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=measure.ROOT,
            env=measure.environment_of_child(allocator, threads=2),
        )
        self.name = name
        self.facts = self._answer()

    def run(self, case: str, batches: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case, "batches": batches}) + "\n")
        self.process.stdin.flush()
        self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.process.wait()}; see above")
        return json.loads(line)


# --- the two sides --------------------------------------------------------------------------------------


def _serve(side: str, folder: Path) -> None:
    answers = sys.stdout
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        batches, normalise = _ours(folder) if side == "ours" else _theirs(folder)
        print(json.dumps(measure.versions()), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            start = perf_counter()
            for _ in range(request["batches"]):
                batch = next(batches)
                if request["case"] == "loader + normalise":
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
        """As the trainer and `GFL.features` do."""
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


# --- files ----------------------------------------------------------------------------------------------


def write_photographs(folder: Path, count: int) -> float:
    """Shaded, noisy images about as large as photographs, and their boxes. Returns the mean size in KiB."""
    import numpy as np
    from PIL import Image

    width, height = FILE_SIZE
    images, annotations, total = [], [], 0
    for i in range(count):
        random = np.random.default_rng(i)
        coarse = random.uniform(0, 255, (12, 16, 3)).astype(np.uint8)
        shading = np.asarray(Image.fromarray(coarse).resize(FILE_SIZE, Image.Resampling.BICUBIC), np.float32)
        noise = random.normal(0, 7, (height, width, 1)) + random.normal(0, 2, (height, width, 3))
        path = folder / f"{i:06d}.jpg"
        Image.fromarray((shading + noise).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        total += path.stat().st_size
        images.append({"id": i, "width": width, "height": height, "file_name": path.name})
        for _ in range(BOXES):
            w, h = random.uniform(20, 0.6 * width), random.uniform(20, 0.6 * height)
            box = [random.uniform(0, width - w), random.uniform(0, height - h), w, h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1 + len(annotations) % CLASSES,
                    "bbox": [round(float(x), 2) for x in box],
                    "area": float(w * h),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return total / count / 1024


def _print(report: dict[str, Any]) -> None:
    for allocator, run in report["runs"].items():
        print(f"allocator {allocator}")
        for name, row in run["rows"].items():
            ms, busy = row["ms"], f"others used {row['foreign_cpu']:.0%} of the CPUs"
            spread = f"{ms['q1']:.0f} to {ms['q3']:.0f} ms a round"
            print(f"  {name:26} {row['images_per_second']:6.0f} images/s   {spread}   {busy}")
    for bar in report["bars"]:
        verdict = "met" if bar["met"] else "MISSED"
        print(f"{verdict}: {bar['name']} ({bar['allocator']}): {bar['seen']:.2f}× of {bar['wanted']:.1f}×")
    if not report["compared"]:
        print("not compared: mmdet was not given (--mmdet-python)")


if __name__ == "__main__":
    main()
