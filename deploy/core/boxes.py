"""Overlap of boxes in NumPy: the intersection over union that everything outside of torch computes with.

Boxes are xyxy [..., 4]; arguments broadcast against each other.
"""

from __future__ import annotations

import numpy as np


def iou(a: np.ndarray, b: np.ndarray, *, empty: float = 0.0) -> np.ndarray:
    """IoU [...] of boxes beside each other; `empty` where the union has no area."""
    both = intersection(a, b)
    return share(both, area(a) + area(b) - both, empty=empty)


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes [n, 4] with boxes [m, 4] → [n, m]; 0 where neither box has an area."""
    return iou(a[:, None], b[None])


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area [...] that boxes beside each other have in common."""
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return np.clip(high - low, 0, None).prod(-1)


def area(boxes: np.ndarray) -> np.ndarray:
    """Width times height [...]."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def share(part: np.ndarray, whole: np.ndarray, *, empty: float = 0.0) -> np.ndarray:
    """part / whole, and `empty` where `whole` is not above 0."""
    return np.divide(part, whole, out=np.full_like(part, empty), where=whole > 0)


def xyxy(boxes: np.ndarray) -> np.ndarray:
    """Corners of boxes [..., 4] that are given as x, y, width, height, as COCO has them."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)
