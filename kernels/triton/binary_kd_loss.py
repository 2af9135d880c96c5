"""Triton kernel of `kernels.ops.binary_kd_loss`: one read of both logits, one write of the gradient.

A program takes BLOCK_M locations of one image and walks over the classes in tiles [BLOCK_K, BLOCK_M], keeping the
running sum and the running maximum of a tile in registers; they are reduced over the tile once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.left_gradient import kept_dtype
from kernels.triton.math import log1p_unit, power, power_slope, special_exponent, unit

TILE = 2048  # 16 elements a thread: enough loads in flight to hide the latency of memory


def binary_kd_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, beta: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], disagreement [B, M] and gradient (like `student` in `kept_dtype`, or empty). Both logits
    [B, K, M] have the same dense layout, M or K inside; weight [B, M] is contiguous."""
    B, K, M = student.shape
    kept = kept_dtype(student.dtype)
    gradient = torch.empty_like(student, dtype=kept) if with_gradient else student.new_empty(0)
    disagreement = student.new_empty(B, M, dtype=torch.float32)
    if student.numel() == 0:
        return student.new_zeros((), dtype=torch.float32), disagreement.zero_(), gradient
    m_inner = student.is_contiguous()
    block_m = (16 // student.element_size() * 32) if m_inner else 128
    grid = (triton.cdiv(M, block_m), B)
    partial = student.new_empty(grid[0] * B, dtype=torch.float32)
    with torch.cuda.device_of(student):
        _binary_kd_kernel[grid](
            student,
            teacher,
            weight,
            partial,
            disagreement,
            gradient,
            K // unit(K),
            M // unit(M),
            beta,
            UNIT_K=unit(K),
            UNIT_M=unit(M),
            M_INNER=m_inner,
            BETA=special_exponent(beta),
            GRADIENT=with_gradient,
            BLOCK_K=TILE // block_m,
            BLOCK_M=block_m,
        )
    return partial.sum(), disagreement, gradient


@triton.jit
def _binary_kd_kernel(
    student,
    teacher,
    weight,
    partial,
    disagreement,
    gradient,
    k_units,
    m_units,
    beta,
    UNIT_K: tl.constexpr,
    UNIT_M: tl.constexpr,
    M_INNER: tl.constexpr,
    BETA: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    K = k_units * UNIT_K
    M = m_units * UNIT_M
    b = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = tl.load(weight + b * M + m, mask=m < M, other=0.0).to(tl.float32)
    student += b * K * M
    teacher += b * K * M
    gradient += b * K * M
    total = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    furthest = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        at = k[:, None] * M + m[None, :] if M_INNER else m[None, :] * K + k[:, None]
        inside = (k < K)[:, None] & (m < M)[None, :]
        z = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32)
        # One reciprocal serves both sigmoids; with z = y = 0 outside, such elements add nothing to sum or maximum.
        e_s = tl.exp(-tl.abs(z))
        e_t = tl.exp(-tl.abs(y))
        reciprocal = 1.0 / ((1.0 + e_s) * (1.0 + e_t))
        of_s = (1.0 + e_t) * reciprocal  # 1 / (1 + e_s)
        t = tl.where(y >= 0, 1.0, e_t) * ((1.0 + e_s) * reciprocal)
        s = tl.where(z >= 0, 1.0, e_s) * of_s
        difference = s - t
        distance = tl.abs(difference)
        bce = tl.maximum(z, 0.0) + log1p_unit(e_s) - t * z
        factor = power(distance, beta, BETA)
        total += bce * factor
        furthest = tl.maximum(furthest, distance)
        if GRADIENT:
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
            slope = power_slope(distance, beta, BETA) * sign * (e_s * of_s * of_s)  # ds/dz = s * (1 - s)
            grad = (difference * factor + bce * slope) * v[None, :]
            tl.store(gradient + at, grad.to(gradient.dtype.element_ty), mask=inside)
    tl.store(disagreement + b * M + m, tl.max(furthest, 0), mask=m < M)
    tl.store(partial + b * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(total, 0) * v))
