"""COCO's mAP by the shape of the objects: wide, square and tall ones, as COCO has it by their area.

Of a shape only its objects count. A detection that has found an object of another shape counts neither for nor against,
and one that has found none counts only if it has the shape itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deploy.core.detection_table import DetectionTable
from deploy.validate.average_precision import curve, ranked
from deploy.validate.coco import DETECTIONS
from deploy.validate.ground_truth import GroundTruth

SHAPES = {"wide": (1.5, math.inf), "square": (1 / 1.5, 1.5), "tall": (0.0, 1 / 1.5)}
"""Width over height, both ends included."""


@dataclass(frozen=True)
class Shape:
    """mAP in percent on the objects of a shape; NaN without one."""

    name: str
    objects: int
    map: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types: NaN becomes None."""
        return {"name": self.name, "objects": self.objects, "map": None if math.isnan(self.map) else self.map}


def map_by_shape(truth: GroundTruth, table: DetectionTable) -> list[Shape]:
    """Of finite detections of images and categories of `truth`."""
    return [_of_shape(truth, table, name, *limits) for name, limits in SHAPES.items()]


# --- details --------------------------------------------------------------------------------------------


def _of_shape(truth: GroundTruth, table: DetectionTable, name: str, low: float, high: float) -> Shape:
    inside = _inside(truth.boxes, low, high)
    only = replace(truth, areas=np.where(inside, truth.areas, -1.0))  # an area that is none does not count
    found = ranked(only, table, DETECTIONS)
    objects = np.bincount(truth.categories[only.counts], minlength=len(truth.category_ids))
    bounds = np.searchsorted(found.classes, np.arange(len(objects) + 1))
    classes = np.flatnonzero(objects)
    aps = []
    for k in classes:
        rows = slice(bounds[k], bounds[k + 1])  # a class at a time: of all it would be most of the memory
        of_shape = _inside(table.xywh(found.rows[rows]), low, high)
        counted = found.counted[rows] & (found.hit[rows] | of_shape[:, None])
        aps.append(curve(found.hit[rows], counted, int(objects[k]))[0].mean())
    return Shape(name, int(objects.sum()), float(np.mean(aps) * 100) if aps else math.nan)


def _inside(boxes: np.ndarray, low: float, high: float) -> np.ndarray:
    """Tell which boxes xywh have the shape: bool [n]. One without a height is infinitely wide."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = boxes[:, 2] / boxes[:, 3]
    inside: np.ndarray = (ratio >= low) & (ratio <= high)
    return inside
