"""COCO mAP of many detections: time and memory, beside other evaluators on the same made-up boxes.

    python -m benchmarks evaluation
    python -m benchmarks evaluation --no-peer       # ours alone
    pip install faster-coco-eval==1.8.0 hotcoco==1.3.0 ultrafast-pycocotools==0.1.14 vernier==0.5.4 pyarrow

Each evaluator runs in processes of its own, in turns, from a COCO document in memory and columns of detections, which
are what `compress validate` has, to the twelve figures; nobody reads a file. A peer takes the columns in the fastest
form that it has. *memory* is how far the largest resident set of the process rises meanwhile. Peers that are not
installed are left out. What is compared is CPU time, of all threads, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import platform
import resource
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.lib import child
from benchmarks.lib.results import Case, Row

SIZES = {"many detections": (5000, 80, 7, 100), "many classes": (5000, 1203, 6, 6)}
"""Images, classes, objects and detections of an image."""
ROUNDS = 3
UNITS = {"CPU time": "s", "memory": "MB"}
OURS, REFERENCE, FORMER = "compress", "pycocotools", "faster-coco-eval"
BARS = {"CPU time": ">= 10", "memory": ">= 3"}
"""How many times as much faster-coco-eval takes."""

Columns = list[np.ndarray]
"""Image ids [n], category ids [n], boxes xywh [n, 4] and scores [n] of detections."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-peer", action="store_true", help="leave the other evaluators out")


def run(args: argparse.Namespace) -> Iterator[Case]:
    peers = {name: evaluator for name, evaluator in PEERS.items() if not args.no_peer and find_spec(evaluator[0])}
    for case, size in SIZES.items():
        many_classes = case == "many classes"  # pycocotools takes many minutes there
        names = [OURS, *(name for name in peers if not (many_classes and name == REFERENCE))]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(ROUNDS):
            for name in names:
                if turn == 0 or name != REFERENCE:  # which takes a minute a round
                    found[name].append(child.call("benchmarks.suites.evaluation:measure", name, *size))
        images, classes, _, detections = size
        title = f"{case}: {images} images, {classes} classes, {detections} detections each"
        yield Case(title, rows(found))


def rows(found: Mapping[str, list[dict[str, Any]]]) -> list[Row]:
    """Time and memory of each evaluator, how many figures have other bits than pycocotools', and what faster-coco-eval
    takes for ours. found: what `measure` gave, a round each."""
    made = []
    medians: dict[tuple[str, str], float] = {}
    for name, rounds in found.items():
        for metric, unit in UNITS.items():
            values = [one[metric] for one in rounds]
            medians[name, metric] = statistics.median(values)
            low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
            spread = "" if low is None else "range"
            made.append(Row(name, metric, medians[name, metric], unit, low, high, spread, len(values)))
    if REFERENCE in found:
        wanted = found[REFERENCE][0]["figures"]
        for name, rounds in found.items():
            if name != REFERENCE:
                others = sum(a != b for a, b in zip(_bits(rounds[0]["figures"]), _bits(wanted), strict=True))
                made.append(Row(name, "figures with other bits", others, n=12, bar="<= 0" if name == OURS else ""))
    if FORMER in found:
        for metric, bar in BARS.items():
            ratio = medians[FORMER, metric] / medians[OURS, metric]
            made.append(Row(FORMER, f"{metric} over ours", ratio, "×", bar=bar))
    return made


def measure(name: str, *size: int) -> dict[str, Any]:
    """Time, memory and the twelve figures, 0..1, of an evaluator; None where there are no objects."""
    document, columns = made_up(*size)
    evaluator = _compress if name == OURS else PEERS[name][1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator(*made_up(2, 2, 2, 2))  # what it imports
        before, start = _peak_mb(), time.process_time()
        figures = evaluator(document, columns)
        seconds, memory = time.process_time() - start, _peak_mb() - before
    shares = [None if value == -1 or math.isnan(value) else float(value) for value in figures]
    return {"CPU time": seconds, "memory": memory, "figures": shares}


def made_up(images: int, classes: int, objects: int, detections: int) -> tuple[dict[str, Any], Columns]:
    """A COCO document, and columns of detections, of which some are near objects."""
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
    labels = [
        {"id": n + 1, "image_id": n // objects, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (kind, box) in enumerate(zip(kinds.tolist(), truth.tolist(), strict=True))
    ]
    document = {
        "info": {},
        "images": [{"id": n, "file_name": f"{n}.png", "width": 640, "height": 640} for n in range(images)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(classes)],
        "annotations": labels,
    }
    return document, columns


# --- evaluators -----------------------------------------------------------------------------------------


def _compress(document: dict[str, Any], columns: Columns) -> list[float]:
    from deploy.core.detection_table import DetectionTable
    from deploy.validate.coco import FIGURES, evaluate_coco

    metrics = evaluate_coco(document, DetectionTable(*columns))
    return [getattr(metrics, name) / 100 for name in FIGURES]


def _pycocotools(document: dict[str, Any], columns: Columns) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = document
    truth.createIndex()
    return _summary(COCOeval(truth, truth.loadRes(_matrix(columns)), "bbox"))


def _faster_coco_eval(document: dict[str, Any], columns: Columns) -> list[float]:
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(document)
    return _summary(COCOeval_faster(truth, truth.loadRes(_matrix(columns)), "bbox"))


def _hotcoco(document: dict[str, Any], columns: Columns) -> list[float]:
    from hotcoco import COCO, COCOeval

    truth = COCO(document)
    return _summary(COCOeval(truth, truth.load_res(_matrix(columns)), "bbox"))


def _ultrafast(document: dict[str, Any], columns: Columns) -> list[float]:
    from ultrafast_pycocotools.coco import COCO
    from ultrafast_pycocotools.cocoeval import COCOeval

    truth = COCO(document, verbose=False)
    return _summary(COCOeval(truth, truth.loadRes(_matrix(columns)), "bbox"))


def _vernier(document: dict[str, Any], columns: Columns) -> list[float]:
    from vernier.instance import Bbox, CocoDataset, Evaluator

    def column(section: str, key: str, kind: type) -> np.ndarray:
        return np.array([row[key] for row in document[section]], kind)

    images = {key: column("images", key, np.int64) for key in ("id", "width", "height")}
    labels = {key: column("annotations", key, np.int64) for key in ("id", "image_id", "category_id", "iscrowd")}
    labels |= {key: column("annotations", key, np.float64) for key in ("bbox", "area")}
    truth = CocoDataset.from_arrays(images, labels, document["categories"])
    return list(Evaluator(iou=Bbox()).evaluate(truth, _matrix(columns), num_threads=1).stats)


def _summary(evaluation: Any) -> list[float]:
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats[:12]]


PEERS: dict[str, tuple[str, Callable[[dict[str, Any], Columns], list[float]]]] = {
    REFERENCE: ("pycocotools", _pycocotools),
    FORMER: ("faster_coco_eval", _faster_coco_eval),
    "hotcoco": ("hotcoco", _hotcoco),
    "ultrafast-pycocotools": ("ultrafast_pycocotools", _ultrafast),
    "vernier": ("vernier", _vernier),
}
"""What is imported, and the evaluation."""


# --- details --------------------------------------------------------------------------------------------


def _matrix(columns: Columns) -> np.ndarray:
    """Image, box, score and category as float64 [n, 7], which every peer takes."""
    images, categories, boxes, scores = columns
    return np.column_stack([images, boxes, scores, categories]).astype(np.float64)


def _bits(figures: list[float | None]) -> list[bytes]:
    return [b"" if value is None else struct.pack("d", 100 * value) for value in figures]


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Darwin" else 1e3)
