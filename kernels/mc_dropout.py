"""Mean and variance of N dropout copies of a tensor, without making the copies (UET, arXiv 2406.06999).

    U   = (1/N) sum_k x m_k / (1 - p_k),   m_k ~ Bernoulli(1 - p_k), one per element or per (image, channel)
    out = U, x + U or (x + U) / 2
    var = (1/N) sum_k (x m_k / (1 - p_k))^2 - U^2        (population variance of the copies)

Given the masks, U = a x and var = v x^2 with factors (a, v) that depend only on how many copies of each rate keep the
element. `dropout_table` draws them with one random number an element whatever N is, and exactly.

Random numbers are a function of (seed, offset, element), where an element is its index in the logical order of the
shape: memory format, launch and threads do not matter. Triton and CUDA C++ use Philox4x32-7 (Salmon et al. 2011: seven
rounds pass BigCrush). PyTorch has no fast 32 x 32 -> 64 bit product, there it is a keyed two-stage 32-bit mixer;
so the two backends draw different numbers of the same distribution.

Shape letters: B images, C channels, n elements (or planes) that are drawn for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.dropout_table import Group, table

Mode = Literal["elementwise", "channel"]
Combine = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Dropout:
    """What a draw of N dropout copies is.

    Attributes:
        rates: probability p_k that copy k drops an element, 0 <= p_k < 1; N = len(rates) >= 1.
        seed, offset: the stream, each 0 <= n < 2^63; different pairs are independent. One seed a run and one offset
            an iteration and level is the intended use.
        mode: `elementwise`, or `channel`: whole [b, c] planes are kept or dropped.
        combine: what is returned for the mean U of the copies: `none` U, `sum` x + U, `mean` (x + U) / 2.

    Raises:
        ValueError: a value outside of these.
    """

    rates: tuple[float, ...]
    seed: int
    offset: int = 0
    mode: Mode = "elementwise"
    combine: Combine = "none"

    def __post_init__(self) -> None:
        if not self.rates or not all(0 <= rate < 1 for rate in self.rates):
            raise ValueError(f"rates must be one or more numbers in [0, 1), got {self.rates}")
        if self.seed < 0 or self.offset < 0:
            raise ValueError(f"seed and offset must not be negative, got {self.seed} and {self.offset}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}, got {self.combine!r}")


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
        ValueError: mode `channel` for a tensor of less than two dimensions, or x is not floating point.
    """
    _check(x, dropout)
    out, var = _mc_dropout(x, *_arguments(dropout), variance, compiled, backends.chosen(x))
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
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if dropout.mode == "channel" and x.dim() < 2:
        raise ValueError(f"mode 'channel' needs [B, C, ...], got {list(x.shape)}")


def _arguments(dropout: Dropout) -> tuple[list[float], int, int, str, str]:
    return list(dropout.rates), dropout.seed, dropout.offset, dropout.mode, dropout.combine


def _combined(a: Tensor, combine: str) -> Tensor:
    """Factor of the mean of the copies → factor of the result."""
    return a if combine == "none" else a + 1 if combine == "sum" else (a + 1) * 0.5


# Registration ---------------------------------------------------------------------------------------------------


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
    if backend == "triton":
        from kernels.triton import mc_dropout as kernel

        out, drawn = kernel.forward(x, table(tuple(rates), x.device), (seed, offset, mode, combine), variance)
        return out, x.new_empty(0) if drawn is None else drawn
    dropout = Dropout(tuple(rates), seed, offset, mode, combine)  # type: ignore[arg-type]
    out = torch.empty_like(x)
    var = torch.empty_like(x) if variance else x.new_empty(0)
    _forward_torch(x, dropout, out, var if variance else None, compiled)
    return out, var


@_mc_dropout.register_fake
def _(
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
    if backend == "triton":
        from kernels.triton import mc_dropout as kernel

        tables = table(tuple(rates), x.device)
        return kernel.backward(grad_out, grad_var, x, tables, (seed, offset, mode, combine))
    dropout = Dropout(tuple(rates), seed, offset, mode, combine)  # type: ignore[arg-type]
    grad = torch.empty_like(x)
    _backward_torch(grad_out, grad_var, x, dropout, grad, compiled)
    return grad


@_mc_dropout_backward.register_fake
def _(
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


# PyTorch --------------------------------------------------------------------------------------------------------

CHUNK = 1 << 17
"""Elements worked on at a time in eager mode: the temporaries of a chunk stay in the cache. A power of two."""

_LARGEST = 1 << 30
"""Elements of one compiled pass: a power of two that int32 can count."""


def _forward_torch(x: Tensor, dropout: Dropout, out: Tensor, var: Tensor | None, compiled: bool) -> None:
    run = _compiled_forward() if compiled else _forward
    flat, flat_out, flat_var = _rows(x, dropout), _rows(out, dropout), None if var is None else _rows(var, dropout)
    for at, draw in _chunks(flat, dropout, compiled):
        part_out, part_var = run(flat[at], draw, dropout.combine, var is not None)
        flat_out[at] = part_out
        if flat_var is not None and part_var is not None:
            flat_var[at] = part_var
    _restore(out, flat_out)
    if var is not None and flat_var is not None:
        _restore(var, flat_var)


def _backward_torch(
    grad_out: Tensor, grad_var: Tensor, x: Tensor, dropout: Dropout, grad: Tensor, compiled: bool
) -> None:
    run = _compiled_backward() if compiled else _backward_pass
    flat, flat_out, flat_var, result = (_rows(t, dropout) for t in (x, grad_out, grad_var, grad))
    for at, draw in _chunks(flat, dropout, compiled):
        result[at] = run(flat_out[at], flat_var[at], flat[at], draw, dropout.combine)
    _restore(grad, result)


def _forward(x: Tensor, draw: Draw, combine: str, variance: bool) -> tuple[Tensor, Tensor | None]:
    a, v = _factors(x, draw, variance)
    x = x.float()
    return x * _combined(a, combine), None if v is None else v * x * x


def _backward_pass(grad_out: Tensor, grad_var: Tensor, x: Tensor, draw: Draw, combine: str) -> Tensor:
    a, v = _factors(x, draw, variance=True)
    assert v is not None
    return grad_out.float() * _combined(a, combine) + 2 * v * x.float() * grad_var.float()


@functools.cache
def _compiled_forward() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_forward, dynamic=True)  # imports the compiler: only when somebody asks for it


@functools.cache
def _compiled_backward() -> Callable[..., Tensor]:
    return torch.compile(_backward_pass, dynamic=True)


class Draw(NamedTuple):
    """What `_factors` needs for one chunk."""

    keys: Tensor | tuple[tuple[int, int], ...]  # int32 [G, 2] (a tensor for compiled code: it is no constant)
    words: Tensor  # of `Table`
    mean: Tensor
    variance: Tensor
    groups: tuple[Group, ...]
    bits: Tensor | None = None
    """int32, one number a row that replaces the drawn ones (tests with given masks; one group only)."""


def _rows(t: Tensor, dropout: Dropout) -> Tensor:
    """[n] elements or [n, size] planes in logical order: a view where memory has that order, new memory elsewhere."""
    t = t.contiguous()
    return t.view(-1) if dropout.mode == "elementwise" else t.flatten(0, 1).flatten(1)


def _restore(t: Tensor, rows: Tensor) -> None:
    if not t.is_contiguous():
        t.copy_(rows.view(t.shape))


def _chunks(rows: Tensor, dropout: Dropout, compiled: bool) -> Iterator[tuple[slice, Draw]]:
    """Slices of the rows, and their draws."""
    tables = table(dropout.rates, rows.device)
    size = _LARGEST if compiled else CHUNK
    for start in range(0, len(rows), size):
        keys = tuple(_keys(dropout, group, start) for group in range(len(tables.groups)))
        yield (
            slice(start, min(start + size, len(rows))),
            Draw(
                torch.tensor(keys, dtype=torch.int32, device=rows.device) if compiled else keys,
                tables.words,
                tables.mean,
                tables.variance,
                tables.groups,
            ),
        )


def _factors(rows: Tensor, draw: Draw, variance: bool) -> tuple[Tensor, Tensor | None]:
    """a of every row of a chunk, and v if asked for; float32, broadcast against the rows."""
    a, v, copies = torch.empty(0), None, 0
    for number, group in enumerate(draw.groups):
        index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        bits = _random(index, draw.keys[number][0], draw.keys[number][1]) if draw.bits is None else draw.bits
        outcome = _outcome(bits, draw.words[group.start : group.start + (1 << group.bits)], group.bits)
        a_g, v_g = _values(outcome, draw, group, variance)
        a, v = (a_g, v_g) if copies == 0 else _merged(a, v, copies, a_g, v_g, group.copies)
        copies += group.copies
    if rows.dim() == 1:
        return a, v
    return a[:, None], None if v is None else v[:, None]


def _outcome(random: Tensor, words: Tensor, bits: int) -> Tensor:
    """int32 [n] random numbers → the outcome of each (see `Group`)."""
    column = _shifted(random, 32 - bits)
    coin = random.bitwise_and((1 << (32 - bits)) - 1)
    word = words.index_select(0, column)
    alias = word.bitwise_and((1 << bits) - 1)
    # where(coin < limit, column, alias), with two passes less over memory
    own = torch.lt(coin, _shifted(word, bits))
    return torch.where(own, column, alias)


def _values(outcome: Tensor, draw: Draw, group: Group, variance: bool) -> tuple[Tensor, Tensor | None]:
    if group.rate is not None:
        a = outcome * group.per_copy
        return a, outcome * (group.copies - outcome) * group.per_pair if variance else None
    columns = slice(group.start, group.start + (1 << group.bits))
    a = draw.mean[columns].index_select(0, outcome)
    return a, draw.variance[columns].index_select(0, outcome) if variance else None


def _merged(
    a: Tensor, v: Tensor | None, n: int, a2: Tensor, v2: Tensor | None, n2: int
) -> tuple[Tensor, Tensor | None]:
    """Mean and variance of n copies and n2 others together; the variance is never negative (Chan et al. 1979)."""
    w = n2 / (n + n2)
    delta = a2 - a
    if v is None or v2 is None:
        return a + w * delta, None
    return a + w * delta, (1 - w) * v + w * v2 + w * (1 - w) * delta * delta


def _random(index: Tensor, key: Any, key2: Any) -> Tensor:
    """int32 [n] → 32 random bits each, overwriting the index.

    Two bijective 32-bit mixers (xor-shift-multiply, constants of C. Wellons' hash prospector), with the first half of
    a 64-bit key before and the second half between them.
    """
    x = index.bitwise_xor_(key)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = _xor_shift(x, shift).mul_(_int32(factor))
    x = _xor_shift(x, 15).bitwise_xor_(key2)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _xor_shift(x, shift).mul_(_int32(factor))
    return _xor_shift(x, 16)


def _xor_shift(x: Tensor, shift: int) -> Tensor:
    return x.bitwise_xor_(_shifted(x, shift))


def _shifted(x: Tensor, shift: int) -> Tensor:
    """x >>> shift: the shift of int32 copies the sign, the mask takes it away again."""
    return (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _keys(dropout: Dropout, group: int, start: int) -> tuple[int, int]:
    """Key of the chunk that begins at element `start`, a multiple of the chunk's size.

    Elements of a chunk are counted from 0: with start's low bits xored into the key they count from `start`.
    """
    state = 0
    for word in (dropout.seed, dropout.offset, group, start >> 32):
        state = _mix64(state ^ word)
    return _int32(state ^ start), _int32(state >> 32)


def _mix64(z: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014)."""
    z = (z + 0x9E3779B97F4A7C15) % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


def _int32(bits: int) -> int:
    """The low 32 bits, as a signed number."""
    return (bits + (1 << 31)) % (1 << 32) - (1 << 31)
