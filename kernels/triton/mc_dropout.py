"""Triton kernels of `kernels.ops.mc_dropout`: x is read once, every result is written once, no mask is kept.

A program has a tile of positions times quads (four channels) of one image; see `kernels.triton.dropout` for the
random numbers. With positions inside, the four channels of a quad are four tiles with one set of random calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common.dropout import Dropout, three_dimensions
from kernels.triton.dropout import (
    NOT_SPECIALIZED,
    dense,
    draw_arguments,
    draw_quads,
    first_channel,
    interleave,
    tile_of_program,
)
from kernels.triton.math import unit

TILE_BYTES = 2048  # of a lane: 16 a thread


def forward(
    x: Tensor,
    dropout: Dropout,
    variance: bool,
    *,
    tile: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out and var, both like x."""
    source, channels_last = dense(x)
    out = torch.empty_like(source)
    var = torch.empty_like(source) if variance else None
    _launch(_forward_kernel, (source, out, var), channels_last, dropout, tile)
    return _like(out, x), None if var is None else _like(var, x)


def backward(
    grad_out: Tensor,
    grad_var: Tensor,
    x: Tensor,
    dropout: Dropout,
    *,
    tile: int | None = None,
) -> Tensor:
    """Gradient like x from those of out and var."""
    source, channels_last = dense(x)
    grad = torch.empty_like(source)
    tensors = (source, _like(grad_out, source), _like(grad_var, source), grad)
    _launch(_backward_kernel, tensors, channels_last, dropout, tile)
    return _like(grad, x)


def _like(t: Tensor, model: Tensor) -> Tensor:
    """t with the memory layout that `torch.empty_like(model)` has."""
    wanted = torch.empty_like(model, device="meta").stride()
    return t if t.stride() == wanted else torch.empty_like(model).copy_(t)


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor | None, ...],
    channels_last: bool,
    dropout: Dropout,
    tile: int | None,
) -> None:
    x = tensors[0]
    assert x is not None
    if x.numel() == 0:
        return
    # With channels inside, tiles of 16-bit maps are as small as those of float32: with twice as many elements ptxas
    # puts 8 bytes of the draw into local memory on sm_89, and takes twice the registers everywhere.
    tile = tile or TILE_BYTES // (4 if channels_last else x.element_size())
    B, C, S = three_dimensions(x, dropout.mode)
    quads = triton.cdiv(C, 4)
    if channels_last:
        block_q = min(triton.next_power_of_2(quads), 32)
        block_s = tile // block_q
    else:
        block_s = min(triton.next_power_of_2(S), tile)
        block_q = tile // block_s
    grid = (triton.cdiv(S, block_s) * triton.cdiv(quads, block_q) * B,)
    with torch.cuda.device_of(x):
        kernel[grid](
            *tensors,
            C // unit(C),
            S // unit(S),
            **draw_arguments(dropout, x.device),
            C_UNIT=unit(C),
            S_UNIT=unit(S),
            CHANNELS_LAST=channels_last,
            BLOCK_Q=block_q,
            BLOCK_S=block_s,
        )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    x,
    out,
    var,
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
):
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    image, quad, position = tile_of_program(C, S, CHANNELS_LAST, BLOCK_Q, BLOCK_S)
    quads = (C + 3) // 4
    f, v = draw_quads(
        position,
        (image * quads + quad).to(tl.int32),
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
    )
    if CHANNELS_LAST:
        channel = first_channel(C, S, BLOCK_Q, BLOCK_S) + tl.arange(0, 4 * BLOCK_Q)[None, :]
        at = (image * S + position) * C + channel
        within = (channel < C) & (position < S)
        _store_moments(x, out, var, at, within, interleave(f), interleave(v))
    else:
        for lane in tl.static_range(4):
            channel = 4 * quad + lane
            at = (image * C + channel) * S + position
            within = (channel < C) & (position < S)
            _store_moments(x, out, var, at, within, f[lane], v[lane])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_kernel(
    x,
    grad_out,
    grad_var,
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
):
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    image, quad, position = tile_of_program(C, S, CHANNELS_LAST, BLOCK_Q, BLOCK_S)
    quads = (C + 3) // 4
    f, v = draw_quads(
        position,
        (image * quads + quad).to(tl.int32),
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
    )
    if CHANNELS_LAST:
        channel = first_channel(C, S, BLOCK_Q, BLOCK_S) + tl.arange(0, 4 * BLOCK_Q)[None, :]
        at = (image * S + position) * C + channel
        within = (channel < C) & (position < S)
        _store_gradient(x, grad_out, grad_var, grad, at, within, interleave(f), interleave(v))
    else:
        for lane in tl.static_range(4):
            channel = 4 * quad + lane
            at = (image * C + channel) * S + position
            within = (channel < C) & (position < S)
            _store_gradient(x, grad_out, grad_var, grad, at, within, f[lane], v[lane])


@triton.jit
def _store_moments(x, out, var, at, within, f, v):
    value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    tl.store(out + at, (value * f).to(out.dtype.element_ty), mask=within)
    if var is not None:
        tl.store(var + at, (value * value * v).to(var.dtype.element_ty), mask=within)


@triton.jit
def _store_gradient(x, grad_out, grad_var, grad, at, within, f, v):
    value = tl.load(x + at, mask=within, other=0.0).to(tl.float32)
    through_out = tl.load(grad_out + at, mask=within, other=0.0).to(tl.float32) * f
    through_var = tl.load(grad_var + at, mask=within, other=0.0).to(tl.float32) * (2.0 * value * v)
    tl.store(grad + at, (through_out + through_var).to(grad.dtype.element_ty), mask=within)
