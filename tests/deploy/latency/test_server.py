"""Open-loop arrivals against queueing theory, on a fake clock; and the search for the highest rate."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.core.errors import UserError
from deploy.latency import benchmark_server, bounded_lines
from deploy.latency.clock import HostClock
from deploy.latency.server import BLOCKS, highest_rate, open_loop
from deploy.latency.statistics import estimates
from tests.helpers.fake_runners import FakeClock, FakeRunner, small_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_images(tmp_path_factory.mktemp("images"), 2)


def queue(service_s: Any, rate: float, requests: int, *, most_together: int = 1, seed: int = 0) -> Any:
    clock, batches = FakeClock(), []

    def task(count: int) -> None:
        batches.append(count)
        clock.second += service_s(count)

    found = open_loop([task], rate, requests, clock, np.random.default_rng(seed), most_together=most_together)
    return found, batches


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_constant_service_times_against_m_d_1(load: float) -> None:
    """Mean wait of M/D/1: ρ / (2 µ (1 - ρ)) (Pollaczek-Khinchine); here µ = 100 a second."""
    found, _ = queue(lambda _: 0.01, 100 * load, 100_000)
    wait_ms = found.latency_ms.mean() - 10
    assert wait_ms == pytest.approx(1000 * load / (2 * 100 * (1 - load)), rel=0.06)
    assert found.latency_ms.min() == pytest.approx(10)


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_exponential_service_times_against_m_m_1(load: float) -> None:
    """The time in an M/M/1 system is exponential with rate µ - λ: percentile p is -ln(1 - p) / (µ - λ)."""
    rng = np.random.default_rng(1)
    service = iter(rng.exponential(0.01, 150_000))
    found, _ = queue(lambda _: next(service), 100 * load, 150_000, seed=2)
    for percent in (50, 90, 99):
        theory = -math.log(1 - percent / 100) / (100 - 100 * load) * 1000
        assert np.percentile(found.latency_ms, percent) == pytest.approx(theory, rel=0.08), percent


def test_arrivals_are_poisson_and_do_not_wait_for_answers() -> None:
    """The schedule is the same however slow the server; a pause is in the latency of all who came meanwhile."""
    fast, _ = queue(lambda _: 1e-6, 50, 20_000)
    slow, _ = queue(lambda _: 0.019, 50, 20_000)
    np.testing.assert_array_equal(fast.arrival_s, slow.arrival_s)
    gaps = np.diff(fast.arrival_s)
    assert gaps.mean() == pytest.approx(0.02, rel=0.03) and gaps.std() == pytest.approx(0.02, rel=0.05)
    calls = iter(range(10_000))
    paused, _ = queue(lambda _: 1.0 if next(calls) == 100 else 1e-4, 100, 1000)
    late = (paused.latency_ms > 50).sum()
    assert 70 < late < 130, "about a hundred requests come within one second, not one"


def test_waiting_requests_are_taken_together() -> None:
    alone, ones = queue(lambda n: 0.01, 150, 3000)
    together, batches = queue(lambda n: 0.01, 150, 3000, most_together=4)
    assert max(ones) == 1 and max(batches) == 4 and sum(batches) == 3000
    assert np.median(together.latency_ms) < 25 < 1000 < np.median(alone.latency_ms), "alone it is overloaded"
    light, batches = queue(lambda n: 0.01, 0.5, 300, most_together=4)
    assert max(batches) <= 2 and light.latency_ms.max() < 21


def test_two_streams_serve_one_queue() -> None:
    """The real clock. One stream of 50 ms cannot serve 30 requests a second, two can."""

    def run(streams: int) -> Any:
        tasks = [lambda count: time.sleep(0.05)] * streams
        return open_loop(tasks, 30, 80, HostClock(), np.random.default_rng(0))  # type: ignore[arg-type]

    one, two = run(1), run(2)
    assert len(two.latency_ms) == 80 and two.latency_ms.min() >= 50
    assert np.median(two.latency_ms) < 0.5 * np.median(one.latency_ms)


def test_the_host_clock_waits_until_then_and_not_much_longer() -> None:
    clock = HostClock()
    for wait in (0.0, 1e-4, 3e-3, -1.0):
        target = clock.now() + wait
        clock.wait_until(target)
        assert clock.now() >= target
    before = clock.now()
    clock.wait_until(before - 600)  # long ago
    assert clock.now() - before < 300


# ------------------------------------------------------------------------------------------- the highest rate


@pytest.mark.parametrize("truth", [0.5, 7.0, 93.0, 100.0, 180.0])
def test_bisection_finds_the_rate(truth: float) -> None:
    asked: list[float] = []

    def passes(rate: float) -> bool:
        asked.append(rate)
        return rate <= truth

    found = highest_rate(passes, 100.0)
    assert 0.95 * truth <= found <= truth and len(asked) <= 20


def test_bisection_gives_up() -> None:
    assert highest_rate(lambda rate: False, 100.0) == 0
    assert highest_rate(lambda rate: True, 100.0) == pytest.approx(100 * 1.3**7)


def test_latency_bounded_throughput_of_m_d_1(images: list[Path]) -> None:
    """10 ms a request and p99 ≤ 40 ms. The exact answer for M/D/1 comes from a long simulation of Lindley's recursion,
    written down here on its own."""
    clock = FakeClock()
    report = benchmark_server(
        {"s": FakeRunner(clock, lambda count: 10.0 * count)},
        images, bound_ms=40.0, scope="h2d+compute+d2h", least_requests=10_000, clock=clock,
    )  # fmt: skip

    def p99(rate: float) -> float:
        gaps = np.random.default_rng(5).exponential(1 / rate, 200_000)
        steps = np.cumsum(0.01 - gaps)
        wait = steps - np.minimum(np.minimum.accumulate(steps), 0)
        return float(np.percentile(wait, 99)) * 1000 + 10

    low, high = 1.0, 99.0
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if p99(middle) <= 40 else (low, middle)
    (found,) = report.bounded
    assert found.rate_ips == pytest.approx(low, rel=0.12)
    (cell,) = report.cells
    assert cell.latency_ms["p99"].value <= 40 and cell.offered_ips == found.rate_ips and cell.calls >= 10_000
    assert cell.throughput_ips.value == pytest.approx(cell.offered_ips, rel=0.06)
    early = [probe for probe in found.probes if not probe.passed]
    assert early and min(probe.requests for probe in early) < 1000, "a trial that cannot pass ends early"
    assert bounded_lines(report.bounded)[0].startswith("s: p99 stays within 40 ms up to ")


def test_a_bound_below_the_service_time_has_no_rate(images: list[Path]) -> None:
    clock = FakeClock()
    report = benchmark_server(
        {"s": FakeRunner(clock, lambda count: 10.0)}, images, bound_ms=8, scope="h2d+compute+d2h", clock=clock
    )
    assert report.cells == [] and report.bounded[0].rate_ips is None
    calls = 201  # two seconds, and the call that passes them
    assert bounded_lines(report.bounded) == [
        f"s: no rate keeps p99 within 8 ms: an idle artifact already takes 10.00 ms (median of {calls} calls)"
    ]


def test_rates_are_measured_and_overload_is_said(images: list[Path]) -> None:
    clock, rng = FakeClock(), np.random.default_rng(0)
    runner = FakeRunner(clock, lambda count: 10.0 + 0.1 * rng.random())
    report = benchmark_server({"s": runner}, images, rates_ips=[50, 140], seconds=60, clock=clock, seed=3)
    calm, flooded = report.cells
    assert calm.offered_ips == 50 and calm.calls == pytest.approx(3000, abs=2) and len(calm.samples_ms) == 20
    assert calm.latency_ms["p50"].value == pytest.approx(12.7, abs=2) and calm.latency_ms["p99"].supported
    assert calm.start_delay_ms == pytest.approx(0, abs=1e-9), "the fake clock wakes in time"
    assert flooded.throughput_ips.value == pytest.approx(99.5, rel=0.02)
    assert [line for line in report.warnings if "overloaded" in line] == [
        "s, server, end_to_end, batch 1, 140 requests/s: overloaded, "
        f"{flooded.throughput_ips.value:.4g} images/s is all it does; the queue grew to the end, "
        "so its latencies mean nothing"
    ]


def test_intervals_of_a_queue_cover_its_true_median() -> None:
    """Requests that wait for each other are strongly correlated: M/M/1 at a load of 0.7, cut into blocks as a server
    run is."""
    covered, truth = 0, math.log(2) / 30 * 1000
    for seed in range(80):
        rng = np.random.default_rng(1000 + seed)
        found, _ = queue(lambda _, rng=rng: rng.exponential(0.01), 70, 4400, seed=seed)
        median = estimates(np.array_split(found.latency_ms[400:], BLOCKS), [50], seed=seed)[0]
        covered += (median.low or 0) <= truth <= (median.high or 0)
    assert covered >= 68, covered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "needs a rate of requests or a bound"),
        ({"rates_ips": [0.0]}, "rates must be positive, got 0"),
        ({"rates_ips": [math.inf]}, "rates must be positive"),
        ({"bound_ms": -1.0}, "the bound must be positive, got -1"),
        ({"rates_ips": [1.0], "batch_size": 0}, "batch size must be at least 1"),
        ({"rates_ips": [1.0], "scope": "compute"}, "scope compute: requests to a server are"),
        ({"rates_ips": [1.0], "seconds": 0.0}, "seconds must be positive"),
    ],
)
def test_wrong_arguments_are_one_line_errors(images: list[Path], change: dict[str, Any], message: str) -> None:
    clock = FakeClock()
    with pytest.raises(UserError, match=message):
        benchmark_server({"s": FakeRunner(clock, lambda count: 1.0)}, images, clock=clock, **change)
