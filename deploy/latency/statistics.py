"""Statistics of latencies: intervals of percentiles, and whether one artifact really differs from another.

The calls of a benchmark are not independent: clocks, heat and neighbours act on many calls in a row, and queued
requests wait for each other. So the unit of all statistics is a block of calls (a round, or a twentieth of a server
run), and blocks that still resemble their neighbours are joined into larger ones (`joined`).

Intervals: bootstrap over blocks. Few blocks make the plain percentile bootstrap too narrow; its quantiles are moved
out as in Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 5.3 ("expanded percentile").

Tests. Artifacts measured in turn: in each round the order is drawn at random, so if two artifacts are the same, their
names could be swapped within any round without changing the odds. The test does that (Fisher's randomisation test):
it is exact for any noise, drift and autocorrelation. Artifacts measured at different times: Welch's t on the
logarithm of the figure, its variance from the bootstrap over (joined) blocks. That is approximate, and no
statistics can see what differed between the two occasions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from deploy.latency.results import Estimate

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
CONFIDENCE = 0.95
SIGNIFICANCE = 0.01
"""p-values below this count. Stricter than the intervals: of a hundred comparisons of equals, one may fail."""
BEYOND = 10
RESAMPLES = 1000
SWAPS = 1999
SWAPS_A_FIGURE = 500  # so that Holm's correction leaves the smallest possible p-value at 0.002
_SIMILAR = 0.2  # lag-1 autocorrelation above which neighbouring blocks are joined
_CHUNK = 1_000_000  # weights held at once

Blocks = Sequence[np.ndarray]
"""Samples in the order of time, an array a block."""


def calls_needed(percent: float) -> int:
    """The least number of calls that supports a percentile: ten are expected on its far side."""
    return math.ceil(round(BEYOND / (1.0 - max(percent, 100.0 - percent) / 100.0), 6))


def name_of(percent: float) -> str:
    return f"p{percent:g}"


def estimates(blocks: Blocks, percents: Sequence[float], *, seed: int) -> list[Estimate]:
    """Percentiles of all samples with their intervals; without interval where the calls do not support one."""
    everything = np.concatenate(blocks)
    point = np.percentile(everything, percents)
    units = joined(blocks)
    draws = weighted_percentiles(units, draw_blocks(len(units), seed), percents)
    return [
        interval(float(point[i]), draws[:, i], len(units))
        if len(everything) >= calls_needed(percent)
        else Estimate(value=float(point[i]))
        for i, percent in enumerate(percents)
    ]


def ratio_of_sums(above: np.ndarray, below: np.ndarray, *, seed: int) -> Estimate:
    """Σ above / Σ below over blocks, for example images over seconds, with its interval."""
    size = join_size(above / below)
    above, below = (np.add.reduceat(x, range(0, len(x), size)) for x in (above, below))
    times = draw_blocks(len(above), seed)
    return interval(float(above.sum() / below.sum()), (times @ above) / (times @ below), len(above))


def interval(value: float, draws: np.ndarray, blocks: int) -> Estimate:
    """`value` with the expanded percentile interval of its bootstrap `draws` over `blocks` blocks."""
    if blocks < 2:
        return Estimate(value=value)
    normal = NormalDist()
    t = student_quantile((1 + CONFIDENCE) / 2, blocks - 1)
    tail = normal.cdf(-math.sqrt(blocks / (blocks - 1)) * t)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high))


def draw_blocks(blocks: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Draw how often each block occurs in each resample, [resamples, blocks]."""
    return np.random.default_rng(seed).multinomial(blocks, [1 / blocks] * blocks, resamples)


def joined(blocks: Blocks) -> list[np.ndarray]:
    """Neighbouring blocks joined in pairs until their medians and means are no longer like their neighbours'."""
    size = max(join_size(np.asarray([summary(part) for part in blocks])) for summary in (np.median, np.mean))
    return [np.concatenate(blocks[i : i + size]) for i in range(0, len(blocks), size)]


def join_size(series: np.ndarray) -> int:
    """Find how many neighbours (1, 2, 4, …) to join so that the lag-1 autocorrelation of `series` is at most 0.2, or
    fewer than ten are left."""
    size = 1
    while len(series) >= 10 and _autocorrelation(series) > _SIMILAR:
        series = np.asarray([series[i : i + 2].mean() for i in range(0, len(series), 2)])
        size *= 2
    return size


def weighted_percentiles(blocks: Blocks, times: np.ndarray, percents: Sequence[float]) -> np.ndarray:
    """Percentiles of the pooled samples with block i taken times[r, i] times: [resamples R, percentiles P].

    Equal to np.percentile of the repeated samples (linear interpolation), without repeating or sorting them again.
    The weight below every √n-th sample is one matrix product for all rows; the rest of the search is within √n samples.
    """
    samples = np.concatenate(blocks)
    order = np.argsort(samples, kind="stable")
    owner = np.repeat(np.arange(len(blocks)), [len(part) for part in blocks])[order]
    samples = samples[order]
    step = max(math.isqrt(len(samples)), 1)
    edges = np.arange(step, len(samples) + 1, step)
    below = np.stack([np.searchsorted(np.flatnonzero(owner == b), edges) for b in range(len(blocks))])  # [B, edges]
    share = np.asarray(percents) / 100
    rows = max(_CHUNK // (2 * len(share) * step), 1)
    parts = [_search(samples, owner, below, times[r : r + rows], share, step) for r in range(0, len(times), rows)]
    return np.concatenate(parts)


def _search(
    samples: np.ndarray, owner: np.ndarray, below: np.ndarray, times: np.ndarray, share: np.ndarray, step: int
) -> np.ndarray:
    coarse = (times.astype(float) @ below).astype(np.int64)  # [R, edges]: weight of the samples before each edge
    last = times @ np.bincount(owner, minlength=len(below)) - 1  # [R]: rank of the largest sample
    position = last[:, None] * share
    low = np.floor(position).astype(np.int64)
    ranks = np.concatenate([low, np.minimum(low + 1, last[:, None])], axis=1)  # [R, 2P]
    interval = (coarse[:, None, :] <= ranks[:, :, None]).sum(axis=2)
    start = np.take_along_axis(np.pad(coarse, ((0, 0), (1, 0))), interval, axis=1)
    index = interval[:, :, None] * step + np.arange(step)  # [R, 2P, step]
    weight = times[np.arange(len(times))[:, None, None], owner[np.minimum(index, len(owner) - 1)]]
    weight = np.where(index < len(owner), weight, 0)
    inside = (start[:, :, None] + weight.cumsum(axis=2) <= ranks[:, :, None]).sum(axis=2)
    left, right = np.split(samples[np.minimum(interval * step + inside, len(samples) - 1)], 2, axis=1)
    out: np.ndarray = left + (right - left) * (position - low)
    return out


# ------------------------------------------------------------------------------------------- comparisons


def ratio_in_turn(base: Blocks, other: Blocks, percents: Sequence[float], *, seed: int) -> list[Estimate]:
    """Each percentile of `other` over that of `base`. Round i of both was measured together."""
    size = join_size(np.log([np.median(b) / np.median(a) for a, b in zip(base, other, strict=True)]))
    times = draw_blocks(-(-len(base) // size), seed)
    pairs = [[np.concatenate(x[i : i + size]) for i in range(0, len(x), size)] for x in (base, other)]
    draws = weighted_percentiles(pairs[1], times, percents) / weighted_percentiles(pairs[0], times, percents)
    value = np.percentile(np.concatenate(other), percents) / np.percentile(np.concatenate(base), percents)
    return [interval(float(value[i]), draws[:, i], len(times[0])) for i in range(len(percents))]


def compare_in_turn(
    base: Blocks, other: Blocks, percents: Sequence[float], *, tolerance: float, seed: int, figures: int = 1
) -> list[tuple[Estimate, float, float]]:
    """Compare each percentile: other over base, two-sided p-value of no difference, and one-sided p-value of other
    being slower by at most `tolerance` (a share). Round i of both was measured together, in random order.
    figures: how many will be judged together; more need smaller p-values, so more swaps."""
    swap = np.random.default_rng(seed).integers(0, 2, (max(SWAPS, SWAPS_A_FIGURE * figures), len(base)))
    swap = np.concatenate([np.zeros((1, len(base)), swap.dtype), swap])  # the first row is what was measured

    def log_ratios(scale: float) -> np.ndarray:
        rounds = [*(part * scale for part in base), *other]
        mine = weighted_percentiles(rounds, np.concatenate([swap, 1 - swap], axis=1), percents)
        return np.log(mine / weighted_percentiles(rounds, np.concatenate([1 - swap, swap], axis=1), percents))

    same = log_ratios(1.0)
    slower = log_ratios(1.0 + tolerance) if tolerance else same
    # Equal up to rounding counts as at least as extreme: that can only make the test more careful.
    two_sided = (np.abs(same) >= np.abs(same[0]) - 1e-12).mean(axis=0)
    one_sided = (slower >= slower[0] - 1e-12).mean(axis=0)
    return [
        (ratio, float(two_sided[i]), float(one_sided[i]))
        for i, ratio in enumerate(ratio_in_turn(base, other, percents, seed=seed))
    ]


def compare_apart(
    base: Blocks, other: Blocks, percents: Sequence[float], *, tolerance: float, seed: int, figures: int = 1
) -> list[tuple[Estimate, float, float]]:
    """Compare as `compare_in_turn`, but calls that were measured at different times. `figures` may be any number."""
    sides = []
    for offset, blocks in enumerate((base, other)):
        units = joined(blocks)
        draws = np.log(weighted_percentiles(units, draw_blocks(len(units), seed + offset), percents))
        value = np.log(np.percentile(np.concatenate(blocks), percents))
        sides.append((value, draws.var(axis=0, ddof=1) * len(units) / max(len(units) - 1, 1), len(units) - 1))
    (value_a, var_a, df_a), (value_b, var_b, df_b) = sides
    out = []
    for i in range(len(percents)):
        difference, variance = float(value_b[i] - value_a[i]), float(var_a[i] + var_b[i])
        if min(df_a, df_b) < 1:
            out.append((Estimate(value=math.exp(difference)), 1.0, 1.0))
            continue
        error = math.sqrt(max(variance, 1e-18))  # times without any spread: a difference is a difference
        df = max(variance, 1e-18) ** 2 / max(var_a[i] ** 2 / df_a + var_b[i] ** 2 / df_b, 1e-37)
        df = min(max(df, min(df_a, df_b)), df_a + df_b)
        half = student_quantile((1 + CONFIDENCE) / 2, df) * error
        low, high = math.exp(difference - half), math.exp(difference + half)
        two_sided = min(2 * student_tail(abs(difference) / error, df), 1.0)
        one_sided = student_tail((difference - math.log1p(tolerance)) / error, df)
        out.append((Estimate(value=math.exp(difference), low=low, high=high), two_sided, one_sided))
    return out


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the smallest times m, the next times m - 1, …, monotone."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def probability_slower(base: np.ndarray, other: np.ndarray) -> float:
    """Probability that a sample of `other` is larger than one of `base`, ties half."""
    base = np.sort(base)
    below = np.searchsorted(base, other, side="left") + np.searchsorted(base, other, side="right")
    return float(below.mean() / (2 * len(base)))


def student_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, df ≥ 1: with t = √df·tan φ its density is proportional to cos^(df-1) φ, whose integral
    from -π/2 to π/2 is √π·Γ(df/2) / Γ((df+1)/2)."""
    angle = np.linspace(math.atan(t / math.sqrt(df)), math.pi / 2, 1001)
    part = float(np.trapezoid(np.cos(angle).clip(0) ** (df - 1), angle))
    return part / math.sqrt(math.pi) * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))


@lru_cache(maxsize=256)
def student_quantile(probability: float, df: float) -> float:
    """The t with P(T ≤ t) = probability, for probability ≥ 0.5."""
    low, high = 0.0, 1.0
    while student_tail(high, df) > 1 - probability:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, df) > 1 - probability else (low, middle)
    return (low + high) / 2


# ----------------------------------------------------------------------------------------------------


def _autocorrelation(series: np.ndarray) -> float:
    """Compute the autocorrelation at lag 1, corrected for the bias of short series (Marriott and Pope 1954):
    + (1 + 4r) / n."""
    centred = series - series.mean()
    power = float(centred @ centred)
    if power <= 1e-24 * len(series):
        return 0.0
    plain = float(centred[1:] @ centred[:-1]) / power
    return plain + (1 + 4 * plain) / len(series)
