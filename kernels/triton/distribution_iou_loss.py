"""Triton kernel of `kernels.ops.distribution_iou_loss`: from logits over bins to a loss of boxes and back to logits.

A thread owns whole locations and walks over their 4 * R logits four at a time, so softmax and expectation are
sequential and need no shuffles. The gradient needs every probability once the loss is known: the student's logits are
then read again, from the cache, where the first reading has just put them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.left_gradient import kept_dtype
from kernels.triton.iou_loss import KINDS, iou_and_gradients, split_rows
from kernels.triton.math import unit

UNROLL = tl.constexpr(4)  # loads of one thread that wait together


def distribution_iou_loss(
    logits: Tensor,
    other: Tensor,
    points: Tensor | None,
    weight: Tensor,
    kind: str,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], IoU [B, M] and gradient (like `logits` in `kept_dtype`, or empty).

    logits [B, 4 * R, M] are dense, channels or M inside. other: a teacher's logits of the same layout, where points is
    None, else boxes [M, 4] and points [M, 2] with B = 1. weight [B, M]. All but the logits are contiguous.
    """
    B, C, M = logits.shape
    kept = kept_dtype(logits.dtype)
    gradient = torch.empty_like(logits, dtype=kept) if with_gradient else logits.new_empty(0)
    iou = logits.new_empty(B, M, dtype=torch.float32)
    if iou.numel() == 0:
        return logits.new_zeros((), dtype=torch.float32), iou, gradient
    m_inner = logits.is_contiguous() and M > 1
    block = 256 if m_inner else 32 if points is not None else 64
    grid = (triton.cdiv(M, block), B)
    partial = logits.new_empty(grid[0] * B, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _distribution_iou_kernel[grid](
            logits,
            other,
            points,
            weight,
            partial,
            iou,
            gradient,
            M // unit(M),
            eps,
            R=C // 4,
            UNIT_M=unit(M),
            M_INNER=m_inner,
            KIND=KINDS[kind],
            GRADIENT=with_gradient,
            BLOCK=block,
            num_warps=1 if block == 32 else 2,
        )
    return partial.sum(), iou, gradient


@triton.jit
def _distribution_iou_kernel(
    logits,
    other,
    points,
    weight,
    partial,
    iou_out,
    gradient,
    m_units,
    eps,
    R: tl.constexpr,
    UNIT_M: tl.constexpr,
    M_INNER: tl.constexpr,
    KIND: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    M = m_units * UNIT_M
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = m < M
    image = b * 4 * R * M
    left, x1 = _side(logits + image, m, M, 0, R, M_INNER, BLOCK)
    top, y1 = _side(logits + image, m, M, 1, R, M_INNER, BLOCK)
    right, x2 = _side(logits + image, m, M, 2, R, M_INNER, BLOCK)
    bottom, y2 = _side(logits + image, m, M, 3, R, M_INNER, BLOCK)
    # Boxes are compared in the frame of their common point: IoU does not depend on it.
    if points is None:
        _, bx1 = _side(other + image, m, M, 0, R, M_INNER, BLOCK)
        _, by1 = _side(other + image, m, M, 1, R, M_INNER, BLOCK)
        _, bx2 = _side(other + image, m, M, 2, R, M_INNER, BLOCK)
        _, by2 = _side(other + image, m, M, 3, R, M_INNER, BLOCK)
        bx1 = -bx1
        by1 = -by1
    else:
        px = tl.load(points + 2 * m, mask=inside, other=0.0).to(tl.float32)
        py = tl.load(points + 2 * m + 1, mask=inside, other=0.0).to(tl.float32)
        flat = tl.program_id(0) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
        bx1, by1, bx2, by2 = split_rows(tl.load(other + flat, mask=flat < 4 * M, other=0.0), BLOCK)
        bx1 -= px
        by1 -= py
        bx2 -= px
        by2 -= py
    loss, iou, gx1, gy1, gx2, gy2, _tx1, _ty1, _tx2, _ty2 = iou_and_gradients(
        -x1, -y1, x2, y2, bx1, by1, bx2, by2, eps, KIND
    )
    tl.store(iou_out + b * M + m, iou, mask=inside)
    w = tl.load(weight + b * M + m, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.where(inside, loss * w, 0.0))  # beyond: may be NaN if eps is 0
    tl.store(partial + b * tl.num_programs(0) + tl.program_id(0), total)
    if GRADIENT:
        # d(distance) / d(logit of bin j) = p_j * (j - distance), with log(p_j) = logit - log(sum(exp))
        gx1 *= -w
        gy1 *= -w
        gx2 *= w
        gy2 *= w
        if M_INNER:
            _write_side(logits + image, gradient + image, m, M, 0, left, x1, gx1, R)
            _write_side(logits + image, gradient + image, m, M, 1, top, y1, gy1, R)
            _write_side(logits + image, gradient + image, m, M, 2, right, x2, gx2, R)
            _write_side(logits + image, gradient + image, m, M, 3, bottom, y2, gy2, R)
        else:
            for chunk in tl.range(0, R, loop_unroll_factor=UNROLL):
                e = chunk * 4 + tl.arange(0, 4)
                at = (image + m * (4 * R))[:, None] + e[None, :]
                z = tl.load(logits + at, mask=inside[:, None], other=0.0).to(tl.float32)
                bin = (e % R)[None, :].to(tl.float32)
                log_sum = _of_side(e, left, top, right, bottom, R)
                expected = _of_side(e, x1, y1, x2, y2, R)
                slope = _of_side(e, gx1, gy1, gx2, gy2, R)
                g = slope * tl.exp(z - log_sum) * (bin - expected)
                tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _side(logits, m, M, SIDE: tl.constexpr, R: tl.constexpr, M_INNER: tl.constexpr, BLOCK: tl.constexpr):
    """log(sum(exp)) of one side's logits, and its expected bin; [BLOCK] each.

    WIDTH channels are loaded at once: four where they lie side by side, each with a softmax of its own, and those are
    merged at the end. What the first and the last four hold of other sides counts as LOW.
    """
    WIDTH: tl.constexpr = 1 if M_INNER else 4
    LOW: tl.constexpr = -1e30
    greatest = tl.full([BLOCK, WIDTH], LOW, tl.float32)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    moment = tl.zeros([BLOCK, WIDTH], tl.float32)
    for chunk in tl.range(SIDE * R // WIDTH, (SIDE * R + R - 1) // WIDTH + 1, loop_unroll_factor=UNROLL):
        e = chunk * WIDTH + tl.arange(0, WIDTH)
        at = e[None, :] * M + m[:, None] if M_INNER else m[:, None] * (4 * R) + e[None, :]
        z = tl.load(logits + at, mask=(m < M)[:, None], other=0.0).to(tl.float32)
        bin = (e - SIDE * R)[None, :]
        if not M_INNER:
            z = tl.where((bin >= 0) & (bin < R), z, LOW)
        new = tl.maximum(greatest, z)
        keep = tl.exp(greatest - new)
        p = tl.exp(z - new)
        total = total * keep + p
        moment = moment * keep + p * bin.to(tl.float32)
        greatest = new
    merged = tl.max(greatest, 1)
    keep = tl.exp(greatest - merged[:, None])
    sum_of_all = tl.sum(total * keep, 1)
    return merged + tl.log(sum_of_all), tl.sum(moment * keep, 1) / sum_of_all


@triton.jit
def _write_side(logits, gradient, m, M, SIDE: tl.constexpr, log_sum, expected, slope, R: tl.constexpr):
    for bin in tl.range(0, R, loop_unroll_factor=UNROLL):
        at = (SIDE * R + bin) * M + m
        z = tl.load(logits + at, mask=m < M, other=0.0).to(tl.float32)
        g = slope * tl.exp(z - log_sum) * (bin - expected)
        tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask=m < M)


@triton.jit
def _of_side(e, left, top, right, bottom, R: tl.constexpr):
    """Channels e [4] → of each location [BLOCK] the value of the channel's side, [BLOCK, 4]."""
    side = (e // R)[None, :]
    first = tl.where(side == 0, left[:, None], top[:, None])
    second = tl.where(side == 2, right[:, None], bottom[:, None])
    return tl.where(side < 2, first, second)
