"""Generalised IoU of paired boxes (Rezatofighi et al., CVPR 2019), with the constants of mmdet's loss.

IoU = overlap / max(union, eps);   GIoU = IoU - (enclosing - union) / max(enclosing, eps);   loss = 1 - GIoU
"""

from __future__ import annotations

import torch
from torch import Tensor


def paired_iou(boxes_a: Tensor, boxes_b: Tensor, *, eps: float = 1e-6) -> Tensor:
    """IoU of box i of `boxes_a` [..., 4] with box i of `boxes_b` [..., 4] (xyxy, any one unit) → [...]."""
    overlap, union, _ = _areas(boxes_a, boxes_b)
    return overlap / union.clamp(min=eps)


def giou_loss(boxes: Tensor, target: Tensor, *, eps: float = 1e-6) -> Tensor:
    """1 - GIoU of paired boxes, one row a pair, not weighted and not reduced.

    Args:
        boxes: float [..., 4] xyxy, any one unit (GIoU is free of scale up to `eps`).
        target: float [..., 4] xyxy in the same unit. Broadcast against `boxes` is not meant: equal shapes.

    Returns:
        float [...] in 0..2; gradient reaches whatever of the two requires it.

    Raises:
        ValueError: the shapes differ.
    """
    overlap, union, enclosing = _areas(boxes, target)
    iou = overlap / union.clamp(min=eps)
    return 1 - iou + (enclosing - union) / enclosing.clamp(min=eps)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap, union and enclosing area, each [...]."""
    if a.shape != b.shape:
        raise ValueError(f"paired boxes differ in shape: {list(a.shape)} and {list(b.shape)}")
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    overlap_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = overlap_w * overlap_h
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    enclosing_w = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    enclosing_h = (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    return overlap, union, enclosing_w * enclosing_h
