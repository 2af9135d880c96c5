"""IoU losses of boxes whose sides are distributions over bins (GFL, Li et al. 2020), from logits to loss in one pass.

    d_side = sum_j j * softmax(logits_side)_j,  box = (x - d_left, y - d_top, x + d_right, y + d_bottom)
    L = sum_i w_i * (1 - IoU(box_i, other_i))

of any kind of `kernels.ops.iou_loss`, in units of the stride. The other box is the ground truth of a positive location
(GFL's box loss), or what a teacher predicts at the same location (BCKD's localisation term, Yang et al., ICCV 2023,
section 3.3). Softmax, integral, decoding and IoU of both sides, and the gradient by the student's logits, are one
Triton kernel on CUDA: both logits are read once from memory and the gradient is written once. IoU does not depend on
the point that both boxes share, so the kernel leaves it out; the PyTorch path of the dense form does the same.

Shape letters: B images, P positives, M locations of a level, R = reg_max + 1 bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.distribution import distances_to_boxes, integral
from kernels.common.left_gradient import kept_like, register_backward
from kernels.common.logits import dense, same_layout
from kernels.ops.iou_loss import Kind, iou_loss_rows, paired_iou


def distribution_iou_loss(
    logits: Tensor, points: Tensor, boxes: Tensor, weight: Tensor, *, kind: Kind = "giou", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses of predicted boxes against ground truth, and their IoU.

    Args:
        logits: float [P, 4, R], sides left, top, right, bottom; computed in float32.
        points: float [P, 2], x and y of the locations in units of the stride.
        boxes: float [P, 4] xyxy, ground truth in units of the stride; no gradient.
        weight: float [P]; no gradient.
        kind: which IoU the loss is of, see `kernels.ops.iou_loss`.
        eps: bound from below of every denominator of it.

    Returns:
        Scalar float32 loss (gradient reaches `logits` only), and the plain IoU as float32 [P] without gradient: the
        quality that `quality_focal_loss` wants.

    Raises:
        ValueError: the shapes do not agree.
    """
    if logits.dim() != 3 or logits.shape[1] != 4:
        raise ValueError(f"logits must be [P, 4, R], got {list(logits.shape)}")
    P, _, R = logits.shape
    if points.shape != (P, 2) or boxes.shape != (P, 4) or weight.shape != (P,):
        raise ValueError(
            f"for logits {list(logits.shape)} points must be {[P, 2]}, boxes {[P, 4]} and weight {[P]}; got "
            f"{list(points.shape)}, {list(boxes.shape)} and {list(weight.shape)}"
        )
    if backends.chosen(logits) == "triton":
        rows = logits.reshape(1, P, 4 * R).contiguous().transpose(1, 2)  # [1, 4 * R, P], channels inside
        truth = boxes.detach().contiguous(), points.detach().contiguous()
        loss, iou = _call(rows, *truth, weight[None], kind, eps)
        return loss, iou[0]
    return reference(logits.float(), points.float(), boxes.float(), weight.float(), kind, eps)


def distribution_iou_kd_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, *, kind: Kind = "giou", eps: float = 1e-6
) -> Tensor:
    """Weighted sum of the losses of the student's boxes against the teacher's at the same locations.

    Args:
        student: float [B, 4 * R, M], channel side * R + bin; channels or M inside; computed in float32.
        teacher: float [B, 4 * R, M]; no gradient.
        weight: float [B, M]; no gradient.
        kind, eps: as in `distribution_iou_loss`.

    Returns:
        Scalar float32; gradient reaches `student` only.

    Raises:
        ValueError: the shapes do not agree.
    """
    if student.dim() != 3 or student.shape[1] % 4:
        raise ValueError(f"student must be [B, 4 * R, M], got {list(student.shape)}")
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} logits differ in shape")
    if weight.shape != (student.shape[0], student.shape[2]):
        raise ValueError(f"weight must be [B, M] of {list(student.shape)}, got {list(weight.shape)}")
    if backends.chosen(student) == "triton":
        student, teacher = same_layout(dense(student), teacher.detach().to(student.dtype))
        return _call(student, teacher, None, weight, kind, eps)[0]
    return kd_reference(student.float(), teacher.float(), weight.float(), kind, eps)


def reference(
    logits: Tensor, points: Tensor, boxes: Tensor, weight: Tensor, kind: Kind = "giou", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The specification of `distribution_iou_loss`, by autograd. Same arguments and results."""
    decoded, boxes = distances_to_boxes(points.detach(), integral(logits)), boxes.detach()
    loss = (iou_loss_rows(decoded, boxes.to(decoded.dtype), kind=kind, eps=eps) * weight.detach()).sum()
    return loss, paired_iou(decoded.detach(), boxes, eps=eps)


def kd_reference(student: Tensor, teacher: Tensor, weight: Tensor, kind: Kind = "giou", eps: float = 1e-6) -> Tensor:
    """The specification of `distribution_iou_kd_loss`, by autograd. Same arguments and result."""
    rows = iou_loss_rows(_boxes(student), _boxes(teacher.detach()), kind=kind, eps=eps)  # [B, M]
    return (rows * weight.detach()).sum()


def _boxes(logits: Tensor) -> Tensor:
    """[B, 4 * R, M] → [B, M, 4] xyxy around the origin."""
    B, C, M = logits.shape
    distances = integral(logits.reshape(B, 4, C // 4, M), dim=2).transpose(1, 2)
    return distances_to_boxes(distances.new_zeros(2).expand(B, M, 2), distances)


# --- registration ------------------------------------------------------------------------------------------------


def _call(
    logits: Tensor, other: Tensor, points: Tensor | None, weight: Tensor, kind: Kind, eps: float
) -> tuple[Tensor, Tensor]:
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    weight = weight.detach().contiguous()
    loss, iou, _ = _distribution_iou_loss(logits, other, points, weight, kind, eps, with_gradient)
    return loss, iou.detach()


@torch.library.custom_op("detector_kernels::distribution_iou_loss", mutates_args=())
def _distribution_iou_loss(
    logits: Tensor,
    other: Tensor,
    points: Tensor | None,
    weight: Tensor,
    kind: str,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, IoU [B, M], gradient. Without points `other` is a teacher's logits, else boxes [M, 4], and B is 1."""
    from kernels.triton import distribution_iou_loss as kernel

    return kernel.distribution_iou_loss(logits, other, points, weight, kind, eps, with_gradient)


@_distribution_iou_loss.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, _, M = logits.shape
    loss, iou = logits.new_empty((), dtype=torch.float32), logits.new_empty(B, M, dtype=torch.float32)
    return loss, iou, kept_like(logits, others[-1])


register_backward(_distribution_iou_loss, {2: 0})
