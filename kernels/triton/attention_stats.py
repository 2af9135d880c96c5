"""Triton kernels of `kernels.ops.attention_stats`: x is read once for both means.

A program stays at BLOCK_S positions of one image and walks over STEPS tiles of BLOCK_Q quads (four channels each; see
`kernels.triton.dropout`). It leaves sums of |x'| over its channels a position, and over its positions a channel, which
are a small fraction of x (1 / channels and 1 / positions of a program) and are added up by torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.dropout import Dropout
from kernels.triton.dropout import NOT_SPECIALIZED, dense, draw_arguments, factors, program_of_image, walk
from kernels.triton.math import unit


def forward(x: Tensor, dropout: Dropout | None, *, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """float32 means [B, h, w] over the channels and [B, C] over the positions. tile: elements of a tile (tests)."""
    B, C, h, w = x.shape
    S = h * w
    source, channels_last = dense(x)
    programs, blocks = walk(B, C, S, x.element_size(), channels_last, tile)
    per_image = triton.cdiv(S, blocks["BLOCK_S"])  # tiles of positions
    by_position = x.new_empty(B, programs // max(B * per_image, 1), S, dtype=torch.float32)
    by_channel = x.new_empty(B, per_image, C, dtype=torch.float32)
    if B:
        with torch.cuda.device_of(x):
            _forward_kernel[(programs,)](
                source,
                by_position,
                by_channel,
                **_sizes(C, S),
                **draw_arguments(dropout, x.device),
                **blocks,
                CHANNELS_LAST=channels_last,
            )
    return by_position.sum(1).div_(C).view(B, h, w), by_channel.sum(1).div_(S)


def backward(
    grad_spatial: Tensor, grad_channel: Tensor, x: Tensor, dropout: Dropout | None, *, tile: int | None = None
) -> Tensor:
    """Gradient like x, from those of the two means."""
    B, C, h, w = x.shape
    S = h * w
    source, channels_last = dense(x)
    grad = torch.empty_like(source)
    programs, blocks = walk(B, C, S, x.element_size(), channels_last, tile)
    if B:
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                source,
                grad_spatial.contiguous(),
                grad_channel.contiguous(),
                grad,
                **_sizes(C, S),
                **draw_arguments(dropout, x.device),
                **blocks,
                CHANNELS_LAST=channels_last,
            )
    result = torch.empty_like(x)
    return grad if grad.stride() == result.stride() else result.copy_(grad)


def _sizes(C: int, S: int) -> dict[str, Any]:
    return {"c_units": C // unit(C), "s_units": S // unit(S), "C_UNIT": unit(C), "S_UNIT": unit(S)}


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    x,
    by_position,
    by_channel,
    c_units,
    s_units,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    words,
    means,
    variances,
    groups,
    per_copy,
    per_pair,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
    CHANNEL: tl.constexpr,
    COMBINE: tl.constexpr,
    C_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEPS: tl.constexpr,
):
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    quads = tl.cdiv(C, 4)
    image, first_quad, first_position = program_of_image(C, S, BLOCK_Q, BLOCK_S, STEPS)
    if CHANNELS_LAST:
        position = first_position + tl.arange(0, BLOCK_S)[:, None]
    else:
        position = first_position + tl.arange(0, BLOCK_S)[None, :]
    tiles_s = tl.cdiv(S, BLOCK_S)
    channel_sums = by_channel + (image * tiles_s + first_position // BLOCK_S) * C
    sums = tl.zeros([BLOCK_S, 4 * BLOCK_Q], tl.float32) if CHANNELS_LAST else tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
    for step in range(STEPS):
        q0 = first_quad + step * BLOCK_Q
        quad = q0 + tl.arange(0, BLOCK_Q)[None, :] if CHANNELS_LAST else q0 + tl.arange(0, BLOCK_Q)[:, None]
        f = factors(
            position,
            image * quads + quad,
            seed_low,
            seed_high,
            offset_low,
            offset_high,
            words,
            means,
            variances,
            groups,
            per_copy,
            per_pair,
            GROUPS,
            COPIES,
            CHANNEL,
            COMBINE,
            CHANNELS_LAST,
        )
        if CHANNELS_LAST:
            c = 4 * q0 + tl.arange(0, 4 * BLOCK_Q)
            at = (image * S + position) * C + c[None, :]
            size = _absolute(x, at, (c[None, :] < C) & (position < S), f)
            sums += size
            tl.store(channel_sums + c, tl.sum(size, 0), mask=c < C)
        else:
            for lane in tl.static_range(4):
                c = 4 * (q0 + tl.arange(0, BLOCK_Q)) + lane
                at = (image * C + c[:, None]) * S + position
                size = _absolute(x, at, (c[:, None] < C) & (position < S), f[lane])
                sums += size
                tl.store(channel_sums + c, tl.sum(size, 1), mask=c < C)
    inner = tl.sum(sums, 1) if CHANNELS_LAST else tl.sum(sums, 0)
    s = first_position + tl.arange(0, BLOCK_S)
    parts = tl.cdiv(quads, BLOCK_Q * STEPS)
    tl.store(by_position + (image * parts + first_quad // (BLOCK_Q * STEPS)) * S + s, inner, mask=s < S)


@triton.jit
def _absolute(x, at, within, f):
    return tl.abs(tl.load(x + at, mask=within, other=0.0).to(tl.float32)) * f


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_kernel(
    x,
    grad_spatial,
    grad_channel,
    grad,
    c_units,
    s_units,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    words,
    means,
    variances,
    groups,
    per_copy,
    per_pair,
    GROUPS: tl.constexpr,
    COPIES: tl.constexpr,
    CHANNEL: tl.constexpr,
    COMBINE: tl.constexpr,
    C_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEPS: tl.constexpr,
):
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    quads = tl.cdiv(C, 4)
    image, first_quad, first_position = program_of_image(C, S, BLOCK_Q, BLOCK_S, STEPS)
    if CHANNELS_LAST:
        position = first_position + tl.arange(0, BLOCK_S)[:, None]
    else:
        position = first_position + tl.arange(0, BLOCK_S)[None, :]
    weight = tl.load(grad_spatial + image * S + position, mask=position < S, other=0.0) / C
    for step in range(STEPS):
        q0 = first_quad + step * BLOCK_Q
        quad = q0 + tl.arange(0, BLOCK_Q)[None, :] if CHANNELS_LAST else q0 + tl.arange(0, BLOCK_Q)[:, None]
        f = factors(
            position,
            image * quads + quad,
            seed_low,
            seed_high,
            offset_low,
            offset_high,
            words,
            means,
            variances,
            groups,
            per_copy,
            per_pair,
            GROUPS,
            COPIES,
            CHANNEL,
            COMBINE,
            CHANNELS_LAST,
        )
        if CHANNELS_LAST:
            c = 4 * q0 + tl.arange(0, 4 * BLOCK_Q)[None, :]
            at = (image * S + position) * C + c
            _store_gradient(x, grad_channel + image * C + c, grad, at, c < C, position < S, f, weight, S)
        else:
            for lane in tl.static_range(4):
                c = 4 * quad + lane
                at = (image * C + c) * S + position
                _store_gradient(x, grad_channel + image * C + c, grad, at, c < C, position < S, f[lane], weight, S)


@triton.jit
def _store_gradient(x, grad_channel, grad, at, in_channels, in_positions, f, weight, S):
    within = in_channels & in_positions
    value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    size = (weight + tl.load(grad_channel, mask=in_channels, other=0.0) / S) * f
    result = tl.where(value > 0, size, tl.where(value < 0, -size, 0.0))
    tl.store(grad + at, result.to(grad.dtype.element_ty), mask=within)
