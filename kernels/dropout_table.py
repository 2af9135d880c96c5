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
    probability: tuple[float, ...]
    mean: tuple[float, ...]  # a of the group's copies
    variance: tuple[float, ...]  # v of the group's copies


@dataclass(frozen=True)
class Group:
    """One alias table inside `Table`. The upper `bits` of a random number choose a column, the others are the coin."""

    start: int  # of its columns in `threshold`; of its values 2 * start
    bits: int
    copies: int


@dataclass(frozen=True)
class Table:
    """Alias tables of all groups, one after the other. Column c holds a threshold and two values, own and alias.

    Column c of a group keeps its own value (2c) where coin < threshold and takes the alias (2c + 1) elsewhere.
    """

    groups: tuple[Group, ...]
    threshold: Tensor  # int32 [columns]
    mean: Tensor  # float32 [2 * columns]
    variance: Tensor  # float32 [2 * columns]


def outcomes(rates: tuple[float, ...]) -> list[Outcomes]:
    """Groups of outcomes, outcomes of probability 0 left out (a rate of 0 always keeps)."""
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
    threshold: list[int] = []
    mean: list[float] = []
    variance: list[float] = []
    for group in outcomes(rates):
        bits, thresholds, aliases = _alias(group.probability)
        groups.append(Group(len(threshold), bits, group.copies))
        for column, (limit, alias) in enumerate(zip(thresholds, aliases, strict=True)):
            own = min(column, len(group.probability) - 1)  # a column past the outcomes has threshold 0: never its own
            threshold.append(limit)
            mean += group.mean[own], group.mean[alias]
            variance += group.variance[own], group.variance[alias]
    return Table(
        tuple(groups),
        torch.tensor(threshold, dtype=torch.int32, device=device),
        torch.tensor(mean, dtype=torch.float32, device=device),
        torch.tensor(variance, dtype=torch.float32, device=device),
    )


def _joint(pack: list[tuple[float, int]]) -> Outcomes:
    copies = sum(c for _, c in pack)
    probability, mean, variance = [], [], []
    for kept in itertools.product(*(range(c + 1) for _, c in pack)):
        p = math.prod(
            math.comb(c, k) * (1 - rate) ** k * rate ** (c - k) for k, (rate, c) in zip(kept, pack, strict=True)
        )
        if p == 0:
            continue
        a = math.fsum(k / (1 - rate) for k, (rate, _) in zip(kept, pack, strict=True)) / copies
        # The sum of squared deviations: kept copies lie at 1 / (1 - rate), dropped ones at 0.
        squares = [k * (1 / (1 - rate) - a) ** 2 for k, (rate, _) in zip(kept, pack, strict=True)]
        probability.append(p)
        mean.append(a)
        variance.append((math.fsum(squares) + (copies - sum(kept)) * a**2) / copies)
    return Outcomes(copies, tuple(probability), tuple(mean), tuple(variance))


def _alias(probability: tuple[float, ...]) -> tuple[int, list[int], list[int]]:
    """Bits of the column, thresholds and aliases; the columns are padded to a power of two."""
    total = 1 << 32
    weights = _rounded(probability, total)
    bits = max(2, (len(weights) - 1).bit_length())  # two at least: a threshold then fits into int32
    size = 1 << (32 - bits)
    weights += [0] * ((1 << bits) - len(weights))
    thresholds, aliases = list(weights), list(range(len(weights)))
    small = [c for c, w in enumerate(weights) if w < size]
    large = [c for c, w in enumerate(weights) if w >= size]
    while small and large:
        column, donor = small.pop(), large[-1]
        aliases[column] = donor
        thresholds[donor] -= size - thresholds[column]
        if thresholds[donor] < size:
            small.append(large.pop())
    return bits, thresholds, aliases


def _rounded(probability: tuple[float, ...], total: int) -> list[int]:
    """Integers that add up to `total`, each within 1 of probability * total (largest remainders)."""
    exact = [p * total / math.fsum(probability) for p in probability]
    weights = [int(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: weights[i] - exact[i])
    for i in order[: total - sum(weights)]:
        weights[i] += 1
    return weights
