"""The same curves by pycocotools itself, a class at a time. Slow, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from deploy.core.detection_table import DetectionTable
from deploy.validate.average_precision import FEW, Curves
from deploy.validate.ground_truth import GroundTruth


def reference_curves(truth: GroundTruth, table: DetectionTable, limits: Sequence[int]) -> Curves:
    """As `average_precision.curves`. Memory grows with the rows of the largest class."""
    found = Curves.empty(len(truth.category_ids), len(limits))
    classes = np.searchsorted(truth.category_ids, table.category_ids)
    images = np.searchsorted(truth.image_ids, table.image_ids)
    for k in np.unique(truth.categories):
        objects, rows = np.flatnonzero(truth.categories == k), np.flatnonzero(classes == k)
        labelled = _Entries(
            {
                "image_id": truth.images[objects],
                "bbox": truth.boxes[objects],
                "area": truth.areas[objects],
                "iscrowd": truth.crowd[objects],
            }
        )
        boxes = table.xywh(rows)
        detected = _Entries(
            {
                "image_id": images[rows],
                "bbox": boxes,
                "area": boxes[:, 2] * boxes[:, 3],
                "score": table.scores[rows],
            }
        )
        evaluation = _Silent(iouType="bbox")
        evaluation.cocoGt, evaluation.cocoDt = labelled, detected
        evaluation.params.catIds = [0]
        evaluation.params.imgIds = np.union1d(truth.images[objects], images[rows]).tolist()
        evaluation.params.maxDets = [*FEW, *limits]
        evaluation.evaluate()
        evaluation.accumulate()
        found.precision[:, :, k] = evaluation.eval["precision"][:, :, 0, :, len(FEW) :]
        found.recall[:, k] = evaluation.eval["recall"][:, 0, :, len(FEW) :]
        found.recall_of_few[:, k] = evaluation.eval["recall"][:, 0, 0, : len(FEW)]
    return found


class _Entries:
    """What pycocotools asks of its `COCO` objects, of one class. Ids start from 1, because it stores the matched id and
    reads 0 as "not matched"."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        lists = [column.tolist() for column in columns.values()]
        self._entries = [
            {"id": number, "category_id": 0, **dict(zip(columns, values, strict=True))}
            for number, values in enumerate(zip(*lists, strict=True), start=1)
        ]

    def getAnnIds(self, **_: Any) -> range:
        return range(len(self._entries))

    def loadAnns(self, numbers: range) -> list[dict[str, Any]]:
        return [self._entries[number] for number in numbers]


def _silenced(method: Callable[..., None]) -> Callable[..., None]:
    """The same function, to which `print` means nothing. Another thread may print meanwhile."""
    assert isinstance(method, FunctionType)
    names = {**method.__globals__, "print": lambda *_, **__: None}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


class _Silent(COCOeval):
    evaluate = _silenced(COCOeval.evaluate)
    accumulate = _silenced(COCOeval.accumulate)
