"""The distribution of what N dropout copies of one element have in common, as tables a kernel can draw from.

Element i of copy k is x_i m_k / (1 - p_k) with m_k ~ Bernoulli(1 - p_k). Its mean over the copies is a x_i and its
population variance v x_i^2 with

    a = (1/N) sum_k m_k / (1 - p_k),    v = (1/N) sum_k (m_k / (1 - p_k))^2 - a^2.

(a, v) depends only on how many copies of each distinct rate keep the element, and those counts are independent
Binomial(c_r, 1 - p_r). So the vector of counts is one discrete variable with prod_r (c_r + 1) outcomes: N + 1 for N
equal rates (the Binomial identity), 2^N for N different ones. It is drawn from one 32-bit random number in constant
time by Walker's alias method, in the integer form: the probabilities are rounded to multiples of 2^-32 that add up
to 1, and the tables reproduce those exactly. Rates whose joint table would be large are split into groups, one random
number each.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_OUTCOMES = 256
"""Largest joint table of several rates; N equal rates always share one table of N + 1 outcomes."""


@dataclass(frozen=True)
class Outcomes:
    """One group of copies: what can happen and how likely it is, in float64."""

    copies: int
    rate: float | None  # of all copies; None where they differ
    probability: tuple[float, ...]
    mean: tuple[float, ...]  # a of the group's copies
    variance: tuple[float, ...]  # v of the group's copies


@dataclass(frozen=True)
class Group:
    """One alias table inside `Table`: columns `start` to `start` + 2^`bits`.

    The upper `bits` of a random number choose a column, the others are the coin. A column's word holds a limit (upper
    32 - `bits`) and an alias (lower `bits`): the outcome is the column itself where coin < limit, else the alias.
    """

    start: int
    bits: int
    copies: int
    rate: float | None
    """Of all copies, or None. With one rate the outcome is the count k of copies that keep the element, and the values
    need no table: a = k * `per_copy`, v = k * (copies - k) * `per_pair`."""

    @property
    def per_copy(self) -> float:
        return 0.0 if self.rate is None else 1 / (self.copies * (1 - self.rate))

    @property
    def per_pair(self) -> float:
        return self.per_copy**2


@dataclass(frozen=True)
class Table:
    """Alias tables of all groups, one after the other."""

    groups: tuple[Group, ...]
    header: Tensor  # int32 [groups, 3]: start, bits, copies
    words: Tensor  # int32 [columns]
    mean: Tensor  # float32 [columns], a of the outcome
    variance: Tensor  # float32 [columns], v of the outcome


def outcomes(rates: tuple[float, ...]) -> list[Outcomes]:
    """The copies in groups, every group with its joint distribution."""
    packs: list[list[tuple[float, int]]] = []
    for rate, copies in sorted(Counter(rates).items()):
        for pack in packs:
            if math.prod(c + 1 for _, c in pack) * (copies + 1) <= MAX_OUTCOMES:
                pack.append((rate, copies))
                break
        else:
            packs.append([(rate, copies)])
    return [_joint(pack) for pack in packs]


@functools.lru_cache(maxsize=64)
def table(rates: tuple[float, ...], device: torch.device) -> Table:
    """Alias tables of these rates on a device; made once."""
    groups: list[Group] = []
    words: list[int] = []
    mean: list[float] = []
    variance: list[float] = []
    for group in outcomes(rates):
        bits, columns = _alias(group.probability)
        padding = [0.0] * (len(columns) - len(group.mean))  # never drawn
        groups.append(Group(len(words), bits, group.copies, group.rate))
        words += columns
        mean += *group.mean, *padding
        variance += *group.variance, *padding
    return Table(
        tuple(groups),
        torch.tensor([(g.start, g.bits, g.copies) for g in groups], dtype=torch.int32, device=device),
        torch.tensor(words, dtype=torch.int64).to(torch.int32).to(device),
        torch.tensor(mean, dtype=torch.float32, device=device),
        torch.tensor(variance, dtype=torch.float32, device=device),
    )


def _joint(pack: list[tuple[float, int]]) -> Outcomes:
    copies = sum(c for _, c in pack)
    probability, mean, variance = [], [], []
    for kept in itertools.product(*(range(c + 1) for _, c in pack)):
        counts = [(k, rate, c) for k, (rate, c) in zip(kept, pack, strict=True)]
        a = math.fsum(k / (1 - rate) for k, rate, _ in counts) / copies
        # The sum of squared deviations: kept copies lie at 1 / (1 - rate), dropped ones at 0.
        squares = [k * (1 / (1 - rate) - a) ** 2 for k, rate, _ in counts]
        probability.append(math.prod(math.comb(c, k) * (1 - rate) ** k * rate ** (c - k) for k, rate, c in counts))
        mean.append(a)
        variance.append((math.fsum(squares) + (copies - sum(kept)) * a**2) / copies)
    rate = pack[0][0] if len(pack) == 1 else None
    return Outcomes(copies, rate, tuple(probability), tuple(mean), tuple(variance))


def _alias(probability: tuple[float, ...]) -> tuple[int, list[int]]:
    """Bits of a column and the columns' words (see `Group`), padded to a power of two."""
    weights = _rounded(probability, 1 << 32)
    bits = max(1, (len(weights) - 1).bit_length())
    size = 1 << (32 - bits)
    limits = weights + [0] * ((1 << bits) - len(weights))
    aliases = list(range(len(limits)))
    small = [c for c, w in enumerate(limits) if w < size]
    large = [c for c, w in enumerate(limits) if w > size]
    while small:  # the weights add up to all columns: a small one always finds a donor
        column, donor = small.pop(), large[-1]
        aliases[column] = donor
        limits[donor] -= size - limits[column]
        if limits[donor] <= size:
            large.pop()
            if limits[donor] < size:
                small.append(donor)
    # A full column has no room for its limit, and needs none: it is its own alias.
    return bits, [
        alias if limit == size else limit << bits | alias for limit, alias in zip(limits, aliases, strict=True)
    ]


def _rounded(probability: tuple[float, ...], total: int) -> list[int]:
    """Integers that add up to `total`, each within 1 of probability * total (largest remainders)."""
    exact = [p * total / math.fsum(probability) for p in probability]
    weights = [int(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: weights[i] - exact[i])
    for i in order[: total - sum(weights)]:
        weights[i] += 1
    return weights
