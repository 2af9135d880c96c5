"""COCO mAP of many detections: time and memory, beside pycocotools on the same made-up boxes.

    python -m benchmarks evaluation
    python -m benchmarks evaluation --no-peer       # without pycocotools, which takes a minute

Each is measured in a process of its own, from rows as a results file has them (pycocotools) or from the columns that
`compress validate` makes (ours); *memory* is how far the largest resident set of the process rises meanwhile. Both see
the same numbers, so their mAP must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.lib import child
from benchmarks.lib.results import Case, Row

SIZES = {"many detections": (5000, 80, 7, 100), "many classes": (5000, 1203, 6, 6)}
"""Images, classes, objects and detections of an image."""
PEER = {"many detections"}  # pycocotools needs many minutes for the other


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-peer", action="store_true", help="leave pycocotools out")


def run(args: argparse.Namespace) -> Iterator[Case]:
    for name, (images, classes, objects, detections) in SIZES.items():
        ours = child.call("benchmarks.suites.evaluation:measure_ours", images, classes, objects, detections)
        rows = [Row("compress", metric, ours[metric], unit) for metric, unit in UNITS.items()]
        if name in PEER and not args.no_peer:
            theirs = child.call("benchmarks.suites.evaluation:measure_peer", images, classes, objects, detections)
            rows += [Row("pycocotools", metric, theirs[metric], unit) for metric, unit in UNITS.items()]
            difference = abs(ours["mAP"] - theirs["mAP"])
            rows.append(Row("compress", "difference of mAP", difference, "points", bar="<= 1e-9"))
        yield Case(f"{name}: {images} images, {classes} classes, {detections} detections each", rows)


UNITS = {"CPU time": "s", "memory": "MB"}


def measure_ours(*size: int) -> dict[str, float]:
    """Time, memory and mAP of our evaluator."""
    from deploy.core.detection_table import DetectionTable
    from deploy.validate.coco import evaluate_coco

    document, columns = _made_up(*size)
    table = DetectionTable(*columns)
    return _measured(lambda: evaluate_coco(document, table).map)


def measure_peer(*size: int) -> dict[str, float]:
    """The same of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    document, columns = _made_up(*size)
    keys = ("image_id", "category_id", "bbox", "score")
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def work() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {"info": {}, **document}
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(100 * evaluation.stats[0])

    return _measured(work)


# ----------------------------------------------------------------------------------------------------


def _made_up(images: int, classes: int, objects: int, detections: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A COCO document; and image ids, category ids, boxes and scores of detections, of which some are near objects."""
    rng = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        return np.concatenate([rng.uniform(0, 400, (count, 2)), np.exp(rng.uniform(2.5, 5, (count, 2)))], 1)

    truth, kinds = boxes(images * objects), rng.integers(0, classes, images * objects)
    near = min(objects, detections)
    some = (np.arange(images)[:, None] * objects + np.arange(near)).ravel()
    rest = images * (detections - near)
    columns = [
        np.concatenate([some // objects, np.repeat(np.arange(images), detections - near)]),
        np.concatenate([kinds[some], rng.integers(0, classes, rest)]),
        np.concatenate([truth[some] * (1 + rng.normal(0, 0.05, (len(some), 4))), boxes(rest)]),
        rng.random(images * detections).round(3),
    ]
    rows = [
        {"id": n + 1, "image_id": n // objects, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (kind, box) in enumerate(zip(kinds.tolist(), truth.tolist(), strict=True))
    ]
    document = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(images)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(classes)],
        "annotations": rows,
    }
    return document, columns


def _measured(work: Any) -> dict[str, float]:
    before, start = _peak_mb(), time.process_time()
    found = work()
    return {"CPU time": time.process_time() - start, "memory": _peak_mb() - before, "mAP": found}


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Darwin" else 1e3)
