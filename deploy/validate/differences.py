"""Pictures on which two detectors differ most, whatever the scores: small models have few above any threshold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deploy.core.boxes import pairwise_iou
from deploy.core.detections import Detections

SHOWN = 5
"""Pictures that are named, at most."""
SAME_IOU = 0.5
"""Boxes of one class that overlap at least so much are taken for the same object."""


def difference(left: Detections, right: Detections) -> float:
    """Sum over the detections of both sides: the score of one that the other side does not have, and of one that it
    has, the difference in score and the part of the score that the overlap leaves. 0: equal detections."""
    iou = pairwise_iou(left.boxes, right.boxes)
    iou = np.where((iou >= SAME_IOU) & (left.labels[:, None] == right.labels[None]), iou, 0.0)
    total = 0.0
    for overlap, own, other in ((iou, left.scores, right.scores), (iou.T, right.scores, left.scores)):
        if not len(own):
            continue
        if not len(other):
            total += float(own.sum())
            continue
        # of those that overlap enough, the one that costs least
        score = own[:, None]
        cost = np.where(overlap > 0, np.abs(score - other[None]) + score * (1 - overlap), score)
        total += float(cost.min(1).sum())
    return total


def most_different(
    left: Mapping[int, Detections], right: Mapping[int, Detections], files: Mapping[int, Path]
) -> list[dict[str, int | str | float]]:
    """The pictures (by their ids) on which the two differ most, largest difference first: `id`, `file` and
    `difference`. Those on which they agree are left out."""
    apart = {image_id: difference(found, right[image_id]) for image_id, found in left.items()}
    order = sorted((image_id for image_id in apart if apart[image_id] > 0), key=lambda key: -apart[key])
    return [{"id": key, "file": files[key].name, "difference": round(apart[key], 3)} for key in order[:SHOWN]]


def in_words(pictures: list[dict[str, int | str | float]]) -> str:
    """Name the pictures in one line."""
    return ", ".join(f"{row['id']} ({row['file']})" for row in pictures)
