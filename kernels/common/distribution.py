"""Box sides as distributions over bins (GFL, Li et al. 2020, section 3.2): integral, decoding, encoding, DFL.

A side's distance is the expectation of softmax(logits) over the bins 0..reg_max, in units of the stride.
Shape letters: P rows, R = reg_max + 1 bins, M locations of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def integral(logits: Tensor, *, dim: int = -1) -> Tensor:
    """Expected bin: logits [..., R, ...] with R at `dim` → distances without that dimension, in bins."""
    bins = torch.arange(logits.shape[dim], dtype=logits.dtype, device=logits.device)
    shape = [1] * logits.dim()
    shape[dim] = -1
    return (logits.softmax(dim) * bins.view(shape)).sum(dim)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """points [..., 2] (x, y) and distances [..., 4] (left, top, right, bottom), one unit → xyxy [..., 4]."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def boxes_to_distances(points: Tensor, boxes: Tensor, *, limit: float) -> Tensor:
    """Inverse of `distances_to_boxes`, clamped to [0, limit]; GFL's limit is reg_max - 0.1."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), -1).clamp(0, limit)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Distribution focal loss, one row a side, not reduced: cross entropy with the two bins around the target.

    Args:
        logits: float [P, R].
        target: float [P] in [0, R - 1), in bins; no gradient.

    Returns:
        float [P]: (r - y) * CE(logits, l) + (y - l) * CE(logits, r) with l = floor(y), r = l + 1.
    """
    low = target.long()
    log_p = F.log_softmax(logits, dim=-1)
    pair = log_p.gather(-1, torch.stack((low, low + 1), -1))  # [P, 2]
    fraction = target - low
    return -(pair[..., 0] * (1 - fraction) + pair[..., 1] * fraction)
