"""Where to cut the scores of a detector: the score of the best F1 on labelled images.

F1 = 2·right / (kept + objects) of the detections that score at least as much, `right` of which have found an object.
They are matched as COCO does at an IoU of 0.5: best score first, each takes the free object of its class that it
overlaps most. Those that only match a crowd count neither for nor against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploy.core.card import OperatingPoint
from deploy.core.detection_table import DetectionTable
from deploy.validate.average_precision import matched_at_half
from deploy.validate.ground_truth import GroundTruth

SAMPLES = 101
"""Scores, and as many recalls, at which a drawn curve has a point."""
DECIMALS = 6
"""Most of a cut that is rounded."""


@dataclass(frozen=True)
class ScoreCurve:
    """How many detections score at least so much, and how many of them are right.

    scores: float [m], those that occur, highest first. kept, right: int64 [m]. objects: how many there are to find.
    """

    scores: np.ndarray
    kept: np.ndarray
    right: np.ndarray
    objects: int

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray, objects: int) -> ScoreCurve:
        """The curve of detections, in any order. scores: float [n]. right: bool [n]."""
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
        last = np.flatnonzero(np.append(scores[1:] < scores[:-1], [True] * min(1, len(scores))))
        return cls(scores[last], last + 1, np.cumsum(right[order], dtype=np.int64)[last], objects)

    @property
    def precision(self) -> np.ndarray:
        """float64 [m]."""
        return self.right / self.kept

    @property
    def recall(self) -> np.ndarray:
        """float64 [m]; 0 where there is no object."""
        return self.right / max(1, self.objects)

    @property
    def f1(self) -> np.ndarray:
        """float64 [m]."""
        return 2 * self.right / (self.kept + self.objects)

    def best(self) -> int | None:
        """The place of the highest F1, of equal ones that of the highest score; None where nothing is right."""
        return int(self.f1.argmax()) if len(self.right) and self.right[-1] else None

    def cut(self, place: int) -> float:
        """The score of a place, rounded down to as few decimals as keep the same detections, compared as float32 or
        as float64; itself where more than DECIMALS were needed."""
        score, below = float(self.scores[place]), -math.inf
        if place + 1 < len(self.scores):
            below = float(self.scores[place + 1])
        for decimals in range(2, DECIMALS + 1):
            value = math.floor(score * 10**decimals) / 10**decimals
            if all(below < kind(value) <= score for kind in (float, np.float32)):
                return value
        return score

    def samples(self) -> list[tuple[float, float, float]]:
        """Score, precision and recall at the best place and at some spread evenly over the scores and over the recall,
        highest score first: what a drawing needs of a curve, however long it is."""
        if not len(self.scores):
            return []
        recall, grid = self.recall, np.linspace(0, 1, SAMPLES)
        places = [np.searchsorted(-self.scores, -grid), np.searchsorted(recall, grid * recall[-1]), [self.best() or 0]]
        chosen = np.unique(np.minimum(np.concatenate(places).astype(np.int64), len(recall) - 1))
        columns = np.stack([self.scores[chosen].astype(np.float64), self.precision[chosen], recall[chosen]], 1)
        return [(score, precision, found) for score, precision, found in columns.round(4).tolist()]


@dataclass(frozen=True)
class ScoreCurves:
    """of_all: of all classes of a detector together. of_each: by its labels. images: that they were measured on."""

    of_all: ScoreCurve
    of_each: list[ScoreCurve]
    images: int

    def point(self) -> OperatingPoint | None:
        """The best cut; None where nothing is right, and for scores that do not lie in 0..1."""
        best, scores = self.of_all.best(), self.of_all.scores
        if best is None or scores[0] > 1 or scores[-1] < 0:
            return None
        places = [(curve, curve.best()) for curve in self.of_each]
        return OperatingPoint(
            score=self.of_all.cut(best),
            f1=float(self.of_all.f1[best]),
            precision=float(self.of_all.precision[best]),
            recall=float(self.of_all.recall[best]),
            class_scores=[None if place is None else curve.cut(place) for curve, place in places],
            images=self.images,
        )


def score_curves(truth: GroundTruth, table: DetectionTable, category_ids: Sequence[int]) -> ScoreCurves:
    """Match finite detections with the objects of the categories that a detector knows. category_ids: of its labels,
    all of them in `truth`, and all of the detections among them."""
    places = np.searchsorted(truth.category_ids, np.asarray(category_ids, np.int64))
    objects = np.bincount(truth.categories[truth.counts], minlength=len(truth.category_ids))
    found = matched_at_half(truth, table)
    scores, right = table.scores[found.rows], found.objects >= 0
    categories = np.searchsorted(truth.category_ids, table.category_ids[found.rows])
    order = np.argsort(categories, kind="stable")
    bounds = np.searchsorted(categories[order], np.arange(len(truth.category_ids) + 1))
    each = []
    for place in places.tolist():
        rows = order[bounds[place] : bounds[place + 1]]
        each.append(ScoreCurve.of(scores[rows], right[rows], int(objects[place])))
    return ScoreCurves(ScoreCurve.of(scores, right, int(objects[places].sum())), each, len(truth.image_ids))


def operating_point(truth: GroundTruth, table: DetectionTable, category_ids: Sequence[int]) -> OperatingPoint | None:
    """The cut of the best F1, of all classes together and of each. Arguments as of `score_curves`; None as there."""
    return score_curves(truth, table, category_ids).point()
