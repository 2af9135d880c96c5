"""Spatial and channel means of |x| in one read: what FGD's attention is made of (Yang et al., CVPR 2022, equation 4).

    spatial[b, s] = (1/C) sum_c |x'[b, c, s]|,     channel[b, c] = (1/S) sum_s |x'[b, c, s]|
    x' = x, or the combination with dropout copies that `kernels.ops.mc_dropout` returns, formed on the fly

Backward: dx = sign(x) f (g_spatial / C + g_channel / S) with the factor f = x' / x >= 0 drawn again; 0 where x is 0.

Shape letters: B images, C channels, h, w the map, S its h * w positions; R rows of L elements (`kernels.common.rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.dropout import NO_DRAW, Dropout, Stream, all_factors, chunk_factors
from kernels.common.rows import chunks, from_rows, to_rows
from kernels.common.torch_pass import torch_pass


def attention_stats(x: Tensor, *, dropout: Dropout | None = None, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Mean of |x'| over the channels and over the positions.

    Args:
        x: float32, bfloat16 or float16 [B, C, h, w], none of them 0; computed in float32.
        dropout: take x' = `mc_dropout(x, dropout)[0]` (in float32) in place of x.
        compiled: on the PyTorch path, run the passes through torch.compile. The draw is the same.

    Returns:
        float32 [B, h, w] and [B, C], differentiable in x.

    Raises:
        ValueError: x is not [B, C, h, w], or C, h or w is 0.
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be [B, C, h, w] with C, h, w > 0, got {list(x.shape)}")
    draw = NO_DRAW if dropout is None else dropout.arguments()
    return _attention_stats(x, *draw, compiled, backends.chosen(x))


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The specification, by autograd and without dropout: give it `mc_dropout(x, dropout)[0]`."""
    return x.abs().mean(1), x.abs().mean((2, 3))


# --- registration ------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::attention_stats", mutates_args=())
def _attention_stats(
    x: Tensor, rates: list[float], seed: int, offset: int, mode: str, combine: str, compiled: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """No rates: no dropout."""
    dropout = Dropout.of(rates, seed, offset, mode, combine) if rates else None
    if backend == "triton":
        from kernels.triton import attention_stats as kernel

        return kernel.forward(x, dropout)
    B, C, h, w = x.shape
    run, draw, last = torch_pass(x, dropout, compiled, by_chunks=_means, at_once=_whole_means)
    of_rows, of_columns = run(to_rows(x, B, C, h * w, last), draw)
    spatial, channel = (of_rows, of_columns) if last else (of_columns, of_rows)
    return spatial.view(B, h, w), channel


@_attention_stats.register_fake
def _(x: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    B, C, h, w = x.shape
    return x.new_empty(B, h, w, dtype=torch.float32), x.new_empty(B, C, dtype=torch.float32)


@torch.library.custom_op("detector_kernels::attention_stats_backward", mutates_args=())
def _attention_stats_backward(
    grad_spatial: Tensor,
    grad_channel: Tensor,
    x: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    compiled: bool,
    backend: str,
) -> Tensor:
    """Gradient of x, its shape, dtype and memory format."""
    dropout = Dropout.of(rates, seed, offset, mode, combine) if rates else None
    if backend == "triton":
        from kernels.triton import attention_stats as kernel

        return kernel.backward(grad_spatial, grad_channel, x, dropout)
    B, C, h, w = x.shape
    run, draw, last = torch_pass(x, dropout, compiled, by_chunks=_gradient, at_once=_whole_gradient)
    by_position, by_channel = grad_spatial.reshape(B, h * w) / C, grad_channel / (h * w)
    weights = (by_position, by_channel) if last else (by_channel, by_position)
    return from_rows(run(*weights, to_rows(x, B, C, h * w, last), draw), x, last)


@_attention_stats_backward.register_fake
def _(grad_spatial: Tensor, grad_channel: Tensor, x: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.rates, ctx.seed, ctx.offset, ctx.mode, ctx.combine, ctx.compiled, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad_spatial: Tensor, grad_channel: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    draw = ctx.rates, ctx.seed, ctx.offset, ctx.mode, ctx.combine
    grad = _attention_stats_backward(grad_spatial, grad_channel, x, *draw, ctx.compiled, ctx.backend)
    return grad, *[None] * 7


_attention_stats.register_autograd(_backward, setup_context=_setup)


# PyTorch. x [B, R, L]; of_rows [B, R]; of_columns [B, L] ----------------------------------------------------------


def _means(x: Tensor, draw: Stream | None) -> tuple[Tensor, Tensor]:
    B, R, L = x.shape
    of_rows = x.new_empty(B, R, dtype=torch.float32)
    of_columns = x.new_zeros(B, L, dtype=torch.float32)
    for image, rows in chunks(B, R, L):
        part = x[image, rows].abs().float()
        if draw is not None:
            part = part * chunk_factors(draw, image, rows, (R, L), variance=False)[0]
        of_columns[image] += part.sum(0)
        torch.mean(part, 1, out=of_rows[image, rows])
    return of_rows, of_columns.div_(R)


def _gradient(of_rows: Tensor, of_columns: Tensor, x: Tensor, draw: Stream | None) -> Tensor:
    B, R, L = x.shape
    grad = x.new_empty(B, R, L)
    for image, rows in chunks(B, R, L):
        weight = of_columns[image] + of_rows[image, rows, None]
        if draw is not None:
            weight = weight * chunk_factors(draw, image, rows, (R, L), variance=False)[0]
        grad[image, rows] = weight.mul_(x[image, rows].sign())
    return grad


def _whole_means(x: Tensor, draw: Stream | None) -> tuple[Tensor, Tensor]:
    size = x.float().abs()
    if draw is not None:
        size = size * all_factors(draw, (x.shape[1], x.shape[2]), variance=False)[0]
    return size.mean(2), size.mean(1)


def _whole_gradient(of_rows: Tensor, of_columns: Tensor, x: Tensor, draw: Stream | None) -> Tensor:
    weight = (of_columns[:, None] + of_rows[:, :, None]) * x.float().sign()
    if draw is not None:
        weight = weight * all_factors(draw, (x.shape[1], x.shape[2]), variance=False)[0]
    return weight.to(x.dtype)
