"""Triton kernels of `quality_focal_loss`: a dense pass with quality 0 everywhere, one read of the logits and
one write of the gradient, then a small pass that corrects the P positive entries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.left_gradient import kept_dtype
from kernels.triton.math import log1p_unit, power, power_slope, special_exponent, unit

TILE = 2048  # as in `binary_kd_loss`
BLOCK_P = 128


def quality_focal_loss(
    logits: Tensor, index: Tensor, labels: Tensor, quality: Tensor, weight: Tensor, beta: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss [] and gradient (like `logits` in `kept_dtype`, or empty). logits [B, K, M] are dense with M or K inside,
    the other tensors contiguous. A place out of range makes the loss NaN and writes nothing."""
    B, K, M = logits.shape
    kept = kept_dtype(logits.dtype)
    gradient = torch.empty_like(logits, dtype=kept) if with_gradient else logits.new_empty(0)
    if logits.numel() == 0:
        return logits.new_zeros((), dtype=torch.float32), gradient
    m_inner = logits.is_contiguous()
    block_m = (16 // logits.element_size() * 32) if m_inner else 128
    grid = (triton.cdiv(M, block_m), B)
    P = len(index)
    dense = grid[0] * B
    partial = logits.new_empty(dense + triton.cdiv(P, BLOCK_P), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _negative_kernel[grid](
            logits,
            weight,
            partial,
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
        if P:
            _positive_kernel[(triton.cdiv(P, BLOCK_P),)](
                logits,
                index,
                labels,
                quality,
                weight,
                partial[dense:],
                gradient,
                P,
                B * M,
                K,
                M,
                beta,
                M_INNER=m_inner,
                BETA=special_exponent(beta),
                GRADIENT=with_gradient,
                BLOCK_P=BLOCK_P,
            )
    return partial.sum(), gradient


@triton.jit
def _negative_kernel(
    logits,
    weight,
    partial,
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
    logits += b * K * M
    gradient += b * K * M
    total = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        at = k[:, None] * M + m[None, :] if M_INNER else m[None, :] * K + k[:, None]
        inside = (k < K)[:, None] & (m < M)[None, :]
        z = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)  # -inf: sigmoid and loss are 0
        e = tl.exp(-tl.abs(z))
        reciprocal = 1.0 / (1.0 + e)
        s = tl.where(z >= 0, 1.0, e) * reciprocal
        softplus = tl.maximum(z, 0.0) + log1p_unit(e)
        factor = power(s, beta, BETA)
        total += softplus * factor
        if GRADIENT:
            complement = tl.where(z >= 0, e, 1.0) * reciprocal  # 1 - s
            grad = factor * (s + beta * softplus * complement) * v[None, :]
            tl.store(gradient + at, grad.to(gradient.dtype.element_ty), mask=inside)
    tl.store(partial + b * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(total, 0) * v))


@triton.jit
def _positive_kernel(
    logits,
    index,
    labels,
    quality,
    weight,
    partial,
    gradient,
    P,
    locations,
    K,
    M,
    beta,
    M_INNER: tl.constexpr,
    BETA: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    given = p < P
    location = tl.load(index + p, mask=given, other=0)  # b * M + m
    label = tl.load(labels + p, mask=given, other=0)
    inside = given & (location >= 0) & (location < locations) & (label >= 0) & (label < K)
    y = tl.load(quality + p, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(weight + location, mask=inside, other=0.0).to(tl.float32)
    at = (location // M * K + label) * M + location % M if M_INNER else location * K + label
    z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(z))
    reciprocal = 1.0 / (1.0 + e)
    s = tl.where(z >= 0, 1.0, e) * reciprocal
    softplus = tl.maximum(z, 0.0) + log1p_unit(e)
    bce = softplus - y * z
    difference = s - y
    factor = power(tl.abs(difference), beta, BETA)
    if GRADIENT:
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        slope = power_slope(tl.abs(difference), beta, BETA) * sign * (e * reciprocal * reciprocal)
        grad = (difference * factor + bce * slope) * v
        tl.store(gradient + at, grad.to(gradient.dtype.element_ty), mask=inside)
    term = tl.where(given, float("nan"), 0.0)  # of a place that is out of range
    term = tl.where(inside, (bce * factor - softplus * power(s, beta, BETA)) * v, term)
    tl.store(partial + tl.program_id(0), tl.sum(term))
