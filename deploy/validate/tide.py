"""Which kinds of errors cost how much AP: TIDE.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020), with the order of kinds and
the corrections of its code (tidecv 1.0.1). At an IoU of 0.5 every detection that counts and is wrong is of one kind, by
its best IoU s with an object of its class, found or not, and o with one of another class in its picture:

    localization     0.1 ≤ s < 0.5
    classification   else o ≥ 0.5
    duplicate        else s ≥ 0.5: a better scoring detection has found that object
    background       else s, o < 0.1
    both             else: another class, and 0.1 ≤ o < 0.5

and `missed` is an object that no detection has found, and that no detection of the first two kinds is about. What a
kind costs is how far AP50 rises when it alone is mended: of the first two kinds the best scoring detection of each
object that is not found becomes right, all other wrong ones of the kind vanish, missed objects do not count. The costs
do not add up. `false positives` mends all wrong detections, `false negatives` all objects that are not found.
Differs: as in COCO's AP50, 100 detections of a class in an image count (tidecv: of an image), and a class without an
object is in no mean (tidecv: with 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.core.detection_table import DetectionTable
from deploy.validate.average_precision import ROWS, Matched, curve, matched_at_half, overlaps
from deploy.validate.ground_truth import GroundTruth

RIGHT, NEAR = 0.5, 0.1
"""IoU of a detection that is right, and of one that is about an object at all."""

KINDS = {
    "localization": "right class, box too far off (IoU 0.1 to 0.5)",
    "classification": "right box (IoU 0.5 or more), wrong class",
    "both": "wrong class and box too far off",
    "duplicate": "a second detection of an object",
    "background": "nothing there (IoU below 0.1 with all objects)",
    "missed": "an object that no detection is about",
}
"""Kinds of errors and what they are."""
ALL_WRONG, ALL_MISSED = "false positives", "false negatives"
SUMS = {ALL_WRONG: "all wrong detections together", ALL_MISSED: "all objects that are not found"}

_WRONG = ("localization", "classification", "duplicate", "background", "both")
"""Kinds of wrong detections, in the order in which they are asked."""
_MENDED = 2  # the first two can become right


@dataclass(frozen=True)
class Error:
    """points: of AP50 that mending it gains. count: detections or objects."""

    points: float
    count: int


@dataclass(frozen=True)
class TideErrors:
    """map50: AP50 in percent, as COCO's. errors: by the names in KINDS and SUMS."""

    map50: float
    errors: dict[str, Error]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {name: {"points": error.points, "count": error.count} for name, error in self.errors.items()}

    def in_words(self) -> str:
        """Name what costs points, most first."""
        kinds = sorted(KINDS, key=lambda name: -self.errors[name].points)
        said = [f"{name} {self.errors[name].points:.1f}" for name in kinds if self.errors[name].points >= 0.05]
        return ", ".join(said) or "nothing"


def tide_errors(truth: GroundTruth, table: DetectionTable, limit: int) -> TideErrors | None:
    """Errors of finite detections of images and categories of `truth`; None without an object that counts. limit:
    detections of a class in an image that count."""
    found = matched_at_half(truth, table, limit=limit)
    ranking = _Ranking(truth, table, found)
    if not ranking.objects.any():
        return None
    kinds, targets = _explained(truth, table, found)
    taken = np.zeros(len(truth.boxes), bool)
    taken[found.objects[found.objects >= 0]] = True
    best = _best_of_each(ranking, kinds, targets, taken)

    right = found.objects >= 0
    base = ranking.ap50(right, np.ones(len(right), bool), ranking.classes, ranking.objects)
    missed = truth.counts & ~taken
    about = np.zeros(len(truth.boxes), bool)
    about[targets[kinds < _MENDED]] = True
    errors = {}
    for kind, name in enumerate(_WRONG):
        of_kind = kinds == kind
        mended = of_kind & best
        classes = np.where(mended, truth.categories[targets], ranking.classes)
        ap50 = ranking.ap50(right | mended, ~of_kind | mended, classes, ranking.objects)
        errors[name] = Error(ap50 - base, int(of_kind.sum()))
    everything = np.ones(len(right), bool)
    for name, gone in (("missed", missed & ~about), (ALL_MISSED, missed)):
        left = ranking.objects - np.bincount(truth.categories[gone], minlength=len(ranking.objects))
        errors[name] = Error(ranking.ap50(right, everything, ranking.classes, left) - base, int(gone.sum()))
    errors[ALL_WRONG] = Error(ranking.ap50(right, right, ranking.classes, ranking.objects) - base, int((~right).sum()))
    return TideErrors(base, {name: errors[name] for name in (*KINDS, *SUMS)})


# --- details --------------------------------------------------------------------------------------------


class _Ranking:
    """Detections that count, in the order of `Matched`. classes: places in the categories [n]. order: best first.
    objects: that count, by class [k]."""

    def __init__(self, truth: GroundTruth, table: DetectionTable, found: Matched) -> None:
        self.classes = np.searchsorted(truth.category_ids, table.category_ids[found.rows]).astype(np.int32)
        order = np.lexsort((found.rows, table.image_ids[found.rows], -table.scores[found.rows]))
        self.order = order.astype(found.rows.dtype)
        self.objects = np.bincount(truth.categories[truth.counts], minlength=len(truth.category_ids))

    def ap50(self, right: np.ndarray, kept: np.ndarray, classes: np.ndarray, objects: np.ndarray) -> float:
        """AP50 in percent over the classes that have objects: 0 of one of which none is left."""
        order = self.order[kept[self.order]]
        order = order[np.argsort(classes[order], kind="stable")]
        bounds = np.searchsorted(classes[order], np.arange(len(objects) + 1))
        precision = np.zeros((101, len(objects)))
        for k in np.flatnonzero(objects > 0):
            hits = right[order[bounds[k] : bounds[k + 1]]]
            precision[:, k] = curve(hits[:, None], np.ones((len(hits), 1), bool), int(objects[k]))[0][0]
        return float(precision[:, self.objects > 0].mean() * 100)


def _explained(truth: GroundTruth, table: DetectionTable, found: Matched) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each detection, a place in _WRONG, and the object that it is about; right ones have len(_WRONG)."""
    kinds = np.full(len(found.rows), len(_WRONG), np.int8)
    targets = np.zeros(len(found.rows), np.int32)
    counted = np.flatnonzero(truth.counts)
    counted = counted[np.argsort(truth.images[counted], kind="stable")]
    images, boxes = truth.images[counted], truth.boxes[counted]
    wrong = np.flatnonzero(found.objects < 0)
    for start in range(0, len(wrong), ROWS):
        here = wrong[start : start + ROWS]
        rows = found.rows[here]
        image = np.searchsorted(truth.image_ids, table.image_ids[rows])
        first = np.searchsorted(images, image)
        count = np.searchsorted(images, image, side="right") - first
        pairs = overlaps(table.xywh(rows), boxes, np.zeros(len(boxes), bool), first, count, NEAR)
        classes = np.searchsorted(truth.category_ids, table.category_ids[rows])
        own, own_object, other, other_object = _best_overlaps(pairs, classes, truth.categories[counted])
        kinds[here] = np.select(
            [(own >= NEAR) & (own < RIGHT), other >= RIGHT, own >= RIGHT, np.maximum(own, other) < NEAR],
            range(len(_WRONG) - 1),
            len(_WRONG) - 1,
        )
        if len(counted):
            targets[here] = counted[np.where(kinds[here] == 1, other_object, own_object)]
    return kinds, targets


def _best_overlaps(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray], classes: np.ndarray, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Best IoU of each row with an object of its class, that object, and both for other classes; 0 without one."""
    row, item, iou = pairs
    same = kinds[item] == classes[row]
    found = []
    for chosen in (same, ~same):
        best, place = np.zeros(len(classes)), np.zeros(len(classes), np.int64)
        best[row[chosen]], place[row[chosen]] = iou[chosen], item[chosen]  # pairs ascend: the last one stays
        found += [best, place]
    return found[0], found[1], found[2], found[3]


def _best_of_each(ranking: _Ranking, kinds: np.ndarray, targets: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Tell which detections become right, bool [n]: of each object that is not found, the best scoring that is about
    it."""
    order = ranking.order[kinds[ranking.order] < _MENDED]
    order = order[~taken[targets[order]]]
    best = np.zeros(len(kinds), bool)
    best[order[np.unique(targets[order], return_index=True)[1]]] = True
    return best
