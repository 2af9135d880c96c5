"""Does a score of 0.8 mean right in 8 of 10 cases? Detection expected calibration error (D-ECE).

Küppers et al., "Multivariate Confidence Calibration for Object Detection" (CVPR workshops 2020), confidence only:
detections with score ≥ 0.3 go into 20 bins of equal width; D-ECE = Σ_bins (n_bin / n) · |precision − mean score|. A
detection is right when it matches a ground-truth box of its class with IoU ≥ 0.5; each box is matched once, by the
detection with the highest score. Detections that only match a crowd are left out.
"""

from __future__ import annotations

import math

import numpy as np

from deploy.core.detection_table import DetectionTable
from deploy.validate.average_precision import matched_at_half
from deploy.validate.ground_truth import GroundTruth

MIN_SCORE, BINS = 0.3, 20


def detection_ece(truth: GroundTruth, table: DetectionTable) -> float:
    """D-ECE in 0..1 of finite detections of images and categories of `truth`; NaN without a score ≥ 0.3."""
    found = matched_at_half(truth, table, np.flatnonzero(table.scores.astype(np.float64) >= MIN_SCORE))
    scores, right = table.scores[found.rows].astype(np.float64), found.objects >= 0
    if not len(scores):
        return math.nan
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    error = 0.0
    for number in np.unique(bins):
        inside = bins == number
        error += inside.mean() * abs(right[inside].mean() - scores[inside].mean())
    return float(error)
