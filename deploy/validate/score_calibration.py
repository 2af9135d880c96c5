"""Does a score of 0.8 mean right in 8 of 10 cases? Detection expected calibration error (D-ECE).

Küppers et al., "Multivariate Confidence Calibration for Object Detection" (CVPR workshops 2020), confidence only:
detections with score ≥ 0.3 go into 20 bins of equal width; D-ECE = Σ_bins (n_bin / n) · |precision − mean score|. A
detection is right when it matches a ground-truth box of its class with IoU ≥ 0.5; each box is matched once, by the
detection with the highest score. Detections that only match a crowd are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploy.core.boxes import intersection, share, xyxy

MIN_SCORE, MIN_IOU, BINS = 0.3, 0.5, 20


def detection_ece(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> float:
    """D-ECE in 0..1 of COCO result rows against parsed COCO annotations; NaN without a detection of score ≥ 0.3."""
    scores, right = matches(truth, results)
    if not len(scores):
        return math.nan
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    error = 0.0
    for number in np.unique(bins):
        inside = bins == number
        error += inside.mean() * abs(right[inside].mean() - scores[inside].mean())
    return float(error)


def matches(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n] of the detections that count, and whether each is right, bool [n]."""
    boxes: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in truth["annotations"]:
        boxes[row["image_id"], row["category_id"]].append(row)
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in results:
        if row["score"] >= MIN_SCORE:
            found[row["image_id"], row["category_id"]].append(row)
    scores: list[float] = []
    right: list[bool] = []
    for key, rows in found.items():
        objects = [row["bbox"] for row in boxes[key] if not row.get("iscrowd")]
        crowds = [row["bbox"] for row in boxes[key] if row.get("iscrowd")]
        free = np.ones(len(objects), dtype=bool)
        for row in sorted(rows, key=lambda row: -row["score"]):
            overlap = _overlap(row["bbox"], objects) * free
            hit = bool(len(objects)) and overlap.max() >= MIN_IOU
            if hit:
                free[int(overlap.argmax())] = False
            elif crowds and _overlap(row["bbox"], crowds, of_first=True).max() >= MIN_IOU:
                continue
            scores.append(row["score"])
            right.append(hit)
    return np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)


def _overlap(box: Sequence[float], others: Sequence[Sequence[float]], *, of_first: bool = False) -> np.ndarray:
    """IoU [n] of one box xywh with n others; `of_first`: the share of the box instead, as COCO treats crowds."""
    if not others:
        return np.zeros(0)
    a, b = np.asarray(box, dtype=np.float64), np.asarray(others, dtype=np.float64)
    both = intersection(xyxy(a), xyxy(b))
    return share(both, a[2:].prod() if of_first else a[2:].prod() + b[:, 2:].prod(-1) - both)
