"""Opening annotation files of the size of COCO's and of Objects365's: time and memory, beside the plain reader.

    python -m benchmarks label_index
    python -m benchmarks label_index --only coco          # without the large file, which takes 4.5 GB of disk

The files are drawn by arithmetic: 118,000 images with 885,000 boxes and their polygons, and 1,700,000 images with
25,000,000 boxes without any. They are opened as training opens them (`compress.data.coco.CocoDetection`), each in a
process of its own: for the first time, again, and without an index, which is how every file was opened before there
were any. CPU time is that of all threads. *memory* is how far the largest resident set rises while the file is opened,
what is mapped of the file included; *peak* is that set. Then two loader workers, forked or spawned, look up the labels
of 50,000 images, without pixels: *own memory* is what one of them shares with nobody, above a worker that looks up
nothing. Linux only: memory is what /proc says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.lib import child
from benchmarks.lib.results import Case, Row
from compress.data import index
from compress.data.coco import CocoDetection
from compress.data.digests import TOO_NEW_NS

SIZES = {"coco": (118_000, 885_000, 80, 23), "objects365": (1_700_000, 25_000_000, 365, 0)}
"""Images, boxes, classes, and corners of a box's polygon."""
FIRST, AGAIN, PLAIN = "first time", "again", "without an index"
UNITS = {"CPU time": "s", "wall time": "s", "memory": "MB", "peak": "MB"}
RATIOS = {"CPU time": ">= 8", "memory": ">= 3"}
"""How many times as much it takes without an index."""
BARS = {(AGAIN, "wall time"): "<= 1", (FIRST, "peak"): "<= 6000"}
OWN_MEMORY = "<= 60"
ROUNDS, SAMPLES, BATCH = 3, 50_000, 100
KINDS = ("fork", "spawn")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=SIZES, help="one of the files")
    parser.add_argument("--folder", type=Path, help="where to draw; default: a temporary folder")


def run(args: argparse.Namespace) -> Iterator[Case]:
    for name, size in SIZES.items():
        if args.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            file, cache = Path(scratch) / "labels.json", Path(scratch) / "cache"
            draw(file, *size)
            environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
            time.sleep(TOO_NEW_NS / 1e9 + 1)  # a file that was just written is not remembered

            def call(function: str, *more: Any, to: dict[str, str] = environment, file: Path = file) -> Any:
                return child.call(f"benchmarks.suites.label_index:{function}", str(file), *more, environment=to)

            found: dict[str, list[dict[str, float]]] = {FIRST: [], AGAIN: [], PLAIN: []}
            for turn in range(ROUNDS):
                if turn == 0 or name == "coco":  # the large one takes minutes
                    shutil.rmtree(cache, ignore_errors=True)
                    found[FIRST].append(call("open_once", True))
                found[AGAIN].append(call("open_once", True))
                if turn == 0 and name == "coco":  # the large one would take some 100 GB
                    found[PLAIN].append(call("open_once", False))
            workers = {kind: call("own_memory", kind) for kind in KINDS}
            title = f"{size[0]:,} images, {size[1]:,} boxes, {file.stat().st_size / 1e6:,.0f} MB"
        yield Case(title, rows(found, workers))


def rows(found: Mapping[str, Sequence[Mapping[str, float]]], workers: Mapping[str, float]) -> list[Row]:
    """found: what `open_once` gave, a round each. workers: what `own_memory` gave for each kind of process."""
    made = []
    medians: dict[tuple[str, str], float] = {}
    for name, rounds in found.items():
        for metric, unit in UNITS.items() if rounds else ():
            values = [one[metric] for one in rounds]
            medians[name, metric] = statistics.median(values)
            low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
            spread, bar = "" if low is None else "range", BARS.get((name, metric), "")
            made.append(Row(name, metric, medians[name, metric], unit, low, high, spread, len(values), bar=bar))
    for metric, bar in RATIOS.items() if found.get(PLAIN) else ():
        ratio = medians[PLAIN, metric] / medians[FIRST, metric]
        made.append(Row(PLAIN, f"{metric} over the first time's", ratio, "×", bar=bar))
    made += [Row(f"worker, {kind}", "own memory", value, "MB", bar=OWN_MEMORY) for kind, value in workers.items()]
    return made


def draw(file: Path, images: int, boxes: int, classes: int, corners: int) -> None:
    """A COCO file; the same arguments give the same bytes. Boxes lie in images in no order."""
    random = np.random.default_rng(0)
    sides = random.integers(300, 641, (images, 2))
    # of a polygon a reader sees the length alone, so a thousand are enough
    polygons = [
        f"[{', '.join(map(str, row))}]" for row in random.uniform(0, 640, (1000, 2 * corners)).round(2).tolist()
    ]
    with open(file, "w", encoding="utf-8") as out:
        out.write('{"info": {"description": "drawn"}, "licenses": [], "images": [')
        for n, (width, height) in enumerate(sides.tolist()):
            out.write(
                f'{", " if n else ""}{{"license": 4, "file_name": "{n:012}.jpg", "height": {height}, "width": {width}, '
                f'"coco_url": "http://images.example.org/train/{n:012}.jpg", "date_captured": "2013-11-14 17:02:52", '
                f'"id": {5 * n + 9}}}'
            )
        out.write('], "annotations": [')
        for start in range(0, boxes, 100_000):
            count = min(100_000, boxes - start)
            owner, kind = random.integers(0, images, count), random.integers(1, classes + 1, count)
            size = (random.uniform(0.02, 0.5, (count, 2)) * sides[owner]).round(2)
            corner = (random.uniform(0, 1, (count, 2)) * (sides[owner] - size)).round(2)
            columns = (owner.tolist(), kind.tolist(), np.concatenate([corner, size], 1).tolist())
            out.write(", " if start else "")
            out.write(
                ", ".join(
                    f'{{"segmentation": [{polygons[n % 1000] if corners else ""}], "area": {box[2] * box[3] / 2:.4f}, '
                    f'"iscrowd": 0, "image_id": {5 * image + 9}, "bbox": {box}, "category_id": {category}, "id": {n}}}'
                    for n, image, category, box in zip(range(start + 1, start + count + 1), *columns, strict=True)
                )
            )
        names = ", ".join(f'{{"id": {n}, "name": "class {n}"}}' for n in range(1, classes + 1))
        out.write(f'], "categories": [{names}]}}')


# --- in processes of their own --------------------------------------------------------------------------


def open_once(file: str, with_index: bool) -> dict[str, float]:
    """What opening takes."""
    if not with_index:
        index.SMALLEST = 1 << 60
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: importing leaves one
    before, cpu, wall = _resident_mb("VmRSS"), time.process_time(), time.perf_counter()
    dataset = _Labels(file)
    seconds, peak = (time.process_time() - cpu, time.perf_counter() - wall), _resident_mb("VmHWM")
    assert len(dataset) and dataset.num_boxes
    return dict(zip(UNITS, (*seconds, peak - before, peak), strict=True))


def own_memory(file: str, kind: str) -> float:
    """MB of the worker that has most, above one that looks up nothing."""
    dataset = _Labels(file)
    return _most_private(dataset, kind) - _most_private(_Nothing(), kind)


class _Labels(CocoDetection):
    """Labels without pixels."""

    def __init__(self, file: str) -> None:
        super().__init__(Path(file), Path(file).parent, _as_it_is)

    def image(self, index: int) -> torch.Tensor:
        return torch.zeros(3, 1, 1, dtype=torch.uint8)


class _Nothing(Dataset[Any]):
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(3, 1, 1, dtype=torch.uint8)


def _as_it_is(*sample: torch.Tensor) -> Any:
    return sample


def _most_private(dataset: Any, kind: str) -> float:
    count = len(dataset) if isinstance(dataset, CocoDetection) else SAMPLES
    order = np.random.default_rng(0).permutation(count)[:SAMPLES].tolist()
    context = multiprocessing.get_context(kind)
    loader = DataLoader(
        dataset, BATCH, sampler=order, num_workers=2, collate_fn=_private_mb, multiprocessing_context=context
    )
    return max(list(loader)[-4:])  # at the end


def _private_mb(samples: Any) -> float:
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1e3


def _resident_mb(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1e3
