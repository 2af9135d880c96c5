"""Triton kernel of `kernels.ops.iou_loss`: paired boxes are read once, the gradient is left behind.

Rows of four coordinates are loaded as flat memory, 16 bytes at a time, and split in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.left_gradient import kept_dtype
from kernels.triton.math import atan_unit

KINDS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3}
BLOCK = 512  # rows: four a thread


def iou_loss(
    boxes: Tensor, target: Tensor, weight: Tensor | None, kind: str, eps: float, boxes_grad: bool, target_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] and the gradients to boxes and target ([N, 4] in `kept_dtype`, or empty). All inputs contiguous."""
    N = len(boxes)
    kept = kept_dtype(boxes.dtype)
    to_boxes = torch.empty_like(boxes, dtype=kept) if boxes_grad else boxes.new_empty(0)
    to_target = torch.empty_like(target, dtype=kept) if target_grad else target.new_empty(0)
    if N == 0:
        return boxes.new_zeros((), dtype=torch.float32), to_boxes, to_target
    programs = triton.cdiv(N, BLOCK)
    partial = boxes.new_empty(programs, dtype=torch.float32)
    # 16 bytes hold two rows of halves: the kernel can load them at once where it sees that none is left over.
    unit = 2 if boxes.element_size() == 2 and N % 2 == 0 else 1
    with torch.cuda.device_of(boxes):
        _iou_kernel[(programs,)](
            boxes,
            target,
            weight,
            partial,
            to_boxes,
            to_target,
            N // unit,
            eps,
            UNIT=unit,
            KIND=KINDS[kind],
            BOXES_GRAD=boxes_grad,
            TARGET_GRAD=target_grad,
            BLOCK=BLOCK,
        )
    return partial.sum(), to_boxes, to_target


@triton.jit
def _iou_kernel(
    boxes,
    target,
    weight,
    partial,
    to_boxes,
    to_target,
    n_units,
    eps,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
    BOXES_GRAD: tl.constexpr,
    TARGET_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK)
    rows_left = n_units * UNIT - program * BLOCK
    flat = tl.arange(0, 4 * BLOCK)
    inside = flat < 4 * rows_left
    ax1, ay1, ax2, ay2 = split_rows(tl.load(boxes + program * 4 * BLOCK + flat, mask=inside, other=0.0), BLOCK)
    bx1, by1, bx2, by2 = split_rows(tl.load(target + program * 4 * BLOCK + flat, mask=inside, other=0.0), BLOCK)
    loss, _, gx1, gy1, gx2, gy2, tx1, ty1, tx2, ty2 = iou_and_gradients(
        ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, eps, KIND
    )
    if weight is not None:
        w = tl.load(weight + program * BLOCK + row, mask=row < rows_left, other=0.0).to(tl.float32)
    else:
        w = tl.where(row < rows_left, 1.0, 0.0)
    if BOXES_GRAD:
        g = join_rows(gx1 * w, gy1 * w, gx2 * w, gy2 * w, BLOCK)
        tl.store(to_boxes + program * 4 * BLOCK + flat, g.to(to_boxes.dtype.element_ty), mask=inside)
    if TARGET_GRAD:
        g = join_rows(tx1 * w, ty1 * w, tx2 * w, ty2 * w, BLOCK)
        tl.store(to_target + program * 4 * BLOCK + flat, g.to(to_target.dtype.element_ty), mask=inside)
    tl.store(partial + program, tl.sum(tl.where(row < rows_left, loss * w, 0.0)))  # beyond: NaN if eps is 0


@triton.jit
def split_rows(flat, BLOCK: tl.constexpr):
    """[4 * BLOCK] rows of x1, y1, x2, y2 → four float32 [BLOCK]."""
    x, y = tl.split(tl.reshape(flat.to(tl.float32), [BLOCK, 2, 2]))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def join_rows(x1, y1, x2, y2, BLOCK: tl.constexpr):
    """Inverse of `split_rows`."""
    return tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), [4 * BLOCK])


@triton.jit
def share_of_larger(a, b):
    """d max(a, b) / da, half at a tie as in PyTorch."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def iou_and_gradients(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, eps, KIND: tl.constexpr):
    """Loss, IoU and the derivatives of the loss by the corners of a and of b. KIND: see `KINDS`.

    Formulas: `kernels.ops.iou_loss`. A derivative that is not used costs nothing.
    """
    aw = ax2 - ax1
    ah = ay2 - ay1
    bw = bx2 - bx1
    bh = by2 - by1
    raw_w = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    raw_h = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    overlap_w = tl.maximum(raw_w, 0.0)
    overlap_h = tl.maximum(raw_h, 0.0)
    overlap = overlap_w * overlap_h
    union = aw * ah + bw * bh - overlap
    inverse_union = 1.0 / tl.maximum(union, eps)
    iou = overlap * inverse_union
    loss = 1.0 - iou
    by_union = tl.where(union >= eps, iou * inverse_union, 0.0)  # derivative of the loss by the union
    # Which box bounds the overlap on each side; the enclosing box is bounded by the other one.
    left = share_of_larger(ax1, bx1)
    top = share_of_larger(ay1, by1)
    right = 1.0 - share_of_larger(ax2, bx2)
    bottom = 1.0 - share_of_larger(ay2, by2)
    by_enclosing_w = tl.zeros_like(aw)
    by_enclosing_h = tl.zeros_like(aw)
    by_shift_x = tl.zeros_like(aw)  # derivative by the x of both corners of a, through its centre
    by_shift_y = tl.zeros_like(aw)
    by_aw = tl.zeros_like(aw)
    by_ah = tl.zeros_like(aw)
    by_bw = tl.zeros_like(aw)
    by_bh = tl.zeros_like(aw)
    if KIND != 0:
        raw_ew = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
        raw_eh = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
        enclosing_w = tl.maximum(raw_ew, 0.0)
        enclosing_h = tl.maximum(raw_eh, 0.0)
        if KIND == 1:
            enclosing = enclosing_w * enclosing_h
            inverse = 1.0 / tl.maximum(enclosing, eps)
            empty = (enclosing - union) * inverse
            loss += empty
            by_union -= inverse
            # union / enclosing^2, not 1 / enclosing - (enclosing - union) / enclosing^2: nothing cancels
            by_enclosing = tl.where(enclosing >= eps, union * inverse * inverse, inverse)
            by_enclosing_w = by_enclosing * enclosing_h
            by_enclosing_h = by_enclosing * enclosing_w
        else:
            diagonal = enclosing_w * enclosing_w + enclosing_h * enclosing_h
            inverse = 1.0 / tl.maximum(diagonal, eps)
            dx = 0.5 * ((ax1 - bx1) + (ax2 - bx2))
            dy = 0.5 * ((ay1 - by1) + (ay2 - by2))
            distance = (dx * dx + dy * dy) * inverse
            loss += distance
            by_diagonal = tl.where(diagonal >= eps, -distance * inverse, 0.0)
            by_enclosing_w = 2.0 * by_diagonal * enclosing_w
            by_enclosing_h = 2.0 * by_diagonal * enclosing_h
            by_shift_x = dx * inverse
            by_shift_y = dy * inverse
            if KIND == 3:
                angle_a, a_by_w, a_by_h = aspect(aw, ah)
                angle_b, b_by_w, b_by_h = aspect(bw, bh)
                difference = angle_b - angle_a
                v = 0.4052847345693511 * difference * difference  # 4 / pi^2
                alpha = v / tl.maximum(1.0 - iou + v, eps)  # a constant
                loss += alpha * v
                by_angle = 2.0 * 0.4052847345693511 * alpha * difference
                by_aw = -by_angle * a_by_w
                by_ah = -by_angle * a_by_h
                by_bw = by_angle * b_by_w
                by_bh = by_angle * b_by_h
        by_enclosing_w = tl.where(raw_ew > 0, by_enclosing_w, 0.0)
        by_enclosing_h = tl.where(raw_eh > 0, by_enclosing_h, 0.0)
    by_overlap = -inverse_union - by_union
    by_overlap_w = tl.where(raw_w > 0, by_overlap * overlap_h, 0.0)
    by_overlap_h = tl.where(raw_h > 0, by_overlap * overlap_w, 0.0)
    by_aw += by_union * ah
    by_ah += by_union * aw
    by_bw += by_union * bh
    by_bh += by_union * bw
    gx1 = by_shift_x - by_aw - left * by_overlap_w - (1.0 - left) * by_enclosing_w
    gy1 = by_shift_y - by_ah - top * by_overlap_h - (1.0 - top) * by_enclosing_h
    gx2 = by_shift_x + by_aw + right * by_overlap_w + (1.0 - right) * by_enclosing_w
    gy2 = by_shift_y + by_ah + bottom * by_overlap_h + (1.0 - bottom) * by_enclosing_h
    tx1 = -by_shift_x - by_bw - (1.0 - left) * by_overlap_w - left * by_enclosing_w
    ty1 = -by_shift_y - by_bh - (1.0 - top) * by_overlap_h - top * by_enclosing_h
    tx2 = -by_shift_x + by_bw + (1.0 - right) * by_overlap_w + right * by_enclosing_w
    ty2 = -by_shift_y + by_bh + (1.0 - bottom) * by_overlap_h + bottom * by_enclosing_h
    return loss, iou, gx1, gy1, gx2, gy2, tx1, ty1, tx2, ty2


@triton.jit
def aspect(w, h):
    """atan(w / h) of sides clamped to 0, and its derivatives by w and h; all 0 for a point."""
    w_ = tl.maximum(w, 0.0)
    h_ = tl.maximum(h, 0.0)
    longer = tl.maximum(w_, h_)
    inverse = tl.where(longer > 0, 1.0 / tl.where(longer > 0, longer, 1.0), 0.0)
    ratio = tl.minimum(w_, h_) * inverse
    angle = atan_unit(ratio)
    angle = tl.where(w_ > h_, 1.5707963267948966 - angle, angle)
    scale = inverse * inverse / (1.0 + ratio * ratio)  # 1 / (w^2 + h^2)
    return angle, tl.where(w > 0, h_ * scale, 0.0), tl.where(h > 0, -w_ * scale, 0.0)
