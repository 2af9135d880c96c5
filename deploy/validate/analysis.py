"""What an mAP does not say: which errors cost it (TIDE), which classes are confused, and AP on parts of the images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deploy.core.detection_table import DetectionTable
from deploy.validate.average_precision import curves, matched_at_half
from deploy.validate.coco import DETECTIONS, percent
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.shapes import Shape, map_by_shape
from deploy.validate.tide import TideErrors, tide_errors

CONFUSED_SCORE = 0.3
"""Detections of at least this score are counted as confused where no operating point was measured."""
CROWDED = ((0, 4), (5, 14), (15, None))
"""Images are sliced by the number of their objects, crowds aside."""


@dataclass(frozen=True)
class Slice:
    """mAP in percent on some images: NaN without an object."""

    name: str
    images: int
    map: float


@dataclass(frozen=True)
class Analysis:
    """errors: of TIDE; None without an object. slices: mAP on some of the images.
    confusion: class of the object, class of the detection and how often, most frequent first, right ones included.
        None stands for no object and for no detection. Of detections with a score of at least `confusion_score`.
    shapes: mAP on wide, square and tall objects.
    curve: (score, precision, recall) of keeping what scores at least so much, as `ScoreCurve.samples` gives it."""

    errors: TideErrors | None
    slices: list[Slice]
    confusion: list[tuple[str | None, str | None, int]]
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    confusion_score: float = CONFUSED_SCORE
    shapes: list[Shape] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: NaN becomes None."""
        slices = [
            {"name": part.name, "images": part.images, "map": None if math.isnan(part.map) else part.map}
            for part in self.slices
        ]
        errors = None if self.errors is None else self.errors.to_dict()
        lists = {"confusion": [list(row) for row in self.confusion], "curve": [list(row) for row in self.curve]}
        shapes = [shape.to_dict() for shape in self.shapes]
        score = {"confusion_score": self.confusion_score}
        return {"errors": errors, "slices": slices, "shapes": shapes, **lists, **score}


def analyse(
    truth: GroundTruth, table: DetectionTable, slices: Mapping[str, np.ndarray], score: float = CONFUSED_SCORE
) -> Analysis:
    """Look at finite detections of images and categories of `truth`. slices: by name, which of its images: bool [i].
    score: from which detections are shown, and confused with others."""
    return Analysis(
        tide_errors(truth, table, DETECTIONS),
        [_on_slice(truth, table, name, chosen) for name, chosen in slices.items()],
        confusion(truth, table, score),
        confusion_score=score,
        shapes=map_by_shape(truth, table),
    )


def image_slices(truth: GroundTruth, images: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Slices by the number of objects in an image, and by key `slice` of entries of a COCO document, where it is text.
    Those without an image are left out."""
    objects = np.bincount(truth.images[~truth.crowd], minlength=len(truth.image_ids))
    found = {}
    for low, high in CROWDED:
        name = f"{low} or more objects" if high is None else f"{low} to {high} objects"
        found[name] = (objects >= low) & (objects <= (math.inf if high is None else high))
    named = {row["id"]: row["slice"] for row in images if isinstance(row.get("slice"), str)}
    of_image = np.array([named.get(number) for number in truth.image_ids.tolist()], object)
    for name in sorted(set(named.values())):
        found[name] = of_image == name
    return {name: chosen for name, chosen in found.items() if chosen.any()}


def confusion(
    truth: GroundTruth, table: DetectionTable, score: float = CONFUSED_SCORE
) -> list[tuple[str | None, str | None, int]]:
    """Count pairs of an object and a detection, whatever their classes, as `Analysis` holds them: detections of at
    least this score, best first, take the free object of the largest IoU ≥ 0.5 in their image. Those that only match a
    crowd are left out."""
    blind = replace(truth, category_ids=np.zeros(1, np.int64), categories=np.zeros_like(truth.categories))
    shown = np.flatnonzero(table.scores.astype(np.float64) >= score)
    one_class = replace(table, category_ids=np.broadcast_to(np.int64(0), len(table)))
    found = matched_at_half(blind, one_class, shown)
    nothing = len(truth.category_ids)
    classes = np.searchsorted(truth.category_ids, table.category_ids[found.rows])
    objects = np.append(truth.categories, nothing)[found.objects]  # -1 is the last
    free = truth.counts.copy()
    free[found.objects[found.objects >= 0]] = False
    pairs = np.concatenate([objects, truth.categories[free]]), np.concatenate([classes, np.full(free.sum(), nothing)])
    codes, counts = np.unique(pairs[0] * (nothing + 1) + pairs[1], return_counts=True)
    names = [*truth.names, None]
    order = np.argsort(-counts, kind="stable")
    return [(names[codes[n] // (nothing + 1)], names[codes[n] % (nothing + 1)], int(counts[n])) for n in order]


# --- details --------------------------------------------------------------------------------------------


def _on_slice(truth: GroundTruth, table: DetectionTable, name: str, chosen: np.ndarray) -> Slice:
    rows = chosen[np.searchsorted(truth.image_ids, table.image_ids)]
    found = curves(truth.of_images(chosen), table, [DETECTIONS], np.flatnonzero(rows).astype(np.int32))
    return Slice(name, int(chosen.sum()), percent(found.precision[:, :, :, 0]))
