"""Triton kernels of `kernels.ops.feature_distance`: both maps are read once, and nothing of their size is written but
the student's gradient.

A program stays at BLOCK_S positions of one image and walks over STEPS tiles of BLOCK_Q quads (four channels each; see
`kernels.triton.dropout`). The sum over its channels is kept a position, so the W spatial weights are read and applied
once at the end, whatever W is. Every program leaves W partial sums.
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


def forward(
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    dropout: Dropout | None,
    *,
    tile: int | None = None,
) -> Tensor:
    """[W] float32 sums. tile: elements of a tile, a power of two (tests)."""
    W, B, C, S = len(spatial), *channel.shape, student[0, 0].numel() if student.numel() else 0
    if student.numel() == 0:
        return student.new_zeros(W, dtype=torch.float32)
    maps, channels_last = _same_layout(student, teacher)
    programs, blocks = walk(B, C, S, student.element_size(), channels_last, tile)
    partial = student.new_empty(W, programs, dtype=torch.float32)
    with torch.cuda.device_of(student):
        _forward_kernel[(programs,)](
            *maps,
            spatial.contiguous(),
            channel.contiguous(),
            partial,
            B,
            **_sizes(C, S),
            **draw_arguments(dropout, student.device),
            **blocks,
            CHANNELS_LAST=channels_last,
            WEIGHTS=W,
        )
    return partial.sum(1)


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    dropout: Dropout | None,
    of_means: tuple[Tensor, Tensor] | None = None,
    *,
    tile: int | None = None,
) -> Tensor:
    """Gradient like the student, from that of the W sums and, if they were asked for, of the means of |S| over the
    channels [B, h, w] and over the positions [B, C]."""
    W, B, C, S = len(spatial), *channel.shape, student[0, 0].numel() if student.numel() else 0
    result = torch.empty_like(student)
    if student.numel() == 0:
        return result
    maps, channels_last = _same_layout(student, teacher)
    written = torch.empty_like(maps[0])
    programs, blocks = walk(B, C, S, student.element_size(), channels_last, tile)
    by_position, by_channel = (None, None) if of_means is None else (g.contiguous() for g in of_means)
    with torch.cuda.device_of(student):
        _backward_kernel[(programs,)](
            *maps,
            spatial.contiguous(),
            channel.contiguous(),
            grad.contiguous(),
            by_position,
            by_channel,
            written,
            B,
            **_sizes(C, S),
            **draw_arguments(dropout, student.device),
            **blocks,
            CHANNELS_LAST=channels_last,
            WEIGHTS=W,
            MEANS=of_means is not None,
        )
    return written if written.stride() == result.stride() else result.copy_(written)


def _same_layout(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], bool]:
    """Return both maps in the student's layout, and whether it is channels_last."""
    student, channels_last = dense(student)
    if teacher.stride() != student.stride():
        teacher = torch.empty_like(student, dtype=teacher.dtype).copy_(teacher)
    return (student, teacher), channels_last


def _sizes(C: int, S: int) -> dict[str, Any]:
    return {"c_units": C // unit(C), "s_units": S // unit(S), "C_UNIT": unit(C), "S_UNIT": unit(S)}


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    student,
    teacher,
    spatial,
    channel,
    partial,
    B,
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
    WEIGHTS: tl.constexpr,
):
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    quads = tl.cdiv(C, 4)
    image, first_quad, first_position = program_of_image(C, S, BLOCK_Q, BLOCK_S, STEPS)
    if CHANNELS_LAST:
        position = first_position + tl.arange(0, BLOCK_S)[:, None]
    else:
        position = first_position + tl.arange(0, BLOCK_S)[None, :]
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
            c = 4 * q0 + tl.arange(0, 4 * BLOCK_Q)[None, :]
            at = (image * S + position) * C + c
            sums += _weighted_square(student, teacher, channel + image * C + c, at, c < C, position < S, f)
        else:
            for lane in tl.static_range(4):
                c = 4 * quad + lane
                at = (image * C + c) * S + position
                sums += _weighted_square(student, teacher, channel + image * C + c, at, c < C, position < S, f[lane])
    inner = tl.sum(sums, 1) if CHANNELS_LAST else tl.sum(sums, 0)
    s = first_position + tl.arange(0, BLOCK_S)
    for w in tl.static_range(WEIGHTS):
        weight = tl.load(spatial + (w * B + image) * S + s, mask=s < S, other=0.0).to(tl.float32)
        tl.store(partial + w * tl.num_programs(0) + tl.program_id(0), tl.sum(inner * weight))


@triton.jit
def _weighted_square(student, teacher, channel, at, in_channels, in_positions, f):
    within = in_channels & in_positions
    s = tl.load(student + at, mask=within, other=0.0).to(tl.float32)
    t = tl.load(teacher + at, mask=within, other=0.0).to(tl.float32)
    d = s - t * f
    return tl.load(channel, mask=in_channels, other=0.0).to(tl.float32) * d * d


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_kernel(
    student,
    teacher,
    spatial,
    channel,
    grad,
    by_position,
    by_channel,
    written,
    B,
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
    WEIGHTS: tl.constexpr,
    MEANS: tl.constexpr,
):
    C = c_units * C_UNIT
    S = s_units * S_UNIT
    quads = tl.cdiv(C, 4)
    image, first_quad, first_position = program_of_image(C, S, BLOCK_Q, BLOCK_S, STEPS)
    if CHANNELS_LAST:
        position = first_position + tl.arange(0, BLOCK_S)[:, None]
    else:
        position = first_position + tl.arange(0, BLOCK_S)[None, :]
    weight = tl.zeros(position.shape, tl.float32)
    of_position = tl.zeros(position.shape, tl.float32)
    if MEANS:
        of_position = tl.load(by_position + image * S + position, mask=position < S, other=0.0) / C
    for w in tl.static_range(WEIGHTS):
        part = tl.load(spatial + (w * B + image) * S + position, mask=position < S, other=0.0).to(tl.float32)
        weight += 2.0 * tl.load(grad + w) * part
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
            of_mean = of_position
            if MEANS:
                of_mean = of_position + tl.load(by_channel + image * C + c, mask=c < C, other=0.0) / S
            _store_gradient(
                student, teacher, channel + image * C + c, written, at, c < C, position < S, f, weight, of_mean, MEANS
            )
        else:
            for lane in tl.static_range(4):
                c = 4 * quad + lane
                at = (image * C + c) * S + position
                of_mean = of_position
                if MEANS:
                    of_mean = of_position + tl.load(by_channel + image * C + c, mask=c < C, other=0.0) / S
                _store_gradient(
                    student,
                    teacher,
                    channel + image * C + c,
                    written,
                    at,
                    c < C,
                    position < S,
                    f[lane],
                    weight,
                    of_mean,
                    MEANS,
                )


@triton.jit
def _store_gradient(
    student, teacher, channel, written, at, in_channels, in_positions, f, weight, of_mean, MEANS: tl.constexpr
):
    within = in_channels & in_positions
    s = tl.load(student + at, mask=within, other=0.0).to(tl.float32)
    t = tl.load(teacher + at, mask=within, other=0.0).to(tl.float32)
    by_channel = tl.load(channel, mask=in_channels, other=0.0).to(tl.float32)
    result = (s - t * f) * by_channel * weight
    if MEANS:
        result += tl.where(s > 0, of_mean, tl.where(s < 0, -of_mean, 0.0))
    tl.store(written + at, result.to(written.dtype.element_ty), mask=within)
