"""Score thresholds of a teacher: per class the threshold with the best F1 on labelled images.

A fixed threshold depends on how a teacher is calibrated; this one is measured. Detections are matched as COCO does at
an IoU of 0.5: best score first, each takes the free object that it overlaps most. Those inside a crowd region count
neither for nor against.
"""

from __future__ import annotations

import numpy as np

from compress.pseudo.merge import Boxes
from deploy.core.boxes import pairwise_iou

MATCH_IOU = 0.5
CROWD_SHARE = 0.5  # a detection with more of its area than this in a crowd region is not counted


class F1Thresholds:
    """Collects matches image by image; memory grows with the detections, so it is made for a validation split."""

    def __init__(self, num_classes: int) -> None:
        self._objects = np.zeros(num_classes, np.int64)
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._hits: list[np.ndarray] = []

    def add(self, found: Boxes, truth: Boxes, crowd: np.ndarray) -> None:
        """Take in one image. found: best score first, as `merge` gives it. crowd: bool, one for each box of `truth`."""
        hits = np.zeros(len(found), np.bool_)
        counted = np.ones(len(found), np.bool_)
        for label in np.unique(found.labels):
            of_label = np.flatnonzero(found.labels == label)
            boxes = found.boxes[of_label]
            overlaps = pairwise_iou(boxes, truth.boxes[(truth.labels == label) & ~crowd])
            for row, index in enumerate(of_label):
                best = int(overlaps[row].argmax()) if overlaps.shape[1] else 0
                if overlaps.shape[1] and overlaps[row, best] >= MATCH_IOU:
                    hits[index] = True
                    overlaps[:, best] = -1  # taken
            inside = share_inside(boxes, truth.boxes[(truth.labels == label) & crowd]).max(1, initial=0)
            counted[of_label] = hits[of_label] | (inside <= CROWD_SHARE)
        self._objects += np.bincount(truth.labels[~crowd], minlength=len(self._objects))
        self._scores.append(found.scores[counted])
        self._labels.append(found.labels[counted])
        self._hits.append(hits[counted])

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Per class the threshold with the highest F1, and that F1: float64 [K] each.

        Both NaN for a class of which no object was found or none is labelled. Of thresholds that are equally good the
        highest is taken.
        """
        K = len(self._objects)
        tau, f1 = np.full(K, np.nan), np.full(K, np.nan)
        scores = np.concatenate([np.empty(0), *self._scores])
        labels = np.concatenate([np.empty(0, np.int64), *self._labels])
        hits = np.concatenate([np.empty(0, np.bool_), *self._hits])
        order = np.argsort(-scores, kind="stable")
        scores, labels, hits = scores[order], labels[order], hits[order]
        for label in range(K):
            of_label = labels == label
            if not hits[of_label].any():
                continue
            values = scores[of_label]
            last = np.append(values[1:] < values[:-1], True)  # of a run of equal scores all are in or none
            found = np.arange(1, len(values) + 1)
            curve = np.where(last, 2 * np.cumsum(hits[of_label]) / (found + self._objects[label]), -1)
            tau[label], f1[label] = values[curve.argmax()], curve.max()
        return tau, f1


def share_inside(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Share of the area of boxes [n, 4] that lies in each of regions [m, 4], both xyxy → [n, m]."""
    size = np.minimum(boxes[:, None, 2:], regions[None, :, 2:]) - np.maximum(boxes[:, None, :2], regions[None, :, :2])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]
    overlap = size.clip(min=0).prod(-1)
    return np.divide(overlap, area, out=np.zeros_like(overlap), where=area > 0)
