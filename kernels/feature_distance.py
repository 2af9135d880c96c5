"""Attention-weighted squared distance of feature maps (FGD, Yang et al., CVPR 2022), several weights in one read.

    D_w = sum_{b,c,s} spatial[w, b, s] * channel[b, c] * (S - T')^2        w = 1..W, e.g. foreground and background
    T'  = T, or UET's uncertain teacher T, U or their combination (`kernels.mc_dropout`), formed on the fly

No map is made besides the student's gradient: forward reads S and T once, backward reads both again, draws T' again
and writes dS = 2 * (sum_w g_w spatial[w, b, s]) * channel[b, c] * (S - T'). Everything but S is constant.

Shape letters: W weights, B images, C channels, h, w the map, S its h * w positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.dropout import (
    NO_DRAW,
    Dropout,
    Stream,
    all_factors,
    chunk_factors,
    chunks,
    compiled_once,
    fits_a_chunk,
    stream,
)


def feature_distance(
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    *,
    dropout: Dropout | None = None,
    compiled: bool = False,
) -> Tensor:
    """Weighted sums of squared differences, not divided by anything.

    Args:
        student: float32, bfloat16 or float16 [B, C, h, w]; computed in float32.
        teacher: the same shape; no gradient.
        spatial: float [B, h, w], or [W, B, h, w] for W sums from one read; no gradient.
        channel: float [B, C]; no gradient.
        dropout: replaces the teacher by `mc_dropout(teacher, dropout)[0]` (computed in float32).
        compiled: on the PyTorch path, run the passes through torch.compile. The draw is the same.

    Returns:
        float32 scalar, or [W]. Gradient reaches `student` only.

    Raises:
        ValueError: the shapes do not agree.
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must both be [B, C, h, w]")
    B, C, h, w = student.shape
    if spatial.dim() not in (3, 4) or spatial.shape[-3:] != (B, h, w):
        raise ValueError(f"spatial must be {[B, h, w]} or [W, {B}, {h}, {w}], got {list(spatial.shape)}")
    if channel.shape != (B, C):
        raise ValueError(f"channel must be {[B, C]}, got {list(channel.shape)}")
    draw = NO_DRAW if dropout is None else dropout.arguments()
    sums = _feature_distance(
        student,
        teacher.detach(),
        spatial.detach() if spatial.dim() == 4 else spatial.detach()[None],
        channel.detach(),
        *draw,
        compiled,
        backends.chosen(student),
    )
    return sums if spatial.dim() == 4 else sums[0]


def reference(student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    """The specification, by autograd and without dropout: give it `mc_dropout(teacher, dropout)[0]`."""
    weighted = channel[:, :, None, None] * (student - teacher.detach()).square()  # [B, C, h, w]
    return (spatial * weighted.sum(1)).sum((-3, -2, -1))


# Registration ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::feature_distance", mutates_args=())
def _feature_distance(
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    compiled: bool,
    backend: str,
) -> Tensor:
    """[W] float32. No rates: no dropout."""
    dropout = Dropout.of(rates, seed, offset, mode, combine) if rates else None
    if backend == "triton":
        from kernels.triton import feature_distance as kernel

        return kernel.forward(student, teacher, spatial, channel, dropout)
    B, C = channel.shape
    whole = compiled or fits_a_chunk(student)
    draw = stream(dropout, B, student.device, whole=whole) if dropout else None
    run = compiled_once(_whole_sums) if compiled else _whole_sums if whole else _sums
    S = student.shape[2] * student.shape[3]
    maps = student.reshape(B, C, S), teacher.reshape(B, C, S)
    return run(*maps, spatial.reshape(len(spatial), B, S).float(), channel.float(), draw)


@_feature_distance.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    compiled: bool,
    backend: str,
) -> Tensor:
    return student.new_empty(spatial.shape[0], dtype=torch.float32)


@torch.library.custom_op("detector_kernels::feature_distance_backward", mutates_args=())
def _feature_distance_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    compiled: bool,
    backend: str,
) -> Tensor:
    """Gradient of the student, its shape, dtype and memory format."""
    dropout = Dropout.of(rates, seed, offset, mode, combine) if rates else None
    if backend == "triton":
        from kernels.triton import feature_distance as kernel

        return kernel.backward(grad, student, teacher, spatial, channel, dropout)
    B, C = channel.shape
    whole = compiled or fits_a_chunk(student)
    draw = stream(dropout, B, student.device, whole=whole) if dropout else None
    S = student.shape[2] * student.shape[3]
    weight = torch.tensordot(2 * grad, spatial.reshape(len(spatial), B, S).float(), dims=1)  # [B, S]
    run = compiled_once(_whole_gradient) if compiled else _whole_gradient if whole else _gradient
    rows = run(student.reshape(B, C, S), teacher.reshape(B, C, S), weight, channel.float(), draw).view(student.shape)
    return rows if rows.stride() == student.stride() else torch.empty_like(student).copy_(rows)


@_feature_distance_backward.register_fake
def _(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    compiled: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(student)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rates, ctx.seed, ctx.offset, ctx.mode, ctx.combine, ctx.compiled, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    draw = ctx.rates, ctx.seed, ctx.offset, ctx.mode, ctx.combine
    return _feature_distance_backward(grad, *ctx.saved_tensors, *draw, ctx.compiled, ctx.backend), *[None] * 10


_feature_distance.register_autograd(_backward, setup_context=_setup)


# PyTorch. student, teacher [B, C, S]; spatial [W, B, S]; channel [B, C]; weight [B, S] ----------------------------


def _sums(student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor, draw: Stream | None) -> Tensor:
    B, C, S = student.shape
    inner = student.new_zeros(B, S, dtype=torch.float32)  # sum over the channels
    for image, channels in chunks(B, C, S):
        d = _difference(student, teacher, draw, image, channels)
        inner[image].addmv_(d.mul_(d).T, channel[image, channels])
    return torch.mv(spatial.flatten(1), inner.flatten())


def _gradient(student: Tensor, teacher: Tensor, weight: Tensor, channel: Tensor, draw: Stream | None) -> Tensor:
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    for image, channels in chunks(*student.shape):
        d = _difference(student, teacher, draw, image, channels)
        d.mul_(channel[image, channels, None])
        if grad.dtype == d.dtype:
            torch.mul(d, weight[image], out=grad[image, channels])
        else:
            grad[image, channels] = d.mul_(weight[image])
    return grad


def _difference(student: Tensor, teacher: Tensor, draw: Stream | None, image: int, channels: slice) -> Tensor:
    """S - T' of some channels of one image, float32 [c, S], new memory."""
    s, t = student[image, channels].float(), teacher[image, channels].float()
    if draw is None:
        return s - t
    f, _ = chunk_factors(draw, image, channels, s.shape[1], variance=False)
    return torch.addcmul(s, t, f, value=-1)


def _whole_sums(student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor, draw: Stream | None) -> Tensor:
    d = student.float() - _target(teacher, draw)
    inner = (d * d * channel[:, :, None]).sum(1)
    return (spatial * inner).sum((1, 2))


def _whole_gradient(student: Tensor, teacher: Tensor, weight: Tensor, channel: Tensor, draw: Stream | None) -> Tensor:
    d = student.float() - _target(teacher, draw)
    return (d * channel[:, :, None] * weight[:, None]).to(student.dtype)


def _target(teacher: Tensor, draw: Stream | None) -> Tensor:
    if draw is None:
        return teacher.float()
    f, _ = all_factors(draw, teacher.shape[1], teacher.shape[2], variance=False)
    return teacher.float() * f
