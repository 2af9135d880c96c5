"""MC-dropout draws, and drawing them with PyTorch (the kernels' way: `kernels.triton.dropout`).

The random number of an element is a function of (seed, offset) and of its place in the logical order of the shape:
memory format, chunks and threads do not matter. PyTorch has no fast 32 x 32 -> 64 bit product, so in place of Philox
it is a keyed two-stage 32-bit mixer: the backends draw different numbers of one distribution.

Shape letters: B images, C channels, S positions, G groups of copies; R rows of L elements (`kernels.common.rows`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.common.dropout_table import Group, Table, table

Mode = Literal["elementwise", "channel"]
Combine = Literal["none", "sum", "mean"]


@dataclass(frozen=True)
class Dropout:
    """Parameters of a draw of N dropout copies.

    Attributes:
        rates: probability p_k that copy k drops an element, 0 <= p_k < 1; N = len(rates) >= 1.
        seed, offset: the stream, 0 <= seed < 2^63 and 0 <= offset < 2^56; different pairs are independent. Meant: one
            seed a run, one offset an iteration and level.
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
        if not (0 <= self.seed < 1 << 63 and 0 <= self.offset < 1 << 56):
            raise ValueError(f"seed must be in 0..2^63 and offset in 0..2^56, got {self.seed} and {self.offset}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}, got {self.combine!r}")

    @classmethod
    def of(cls, rates: Sequence[float], seed: int, offset: int, mode: str, combine: str) -> Dropout:
        """The inverse of `arguments`."""
        return cls(tuple(rates), seed, offset, mode, combine)  # type: ignore[arg-type]  # checked by __post_init__

    def arguments(self) -> tuple[list[float], int, int, str, str]:
        """Return what goes through the schema of a registered operator."""
        return list(self.rates), self.seed, self.offset, self.mode, self.combine


NO_DRAW: tuple[list[float], int, int, str, str] = ([], 0, 0, "elementwise", "none")
"""`Dropout.arguments` of an operator that is called without a dropout."""


@dataclass(frozen=True)
class Stream:
    """A draw for B images on a device.

    keys: of every image and group a pair; of ints for eager code, an int32 tensor [B, G, 2] for compiled code (there
        an int would be a constant).
    last: the rows are of channels last.
    """

    keys: Any
    tables: Table
    mode: Mode
    combine: Combine
    last: bool


def three_dimensions(x: Tensor, mode: str = "elementwise") -> tuple[int, int, int]:
    """B, C, S of a tensor of any shape. Fewer than three dimensions: rows are channels, a vector is one row.

    Raises:
        ValueError: 2^31 or more elements an image, or positions and quads of channels that int32 cannot count.
    """
    if x.dim() >= 3 or (x.dim() == 2 and mode == "channel"):
        B, C = x.shape[:2]
        S = x[0, 0].numel() if x.numel() else 0
    else:
        B, C, S = 1, x.shape[0] if x.dim() == 2 else 1, x.shape[-1] if x.dim() else 1
    if C * S >= 1 << 31 or B * (C + 3) // 4 >= 1 << 31:
        raise ValueError(f"too large to count with 32 bits: {list(x.shape)}")
    return B, C, S


def stream(dropout: Dropout, images: int, device: torch.device, *, whole: bool, last: bool) -> Stream:
    """The draw of a dropout for so many images; `whole` for `all_factors`, else for `chunk_factors`."""
    tables = table(dropout.rates, device)
    keys: Any = tuple(
        tuple(_key(dropout, image, group) for group in range(len(tables.groups))) for image in range(images)
    )
    if whole:
        keys = torch.tensor(keys, dtype=torch.int32, device=device).view(images, len(tables.groups), 2)
    return Stream(keys, tables, dropout.mode, dropout.combine, last)


def chunk_factors(
    draw: Stream, image: int, rows: slice, size: tuple[int, int], *, variance: bool
) -> tuple[Tensor, Tensor | None]:
    """Factors of some of the rows of one image, float32 [r, L]; for mode `channel` [r, 1], or [1, L] with channels
    last. Eager.

    size: (R, L) of the whole image.

    Returns:
        f with result = f x, and v with variance = v x^2 (None without `variance`).
    """
    return _factors(_places(draw, rows.start, rows.stop, size), draw.keys[image], draw, variance)


def all_factors(draw: Stream, size: tuple[int, int], *, variance: bool) -> tuple[Tensor, Tensor | None]:
    """Draw the same for all rows of all images, float32 [B, R, L] ([B, R, 1] or [B, 1, L]): for compiled code and for
    small maps."""
    keys = [(draw.keys[:, g, 0, None, None], draw.keys[:, g, 1, None, None]) for g in range(len(draw.tables.groups))]
    return _factors(_places(draw, 0, size[0], size), keys, draw, variance)


def _places(draw: Stream, start: int, stop: int, size: tuple[int, int]) -> Tensor:
    """int32, shaped like the factors of these rows: the number of an element, or of its channel, in logical order."""
    R, L = size
    count = functools.partial(torch.arange, dtype=torch.int32, device=draw.tables.words.device)
    if draw.mode == "channel":
        return count(L).view(1, L) if draw.last else count(start, stop).view(stop - start, 1)
    if draw.last:
        return count(start, stop)[:, None] + count(L) * R
    return count(start * L, stop * L).view(stop - start, L)


def _factors(index: Tensor, keys: Any, draw: Stream, variance: bool) -> tuple[Tensor, Tensor | None]:
    a, v, copies = torch.empty(0), None, 0
    for (key, key2), group in zip(keys, draw.tables.groups, strict=True):
        random = _random(index, key, key2)
        outcome = _outcome(random, draw.tables.words[group.start : group.start + (1 << group.bits)], group.bits)
        a_g, v_g = _values(outcome, draw.tables, group, variance)
        a, v = (a_g, v_g) if copies == 0 else _merged(a, v, copies, a_g, v_g, group.copies)
        copies += group.copies
    return combined(a, draw.combine), v


def combined(a: Tensor, combine: str) -> Tensor:
    """Factor of the mean of the copies → factor of the result."""
    return a if combine == "none" else a + 1 if combine == "sum" else (a + 1) * 0.5


def _key(dropout: Dropout, image: int, group: int) -> tuple[int, int]:
    state = 0
    for word in (dropout.seed, dropout.offset, image, group):
        state = _mix64(state ^ word)
    return int32(state), int32(state >> 32)


def _outcome(random: Tensor, words: Tensor, bits: int) -> Tensor:
    """int32 [n] random numbers → the outcome of each (see `Group`)."""
    column = _shifted(random, 32 - bits)
    coin = random.bitwise_and((1 << (32 - bits)) - 1)
    word = _look_up(words, column)
    alias = word.bitwise_and((1 << bits) - 1)
    return torch.where(coin < _shifted(word, bits), column, alias)


def _values(outcome: Tensor, tables: Table, group: Group, variance: bool) -> tuple[Tensor, Tensor | None]:
    if group.rate is not None:
        a = outcome * group.per_copy
        return a, outcome * (group.copies - outcome) * group.per_pair if variance else None
    columns = slice(group.start, group.start + (1 << group.bits))
    a = _look_up(tables.mean[columns], outcome)
    return a, _look_up(tables.variance[columns], outcome) if variance else None


def _look_up(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.reshape(-1)).view(index.shape)  # several times faster than values[index]


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
    """int32 [n] → 32 random bits each.

    Two bijective 32-bit mixers (xor-shift-multiply, constants of C. Wellons' hash prospector), with the first half of
    a 64-bit key before and the second half between them.
    """
    x = index.bitwise_xor(key)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = _xor_shift(x, shift).mul_(int32(factor))
    x = _xor_shift(x, 15).bitwise_xor_(key2)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _xor_shift(x, shift).mul_(int32(factor))
    return _xor_shift(x, 16)


def _xor_shift(x: Tensor, shift: int) -> Tensor:
    return x.bitwise_xor_(_shifted(x, shift))


def _shifted(x: Tensor, shift: int) -> Tensor:
    """x >>> shift: the shift of int32 copies the sign, the mask takes it away again."""
    return (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _mix64(z: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014)."""
    z = (z + 0x9E3779B97F4A7C15) % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


def int32(bits: int) -> int:
    """The low 32 bits, as a signed number."""
    return (bits + (1 << 31)) % (1 << 32) - (1 << 31)
