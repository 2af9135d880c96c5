"""Mean and variance of N dropout copies of a tensor, without making the copies (UET, arXiv 2406.06999).

    U   = (1/N) sum_k x m_k / (1 - p_k),   m_k ~ Bernoulli(1 - p_k), one per element or per (image, channel)
    out = U, x + U or (x + U) / 2
    var = (1/N) sum_k (x m_k / (1 - p_k))^2 - U^2        (population variance of the copies)

Given the masks, U = a x and var = v x^2 with factors (a, v) that depend only on how many copies of each rate keep the
element. `dropout_table` draws them with one random number an element whatever N is, and exactly.

Random numbers are a function of (seed, offset, element), where an element is its place in the logical order of the
shape: memory format, launch and threads do not matter. The Triton kernels use Philox4x32-7 (Salmon et al. 2011: seven
rounds pass BigCrush), PyTorch a cheaper mixer (`kernels.common.dropout`): other numbers of the same distribution.

Shape letters: B images, C channels, S positions; R rows of L elements (`kernels.common.rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.dropout import Combine, Stream, all_factors, chunk_factors, three_dimensions
from kernels.common.dropout import Dropout as Dropout  # part of this module's interface
from kernels.common.rows import chunks, from_rows, to_rows
from kernels.common.torch_pass import torch_pass


def mc_dropout(
    x: Tensor, dropout: Dropout, *, variance: bool = True, compiled: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Mean (combined with x as `dropout.combine` says) and variance over the dropout copies of x.

    Args:
        x: float32, bfloat16 or float16, any shape; [B, C, ...] for mode `channel`. Computed in float32.
        dropout: the draw.
        variance: also return the variance of the copies.
        compiled: on the PyTorch path, run the pass through torch.compile. The numbers are the same.

    Returns:
        out and var (None without `variance`), shape, dtype and memory format of x. Both are differentiable in x; the
        backward pass draws again and keeps no mask.

    Raises:
        ValueError: mode `channel` for a tensor of less than two dimensions, or too large for 32-bit counters (2^31
            elements an image), or of another dtype.
    """
    _check(x, dropout)
    out, var = _mc_dropout(x, *dropout.arguments(), variance, compiled, backends.chosen(x, has_cuda=True))
    return out, var if variance else None


def reference(x: Tensor, kept: Tensor, rates: tuple[float, ...], combine: Combine = "none") -> tuple[Tensor, Tensor]:
    """The specification for given masks.

    Args:
        x: float [...].
        kept: bool or float [N, ...], m_k; broadcast against x ([N, B, C, 1, 1] for mode `channel`).
        rates: N numbers p_k.
        combine: as in `Dropout`.

    Returns:
        out and var as of `mc_dropout`.
    """
    scale = torch.tensor([1 / (1 - rate) for rate in rates], dtype=x.dtype, device=x.device)
    copies = x * kept * scale.view(-1, *[1] * x.dim())
    mean = copies.mean(0)
    out = mean if combine == "none" else x + mean if combine == "sum" else (x + mean) / 2
    return out, copies.var(0, unbiased=False)


def _check(x: Tensor, dropout: Dropout) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if dropout.mode == "channel" and x.dim() < 2:
        raise ValueError(f"mode 'channel' needs [B, C, ...], got {list(x.shape)}")
    three_dimensions(x, dropout.mode)


# --- registration ------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::mc_dropout", mutates_args=())
def _mc_dropout(
    x: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    variance: bool,
    compiled: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out, and var or an empty tensor."""
    dropout = Dropout.of(rates, seed, offset, mode, combine)
    if backend != "torch":
        if backend == "cuda":
            from kernels.ops.cuda import mc_dropout as forward
        else:
            from kernels.triton.mc_dropout import forward
        out, drawn = forward(x, dropout, variance)
        return out, x.new_empty(0) if drawn is None else drawn
    B, C, S = three_dimensions(x, dropout.mode)
    run, draw, last = torch_pass(x, dropout, compiled, by_chunks=_moments, at_once=_whole_moments, images=B)
    out, var = run(to_rows(x, B, C, S, last), draw, variance)
    return from_rows(out, x, last), x.new_empty(0) if var is None else from_rows(var, x, last)


@_mc_dropout.register_fake
def _(x: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    variance = settings[5]
    return torch.empty_like(x), torch.empty_like(x) if variance else x.new_empty(0)


@torch.library.custom_op("detector_kernels::mc_dropout_backward", mutates_args=())
def _mc_dropout_backward(
    grad_out: Tensor,
    grad_var: Tensor,
    x: Tensor,
    rates: list[float],
    seed: int,
    offset: int,
    mode: str,
    combine: str,
    compiled: bool,
    backend: str,
) -> Tensor:
    """d out / d x = a (combined), d var / d x = 2 v x."""
    dropout = Dropout.of(rates, seed, offset, mode, combine)
    if backend == "cuda":
        from kernels.ops.cuda import mc_dropout_backward

        return mc_dropout_backward(grad_out, grad_var, x, dropout)
    if backend == "triton":
        from kernels.triton.mc_dropout import backward

        return backward(grad_out, grad_var, x, dropout)
    B, C, S = three_dimensions(x, dropout.mode)
    run, draw, last = torch_pass(x, dropout, compiled, by_chunks=_gradient, at_once=_whole_gradient, images=B)
    to_out, to_var, rows = (to_rows(t, B, C, S, last) for t in (grad_out, grad_var, x))
    return from_rows(run(to_out, to_var, rows, draw), x, last)


@_mc_dropout_backward.register_fake
def _(grad_out: Tensor, grad_var: Tensor, x: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.draw, ctx.variance, ctx.compiled, ctx.backend = inputs
    ctx.save_for_backward(*[x] * ctx.variance)  # the mean alone is linear in x: nothing to keep


def _backward(ctx: Any, grad_out: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.variance:
        (x,) = ctx.saved_tensors
        grad = _mc_dropout_backward(grad_out, grad_var, x, *ctx.draw, ctx.compiled, ctx.backend)
    else:
        grad, _ = _mc_dropout(grad_out, *ctx.draw, False, ctx.compiled, ctx.backend)
    return grad, *[None] * 8


_mc_dropout.register_autograd(_backward, setup_context=_setup)


# PyTorch. x, grad_out, grad_var [B, R, L] ------------------------------------------------------------------------


def _moments(x: Tensor, draw: Stream, variance: bool) -> tuple[Tensor, Tensor | None]:
    B, R, L = x.shape
    out = x.new_empty(B, R, L)
    var = x.new_empty(B, R, L) if variance else None
    for image, rows in chunks(B, R, L):
        part = x[image, rows].float()
        f, v = chunk_factors(draw, image, rows, (R, L), variance=variance)
        out[image, rows] = part * f
        if var is not None and v is not None:
            var[image, rows] = (part * v).mul_(part)
    return out, var


def _gradient(grad_out: Tensor, grad_var: Tensor, x: Tensor, draw: Stream) -> Tensor:
    B, R, L = x.shape
    grad = x.new_empty(B, R, L)
    for image, rows in chunks(B, R, L):
        f, v = chunk_factors(draw, image, rows, (R, L), variance=True)
        assert v is not None
        through_var = (x[image, rows].float() * v).mul_(grad_var[image, rows])
        grad[image, rows] = (grad_out[image, rows].float() * f).add_(through_var, alpha=2)
    return grad


def _whole_moments(x: Tensor, draw: Stream, variance: bool) -> tuple[Tensor, Tensor | None]:
    f, v = all_factors(draw, (x.shape[1], x.shape[2]), variance=variance)
    return (x.float() * f).to(x.dtype), None if v is None else (v * x.float() * x.float()).to(x.dtype)


def _whole_gradient(grad_out: Tensor, grad_var: Tensor, x: Tensor, draw: Stream) -> Tensor:
    f, v = all_factors(draw, (x.shape[1], x.shape[2]), variance=True)
    assert v is not None
    return (grad_out.float() * f + 2 * v * x.float() * grad_var.float()).to(x.dtype)
