"""Do the intervals cover the truth, and do the tests call equals equal? Simulated, with known distributions."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np
import pytest

from deploy.latency import statistics
from deploy.latency.statistics import (
    SIGNIFICANCE,
    calls_needed,
    compare_apart,
    compare_in_turn,
    estimates,
    holm,
    join_size,
    joined,
    probability_slower,
    ratio_of_sums,
    student_quantile,
    student_tail,
    weighted_percentiles,
)
from tests.helpers.fake_runners import correlated

ROUNDS, CALLS, RUNS = 20, 60, 100


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer resamples: the coverage is the same, its intervals a little rougher."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    monkeypatch.setattr(statistics, "SWAPS", 499)
    monkeypatch.setattr(statistics, "SWAPS_A_FIGURE", 0)
    monkeypatch.setattr(statistics.draw_blocks, "__defaults__", (300,))


def times_ms(rng: np.random.Generator, kind: str) -> np.ndarray:
    """[ROUNDS, CALLS] around a median of 10 ms."""
    noise = rng.normal(size=(ROUNDS, CALLS))
    level = np.ones(ROUNDS)
    if kind == "calls correlated":
        noise = correlated(rng, ROUNDS * CALLS, 0.7).reshape(ROUNDS, CALLS)
    if kind == "rounds correlated":
        level = np.exp(0.03 * correlated(rng, ROUNDS, 0.5))
    if kind == "drift":
        level = np.linspace(0.95, 1.05, ROUNDS)
    hiccups = 1 + 0.3 * (rng.random((ROUNDS, CALLS)) < 0.02)
    return 10 * np.exp(0.05 * noise) * hiccups * level[:, None]


# ------------------------------------------------------------------------------------------------ intervals


@pytest.mark.parametrize(("kind", "least"), [("independent", 0.91), ("calls correlated", 0.88)])
def test_intervals_cover_the_truth(quick: None, kind: str, least: float) -> None:
    """95 % intervals of p50, p90 and p95 over 150 runs; the truth from a million calls. Three standard errors of a
    true 95 % are 5 points."""
    rng = np.random.default_rng(1)
    noise, hiccups = rng.normal(size=10**6), 1 + 0.3 * (rng.random(10**6) < 0.02)
    truth = np.percentile(10 * np.exp(0.05 * noise) * hiccups, [50, 90, 95])
    covered = np.zeros(3)
    for seed in range(150):
        found = estimates(list(times_ms(rng, kind)), [50, 90, 95], seed=seed)
        covered += [(e.low or 0) <= t <= (e.high or 0) for e, t in zip(found, truth, strict=True)]
    assert (covered / 150 >= least).all(), covered / 150
    assert covered.min() < 150, "an interval that always covers is too wide"


def test_p99_and_throughput_cover_the_truth(quick: None) -> None:
    rng = np.random.default_rng(2)
    truth = float(np.exp(0.3 * NormalDist().inv_cdf(0.99)))
    tails = rates = 0
    for seed in range(120):
        calls = np.exp(0.3 * rng.normal(size=(ROUNDS, 100)))
        p99 = estimates(list(calls), [99], seed=seed)[0]
        tails += (p99.low or 0) <= truth <= (p99.high or 0)
        rate = ratio_of_sums(np.full(ROUNDS, 100.0), calls.sum(1), seed=seed)
        rates += (rate.low or 0) <= np.exp(-0.045) <= (rate.high or 0)
    assert tails >= 0.88 * 120 and rates >= 0.89 * 120, (tails, rates)


def test_a_plain_bootstrap_over_calls_would_not_cover(quick: None) -> None:
    """Why blocks: with correlated calls, the same interval from single calls is far too narrow."""
    rng, covered = np.random.default_rng(3), 0
    for seed in range(40):
        calls = 10 * np.exp(0.05 * correlated(rng, 400, 0.9))
        found = estimates(list(calls[:, None]), [50], seed=seed)[0]
        covered += (found.low or 0) <= 10 <= (found.high or 0)
        assert len(joined(list(calls[:, None]))) < 100  # joined, because neighbours are alike
    assert covered >= 0.85 * 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_SIMILAR", 2.0)  # never join
        rng, naive = np.random.default_rng(3), 0
        for seed in range(40):
            calls = 10 * np.exp(0.05 * correlated(rng, 400, 0.9))
            found = estimates(list(calls[:, None]), [50], seed=seed)[0]
            naive += (found.low or 0) <= 10 <= (found.high or 0)
    assert naive < 0.6 * 40, naive


def test_percentiles_that_the_calls_do_not_support_have_no_interval() -> None:
    assert [calls_needed(p) for p in (50, 90, 95, 99, 99.9)] == [20, 100, 200, 1000, 10000]
    calls = np.random.default_rng(0).random((10, 99))
    found = estimates(list(calls), (50, 90, 95, 99, 99.9), seed=0)
    assert [e.supported for e in found] == [True, True, True, False, False]
    assert estimates(list(calls[:, :5]), (50, 90), seed=0)[1].low is None
    assert not estimates([calls.ravel()], (50,), seed=0)[0].supported, "one block says nothing about spread"


def test_weighted_percentiles_equal_those_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.lognormal(0, 1, n) for n in (1, 7, 30, 12)]
    times = rng.multinomial(4, [0.25] * 4, 50)
    for weights, found in zip(times, weighted_percentiles(blocks, times, (50, 90, 99)), strict=True):
        repeated = np.concatenate([np.tile(part, k) for part, k in zip(blocks, weights, strict=True)])
        np.testing.assert_allclose(found, np.percentile(repeated, (50, 90, 99)))


def test_neighbours_that_are_alike_are_joined() -> None:
    rng = np.random.default_rng(0)
    sizes = [join_size(rng.normal(size=20)) for _ in range(200)]
    assert np.mean(np.asarray(sizes) == 1) > 0.75
    assert join_size(np.arange(20.0)) == 4 and join_size(np.ones(20)) == 1
    blocks = [np.full(3, float(i)) for i in range(20)]
    assert [len(part) for part in joined(blocks)] == [12] * 5
    assert np.concatenate(joined(blocks)).tolist() == np.concatenate(blocks).tolist()


# ---------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("kind", ["independent", "calls correlated", "rounds correlated", "drift"])
def test_in_turn_equals_are_equal_and_three_percent_is_found(quick: None, kind: str) -> None:
    """Artifacts share the level of each round: that is what taking turns is for. Twenty rounds of sixty calls."""
    rng = np.random.default_rng(4)
    false = found = 0
    for seed in range(RUNS):
        a, b = times_ms(rng, kind), times_ms(rng, kind)
        if kind == "rounds correlated":
            b = b / np.median(b, axis=1, keepdims=True) * np.median(a, axis=1, keepdims=True)
            b *= np.exp(0.005 * rng.normal(size=(ROUNDS, 1)))
        equal = compare_in_turn(list(a), list(b), (50, 90), tolerance=0, seed=seed)
        false += min(holm([p for _, p, _ in equal])) < SIGNIFICANCE
        if seed % 2:
            slower = compare_in_turn(list(a), list(1.03 * b), (50, 90), tolerance=0, seed=seed)
            found += 2 * slower[0][1] < SIGNIFICANCE
    assert false <= 5
    assert found >= (30 if kind == "calls correlated" else 47), found


@pytest.mark.parametrize("kind", ["independent", "calls correlated", "rounds correlated", "drift"])
def test_apart_equals_are_equal(quick: None, kind: str) -> None:
    """Two results of different times: equals are not told apart, in p50 and p90, and never fail the gate of 2 %."""
    rng = np.random.default_rng(5)
    false = failed = found = 0
    for seed in range(RUNS):
        a, b = times_ms(rng, kind), times_ms(rng, kind)
        figures = compare_apart(list(a), list(b), (50, 90), tolerance=0.02, seed=seed)
        false += min(holm([p for _, p, _ in figures])) < SIGNIFICANCE
        failed += min(holm([p for *_, p in figures])) < SIGNIFICANCE
        if kind == "independent":
            found += compare_apart(list(a), list(1.03 * b), (50,), tolerance=0, seed=seed)[0][1] < SIGNIFICANCE
    assert false <= 5 and failed <= 1, (false, failed)
    if kind == "independent":
        assert found >= 95, found


def test_the_swap_test_is_the_exact_randomisation_test() -> None:
    """Against all 2^8 swaps of eight rounds, counted by hand."""
    rng = np.random.default_rng(6)
    a, b = rng.lognormal(0, 0.2, (8, 5)), rng.lognormal(0.1, 0.2, (8, 5))
    ratios = []
    for swap in itertools.product([False, True], repeat=8):
        mask = np.asarray(swap)[:, None]
        ratios.append(np.log(np.median(np.where(mask, a, b)) / np.median(np.where(mask, b, a))))
    exact = np.mean(np.abs(ratios) >= abs(ratios[0]) - 1e-12)
    (ratio, p_value, one_sided), *_ = compare_in_turn(list(a), list(b), (50,), tolerance=0, seed=0, figures=20)
    assert ratio.value == pytest.approx(np.median(b) / np.median(a))
    assert p_value == pytest.approx(exact, abs=0.02)
    assert one_sided == pytest.approx(np.mean(np.asarray(ratios) >= ratios[0] - 1e-12), abs=0.02)


def test_a_tolerance_lets_pass_what_is_within_it(quick: None) -> None:
    rng = np.random.default_rng(9)
    within = beyond = 0
    for seed in range(30):
        a, b = times_ms(rng, "drift"), times_ms(rng, "drift")
        for compare in (compare_in_turn, compare_apart):
            within += compare(list(a), list(1.03 * b), (50,), tolerance=0.05, seed=seed)[0][2] < SIGNIFICANCE
        beyond += compare_in_turn(list(a), list(1.10 * b), (50,), tolerance=0.05, seed=seed)[0][2] < SIGNIFICANCE
    assert within == 0 and beyond == 30


def test_intervals_of_the_ratio_cover_it(quick: None) -> None:
    rng, turn, apart = np.random.default_rng(7), 0, 0
    for seed in range(100):
        a, b = times_ms(rng, "independent"), 1.1 * times_ms(rng, "independent")
        for_turn = compare_in_turn(list(a), list(b), (50,), tolerance=0, seed=seed)[0][0]
        for_apart = compare_apart(list(a), list(b), (50,), tolerance=0, seed=seed)[0][0]
        turn += (for_turn.low or 0) <= 1.1 <= (for_turn.high or 0)
        apart += (for_apart.low or 0) <= 1.1 <= (for_apart.high or 0)
    assert turn >= 88 and apart >= 88, (turn, apart)


def test_times_without_spread_differ_when_they_differ() -> None:
    same = compare_apart([np.ones(30)] * 5, [np.ones(30)] * 5, (50,), tolerance=0, seed=0)[0]
    more = compare_apart([np.ones(30)] * 5, [np.full(30, 1.01)] * 5, (50,), tolerance=0, seed=0)[0]
    assert same[1] == 1 and more[1] < 0.001 and more[0].value == pytest.approx(1.01)


def test_holm_against_a_worked_example() -> None:
    """Wright, "Adjusted P-values for simultaneous inference" (1992) explains the steps: 4 × 0.01, 3 × 0.02, …"""
    assert holm([0.04, 0.01, 0.02, 0.5]) == pytest.approx([0.08, 0.04, 0.06, 0.5])
    assert holm([0.03, 0.03]) == pytest.approx([0.06, 0.06]) and holm([]) == [] and holm([0.9, 0.9]) == [1, 1]


def test_student_against_tables() -> None:
    for df, quantile in ((1, 12.706), (4, 2.776), (9, 2.262), (19, 2.093), (1000, 1.962)):
        assert student_quantile(0.975, df) == pytest.approx(quantile, abs=2e-3)
    assert student_tail(0, 7) == pytest.approx(0.5) and student_tail(2.998, 7) == pytest.approx(0.01, abs=1e-4)
    assert student_tail(-1.5, 12) == pytest.approx(1 - student_tail(1.5, 12))


def test_probability_slower_counts_pairs() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.integers(0, 5, 40).astype(float), rng.integers(1, 6, 30).astype(float)
    pairs = [(y > x) + 0.5 * (y == x) for x in a for y in b]
    assert probability_slower(a, b) == pytest.approx(np.mean(pairs))
    assert probability_slower(a, a) == pytest.approx(0.5)
