"""Attention-weighted squared distance of feature maps (FGD, Yang et al., CVPR 2022), several weights in one read.

    feature_distance(...)             the distances
    feature_distance_and_means(...)   and the student's `kernels.ops.attention_stats`, with one gradient pass for all

    D_w = sum_{b,c,s} spatial[w, b, s] * channel[b, c] * (S - T')^2        w = 1..W, e.g. foreground and background
    T'  = T, or UET's uncertain teacher T, U or their combination (`kernels.ops.mc_dropout`), formed on the fly

No map is made besides the student's gradient: forward reads S and T once, backward reads both again, draws T' again
and writes dS = 2 * (sum_w g_w spatial[w, b, s]) * channel[b, c] * (S - T'), for the means of |S| with sign(S) *
(g_spatial / C + g_channel / (h w)) on top. Everything but S is constant.

Shape letters: W weights, B images, C channels, h, w the map, S its h * w positions; R rows of L elements
(`kernels.common.rows`; the teacher's are taken in the order of the student's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.autocast import without_autocast
from kernels.common.dropout import NO_DRAW, Dropout, Stream, all_factors, chunk_factors
from kernels.common.rows import chunks, from_rows, to_rows
from kernels.common.torch_pass import torch_pass


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
    sums, _, _ = _checked(student, teacher, spatial, channel, dropout, False, compiled)
    return sums if spatial.dim() == 4 else sums[0]


def feature_distance_and_means(
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    *,
    dropout: Dropout | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`feature_distance`, and `attention_stats(student)`: what FGD asks of a student's map, in fewer reads of it.

    Arguments and errors as of `feature_distance`, and ValueError when C, h or w is 0.

    Returns:
        sums, float32 scalar or [W]; mean of |S| over the channels, float32 [B, h, w], and over the positions, [B, C].
        All are differentiable in `student`.
    """
    if student.dim() == 4 and 0 in student.shape[1:]:
        raise ValueError(f"student must be [B, C, h, w] with C, h, w > 0, got {list(student.shape)}")
    sums, by_position, by_channel = _checked(student, teacher, spatial, channel, dropout, True, compiled)
    return sums if spatial.dim() == 4 else sums[0], by_position, by_channel


def reference(student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
    """The specification, by autograd and without dropout: give it `mc_dropout(teacher, dropout)[0]`."""
    weighted = channel[:, :, None, None] * (student - teacher.detach()).square()  # [B, C, h, w]
    return (spatial * weighted.sum(1)).sum((-3, -2, -1))


def _checked(
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    dropout: Dropout | None,
    means: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the registered operator after checks: [W], [B, h, w] and [B, C], the last two empty without `means`."""
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} must both be [B, C, h, w]")
    B, C, h, w = student.shape
    if spatial.dim() not in (3, 4) or spatial.shape[-3:] != (B, h, w):
        raise ValueError(f"spatial must be {[B, h, w]} or [W, {B}, {h}, {w}], got {list(spatial.shape)}")
    if channel.shape != (B, C):
        raise ValueError(f"channel must be {[B, C]}, got {list(channel.shape)}")
    draw = NO_DRAW if dropout is None else dropout.arguments()
    results: tuple[Tensor, Tensor, Tensor] = _feature_distance(
        student,
        teacher.detach(),
        spatial.detach() if spatial.dim() == 4 else spatial.detach()[None],
        channel.detach(),
        *draw,
        means,
        compiled,
        backends.chosen(student),
    )
    return results


# --- registration ------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::feature_distance", mutates_args=())
@without_autocast
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
    means: bool,
    compiled: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """[W], and with `means` [B, h, w] and [B, C] (else empty), float32. No rates: no dropout."""
    dropout = Dropout.of(rates, seed, offset, mode, combine) if rates else None
    if backend == "triton":
        from kernels.triton import attention_stats as attention_kernel
        from kernels.triton import feature_distance as kernel

        sums = kernel.forward(student, teacher, spatial, channel, dropout)
        return sums, *(attention_kernel.forward(student, None) if means else _no_means(student))
    B, C, h, w = student.shape
    run, draw, last = torch_pass(student, dropout, compiled, by_chunks=_sums, at_once=_whole_sums)
    maps = to_rows(student, B, C, h * w, last), to_rows(teacher, B, C, h * w, last)
    weights = spatial.reshape(len(spatial), B, h * w).float(), channel.float()
    sums, of_rows, of_columns = run(*maps, *weights, draw, means, last)
    by_position, by_channel = (of_rows, of_columns) if last else (of_columns, of_rows)
    return sums, by_position.view(B, h, w) if means else by_position, by_channel


@_feature_distance.register_fake
def _(student: Tensor, teacher: Tensor, spatial: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, C, h, w = student.shape
    means = others[6]
    sums = student.new_empty(spatial.shape[0], dtype=torch.float32)
    if not means:
        return sums, *_no_means(student)
    return sums, sums.new_empty(B, h, w), sums.new_empty(B, C)


def _no_means(student: Tensor) -> tuple[Tensor, Tensor]:
    return student.new_empty(0, dtype=torch.float32), student.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("detector_kernels::feature_distance_backward", mutates_args=())
@without_autocast
def _feature_distance_backward(
    grad: Tensor,
    grad_spatial: Tensor,
    grad_channel: Tensor,
    student: Tensor,
    teacher: Tensor,
    spatial: Tensor,
    channel: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    means: bool,
    compiled: bool,
    backend: str,
) -> Tensor:
    """Gradient of the student, its shape, dtype and memory format."""
    dropout = Dropout.of(rates, seed, offset, mode, combine) if rates else None
    if backend == "triton":
        from kernels.triton import feature_distance as kernel

        of_means = (grad_spatial, grad_channel) if means else None
        return kernel.backward(grad, student, teacher, spatial, channel, dropout, of_means)
    B, C = channel.shape
    S = student.shape[2] * student.shape[3]
    run, draw, last = torch_pass(student, dropout, compiled, by_chunks=_gradient, at_once=_whole_gradient)

    def of_rows_and_columns(by_position: Tensor, by_channel: Tensor) -> tuple[Tensor, Tensor]:
        return (by_position, by_channel) if last else (by_channel, by_position)

    weight = torch.tensordot(2 * grad, spatial.reshape(len(spatial), B, S).float(), dims=1)  # [B, S]
    weights = of_rows_and_columns(weight, channel.float())
    of_means = of_rows_and_columns(grad_spatial.reshape(B, S) / C, grad_channel / S) if means else None
    maps = to_rows(student, B, C, S, last), to_rows(teacher, B, C, S, last)
    return from_rows(run(*maps, *weights, draw, of_means), student, last)


@_feature_distance_backward.register_fake
def _(grad: Tensor, grad_spatial: Tensor, grad_channel: Tensor, student: Tensor, *others: object) -> Tensor:
    return torch.empty_like(student)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor, grad_spatial: Tensor, grad_channel: Tensor) -> tuple[Tensor | None, ...]:
    grads = grad, grad_spatial, grad_channel
    return _feature_distance_backward(*grads, *ctx.saved_tensors, *ctx.settings), *[None] * 11


_feature_distance.register_autograd(_backward, setup_context=_setup)


# PyTorch. student, teacher [B, R, L]; spatial [W, B, S]; channel [B, C]; the mean of |S| over every row and column,
# [B, R] and [B, L], or both empty; weights of the gradient's rows and columns, the product of which is 2 * (sum_w g_w
# spatial) * channel; of_means: what is added to sign(S), by row and by column, or None ------------------------------


def _sums(
    student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor, draw: Stream | None, means: bool, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, R, L = student.shape
    inner = torch.zeros_like(spatial[0])  # sum over the channels, [B, S]
    of_rows, of_columns = (inner.new_empty(B, R), inner.new_zeros(B, L)) if means else _no_means(student)
    for image, rows in chunks(B, R, L):
        d = _difference(student, teacher, draw, image, rows)
        if last:
            torch.mv(d.mul_(d), channel[image], out=inner[image, rows])
        else:
            inner[image].addmv_(d.mul_(d).T, channel[image, rows])
        if means:
            size = torch.abs(student[image, rows].float(), out=d)
            of_columns[image] += size.sum(0)
            torch.mean(size, 1, out=of_rows[image, rows])
    return torch.mv(spatial.flatten(1), inner.flatten()), of_rows, of_columns.div_(R)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    draw: Stream | None,
    of_means: tuple[Tensor, Tensor] | None,
) -> Tensor:
    B, R, L = student.shape
    grad = student.new_empty(B, R, L)
    for image, rows in chunks(B, R, L):
        d = _difference(student, teacher, draw, image, rows)
        d.mul_(row_weight[image, rows, None])
        if of_means is not None:
            of_rows, of_columns = of_means
            size = of_columns[image] + of_rows[image, rows, None]
            grad[image, rows] = d.mul_(column_weight[image]).addcmul_(student[image, rows].sign().float(), size)
        elif grad.dtype == d.dtype:
            torch.mul(d, column_weight[image], out=grad[image, rows])
        else:
            grad[image, rows] = d.mul_(column_weight[image])
    return grad


def _difference(student: Tensor, teacher: Tensor, draw: Stream | None, image: int, rows: slice) -> Tensor:
    """S - T' of some rows of one image, float32 [r, L], new memory."""
    s, t = student[image, rows].float(), teacher[image, rows].float()
    if draw is None:
        return s - t
    f, _ = chunk_factors(draw, image, rows, (student.shape[1], student.shape[2]), variance=False)
    return torch.addcmul(s, t, f, value=-1)


def _whole_sums(
    student: Tensor, teacher: Tensor, spatial: Tensor, channel: Tensor, draw: Stream | None, means: bool, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d = student.float() - _target(teacher, draw)
    inner = (d * d * channel[:, None]).sum(2) if last else (d * d * channel[:, :, None]).sum(1)
    sums = (spatial * inner).sum((1, 2))
    if not means:
        return sums, *_no_means(student)
    size = student.float().abs()
    return sums, size.mean(2), size.mean(1)


def _whole_gradient(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    draw: Stream | None,
    of_means: tuple[Tensor, Tensor] | None,
) -> Tensor:
    d = student.float() - _target(teacher, draw)
    grad = d * row_weight[:, :, None] * column_weight[:, None]
    if of_means is not None:
        of_rows, of_columns = of_means
        grad = grad + student.float().sign() * (of_columns[:, None] + of_rows[:, :, None])
    return grad.to(student.dtype)


def _target(teacher: Tensor, draw: Stream | None) -> Tensor:
    if draw is None:
        return teacher.float()
    f, _ = all_factors(draw, (teacher.shape[1], teacher.shape[2]), variance=False)
    return teacher.float() * f
