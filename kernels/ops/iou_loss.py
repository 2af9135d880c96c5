"""Losses of paired boxes: IoU, GIoU (Rezatofighi et al., CVPR 2019), DIoU and CIoU (Zheng et al., AAAI 2020).

    IoU  = overlap / max(union, eps)
    GIoU = IoU - (enclosing - union) / max(enclosing, eps)            with the area of the enclosing box
    DIoU = IoU - distance^2 / max(diagonal^2, eps)                    of the centres, and of the enclosing box
    CIoU = DIoU - alpha * v,  v = 4 / pi^2 * (atan(w_b / h_b) - atan(w_a / h_a))^2,  alpha = v / max(1 - IoU + v, eps)
    loss = 1 - the one chosen;  alpha is constant for the gradient

IoU and GIoU have the constants of mmdet's losses. DIoU and CIoU differ from torchvision's and mmdet's in how eps keeps
the divisions finite (there it is added), and CIoU in that sides shorter than 0 count as 0.

`iou_loss` is weighted and summed: a scalar whose gradient the forward pass can leave behind. On CUDA it is one kernel,
in Triton or in CUDA C++ (`csrc/iou_loss.cu`). The functions of rows are plain PyTorch everywhere.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.left_gradient import kept_like, register_backward

Kind = Literal["iou", "giou", "diou", "ciou"]


def iou_loss(
    boxes: Tensor, target: Tensor, weight: Tensor | None = None, *, kind: Kind = "giou", eps: float = 1e-6
) -> Tensor:
    """Weighted sum of the losses of paired boxes; divide it by the normaliser yourself.

    Args:
        boxes: float [..., 4] xyxy, any one unit; computed in float32.
        target: float [..., 4] xyxy in the same unit and dtype.
        weight: float [...], no gradient; None counts every pair once.
        kind: which IoU.
        eps: bound from below of every denominator, in squared units.

    Returns:
        Scalar float32; gradient reaches whichever of `boxes` and `target` requires it. On CUDA it cannot be
        differentiated twice (RuntimeError in backward).

    Raises:
        ValueError: the shapes or dtypes do not agree, or there is no such kind.
    """
    _check(boxes, target, kind)
    if boxes.dtype != target.dtype:
        raise ValueError(f"paired boxes differ in dtype: {boxes.dtype} and {target.dtype}")
    if weight is not None and weight.shape != boxes.shape[:-1]:
        raise ValueError(f"weight must be {list(boxes.shape[:-1])}, one a pair of boxes, got {list(weight.shape)}")
    chosen = backends.chosen(boxes, has_cuda=True)
    if chosen == "torch":
        return reference(boxes.float(), target.float(), None if weight is None else weight.float(), kind, eps)
    rows = None if weight is None else weight.detach().reshape(-1).contiguous()
    grad = torch.is_grad_enabled()
    return _iou_loss(
        boxes.reshape(-1, 4).contiguous(),
        target.reshape(-1, 4).contiguous(),
        rows,
        kind,
        eps,
        grad and boxes.requires_grad,
        grad and target.requires_grad,
        chosen,
    )[0]


def reference(
    boxes: Tensor, target: Tensor, weight: Tensor | None = None, kind: Kind = "giou", eps: float = 1e-6
) -> Tensor:
    """The specification, by autograd. Same arguments and result as `iou_loss`, in the dtype of the boxes."""
    rows = iou_loss_rows(boxes, target, kind=kind, eps=eps)
    return rows.sum() if weight is None else (rows * weight.detach()).sum()


def paired_iou(boxes_a: Tensor, boxes_b: Tensor, *, eps: float = 1e-6) -> Tensor:
    """IoU of box i of `boxes_a` [..., 4] with box i of `boxes_b` [..., 4] (xyxy, any one unit) → [...]."""
    _check(boxes_a, boxes_b, "iou")
    overlap, union, _, _ = _areas(boxes_a, boxes_b)
    return overlap / union.clamp(min=eps)


def giou_loss(boxes: Tensor, target: Tensor, *, eps: float = 1e-6) -> Tensor:
    """1 - GIoU of paired boxes: `iou_loss_rows` with kind `giou`."""
    return iou_loss_rows(boxes, target, kind="giou", eps=eps)


def iou_loss_rows(boxes: Tensor, target: Tensor, *, kind: Kind = "giou", eps: float = 1e-6) -> Tensor:
    """The loss of every pair, not weighted and not reduced.

    Args:
        boxes: float [..., 4] xyxy, any one unit (all kinds are free of scale up to `eps`).
        target: float [..., 4] xyxy in the same unit. Broadcast against `boxes` is not meant: equal shapes.
        kind, eps: as in `iou_loss`.

    Returns:
        float [...]: 0..1 for IoU, 0..2 for GIoU and DIoU, 0..3 for CIoU; gradient reaches whatever of the two requires
        it.

    Raises:
        ValueError: the shapes differ, or there is no such kind.
    """
    _check(boxes, target, kind)
    overlap, union, enclosing_w, enclosing_h = _areas(boxes, target)
    iou = overlap / union.clamp(min=eps)
    if kind == "iou":
        return 1 - iou
    if kind == "giou":
        enclosing = enclosing_w * enclosing_h
        return 1 - iou + (enclosing - union) / enclosing.clamp(min=eps)
    between_centres = (boxes[..., :2] + boxes[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    diagonal = enclosing_w.square() + enclosing_h.square()
    loss = 1 - iou + between_centres.square().sum(-1) / diagonal.clamp(min=eps)
    if kind == "diou":
        return loss
    v = 4 / math.pi**2 * (_aspect_angle(target) - _aspect_angle(boxes)).square()
    alpha = (v / (1 - iou + v).clamp(min=eps)).detach()
    return loss + alpha * v


def _check(boxes: Tensor, target: Tensor, kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if boxes.shape != target.shape:
        raise ValueError(f"paired boxes differ in shape: {list(boxes.shape)} and {list(target.shape)}")
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be [..., 4] xyxy, got {list(boxes.shape)}")


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overlap and union; width and height of the enclosing box. Each [...].

    relu, not clamp: its gradient at 0 is 0 in every version of PyTorch.
    """
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    overlap_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).relu()
    overlap_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).relu()
    overlap = overlap_w * overlap_h
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    enclosing_w = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).relu()
    enclosing_h = (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).relu()
    return overlap, union, enclosing_w, enclosing_h


def _aspect_angle(boxes: Tensor) -> Tensor:
    """atan(width / height) of sides clamped to 0, [...]; 0 for a point, without a gradient."""
    w, h = (boxes[..., 2:] - boxes[..., :2]).relu().unbind(-1)
    point = (w == 0) & (h == 0)
    return torch.atan2(w, torch.where(point, torch.ones_like(h), h)) * ~point


# --- registration ------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::iou_loss", mutates_args=())
def _iou_loss(
    boxes: Tensor,
    target: Tensor,
    weight: Tensor | None,
    kind: str,
    eps: float,
    boxes_grad: bool,
    target_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients to boxes and target ([N, 4] in `kept_dtype`, or empty where not wanted)."""
    if backend == "cuda":
        from kernels.ops.cuda import iou_loss as cuda_iou_loss

        return cuda_iou_loss(boxes, target, weight, kind, eps, boxes_grad, target_grad)
    from kernels.triton import iou_loss as kernel

    return kernel.iou_loss(boxes, target, weight, kind, eps, boxes_grad, target_grad)


@_iou_loss.register_fake
def _(boxes: Tensor, target: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, boxes_grad, target_grad, _ = settings
    return boxes.new_empty((), dtype=torch.float32), kept_like(boxes, boxes_grad), kept_like(target, target_grad)


register_backward(_iou_loss, {1: 0, 2: 1})
