"""Do two detectors say the same, whether they are right or wrong?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploy.core.boxes import pairwise_iou
from deploy.core.detections import Detections

AGREEMENT_SCORE = 0.3
AGREEMENT_SLACK = 0.05
AGREEMENT_IOU = 0.9


@dataclass(frozen=True)
class Agreement:
    """Agreement of two detectors, whether they are right or wrong.

    A detection with score ≥ 0.3 is *confirmed* when the other side has one of the same class with IoU ≥ 0.9
    and score ≥ 0.25 (the slack keeps a score at the border from counting as a disagreement); one to one,
    best IoU first.
    """

    share: float
    """Confirmed detections of both sides over all detections of both sides with score ≥ 0.3, in 0..1."""
    detections: int
    """Detections of both sides with score ≥ 0.3."""
    mean_score_difference: float
    """Mean |Δ score| of the matched pairs; NaN without pairs."""
    mean_box_difference_px: float
    """Mean over the matched pairs of the largest of the four coordinate differences; NaN without pairs."""


def agreement_of(left: Mapping[int, Detections], right: Mapping[int, Detections]) -> Agreement:
    """Of the detections of the same images, by their ids."""
    confirmed = total = 0
    scores: list[float] = []
    boxes: list[float] = []
    for image_id, a in left.items():
        b = right[image_id]
        total += int((a.scores >= AGREEMENT_SCORE).sum() + (b.scores >= AGREEMENT_SCORE).sum())
        for i, j in _pairs(a, b):
            pair = (float(a.scores[i]), float(b.scores[j]))
            confirmed += sum(score >= AGREEMENT_SCORE for score in pair)
            scores.append(abs(pair[0] - pair[1]))
            boxes.append(float(np.abs(a.boxes[i] - b.boxes[j]).max()))
    return Agreement(
        share=confirmed / total if total else math.nan,
        detections=total,
        mean_score_difference=float(np.mean(scores)) if scores else math.nan,
        mean_box_difference_px=float(np.mean(boxes)) if boxes else math.nan,
    )


# --- details --------------------------------------------------------------------------------------------


def _pairs(a: Detections, b: Detections) -> list[tuple[int, int]]:
    """One-to-one pairs of one class with IoU ≥ 0.9, at least one side ≥ 0.3 and both ≥ 0.25; best IoU
    first."""
    rows = np.flatnonzero(a.scores >= AGREEMENT_SCORE - AGREEMENT_SLACK)
    columns = np.flatnonzero(b.scores >= AGREEMENT_SCORE - AGREEMENT_SLACK)
    iou = pairwise_iou(a.boxes[rows], b.boxes[columns])
    possible = (iou >= AGREEMENT_IOU) & (a.labels[rows][:, None] == b.labels[columns][None])
    possible &= np.maximum(a.scores[rows][:, None], b.scores[columns][None]) >= AGREEMENT_SCORE
    pairs: list[tuple[int, int]] = []
    used_a, used_b = set(), set()
    for flat in np.argsort(-iou, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(columns))
        if possible[i, j] and i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            pairs.append((int(rows[i]), int(columns[j])))
    return pairs
