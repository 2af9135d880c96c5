"""Open loop: requests arrive at random times (Poisson), whether or not the ones before are done.

A request is one image. Requests wait in one queue, first come first served, for the next free stream; a stream may
take several waiting requests as one batch. The latency of a request counts from its scheduled arrival, so what it
waited is in it, also when the measuring program itself was late (no coordinated omission: Tene, "How NOT to Measure
Latency", 2015).

`latency-bounded throughput` is the highest arrival rate whose p99 stays within a bound: bisection over the rate, then
one more measurement at the rate found, with other arrivals, so that the figures are not those of the luckiest trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np

from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.core.progress import Progress
from deploy.latency.clock import HOST_CLOCK, Clock
from deploy.latency.measure import (
    Slice,
    after,
    as_streams,
    make_cell,
    make_tasks,
    quiet_collector,
    run_slice,
    shared_settings,
    warm_up,
    warnings,
)
from deploy.latency.results import BenchmarkReport, BoundedThroughput, Cell, Probe, Scope
from deploy.latency.scopes import HOST, SCOPES, Task, read_pool
from deploy.latency.telemetry import Telemetry, troubles
from deploy.runtimes.base import Runner

BLOCKS = 20
"""A server run is one stretch; for the statistics it is cut into this many blocks."""
LEAD = 0.1
"""Share of requests at the start that are not counted: the queue begins empty."""
PERCENT = 99.0
"""The percentile that a bound is for."""


@dataclass(frozen=True)
class OpenLoop:
    """Fate of each request, in order of arrival. Shorter than planned when `gave_up`."""

    latency_ms: np.ndarray
    arrival_s: np.ndarray
    end_s: np.ndarray
    start_delay_ms: np.ndarray
    """How late an idle stream began, of the calls before which a stream had to wait."""
    gave_up: bool


def open_loop(
    tasks: Sequence[Task],
    rate_ips: float,
    requests: int,
    clock: Clock,
    rng: np.random.Generator,
    *,
    most_together: int = 1,
    give_up: Callable[[float], bool] | None = None,
) -> OpenLoop:
    """Send `requests` Poisson arrivals of mean rate `rate_ips` (1/s) to the tasks, one thread each.

    give_up(latency in ms) is asked after every request; True ends the run.
    """
    due = np.cumsum(rng.exponential(1.0 / rate_ips, requests))
    ends, delays, stopped = np.full(requests, np.nan), [], False
    next_request, lock = 0, Lock()
    start = clock.now()

    def stream(task: Task) -> None:
        nonlocal next_request, stopped
        while True:
            with lock:  # who holds it is first in line; the others are idle as well
                if stopped or next_request == requests:
                    return
                first, early = next_request, clock.now() < start + due[next_request]
                clock.wait_until(start + due[first])
                now = clock.now()
                last = first + 1
                while last < min(requests, first + most_together) and start + due[last] <= now:
                    last += 1
                next_request = last
                if early:
                    delays.append(max(now - start - due[first], 0.0) * 1e3)
            task(last - first)
            end = clock.now() - start
            ends[first:last] = end
            if give_up is not None:
                with lock:
                    for request in range(first, last):
                        stopped = give_up((end - due[request]) * 1e3) or stopped

    if len(tasks) == 1:
        stream(tasks[0])
    else:
        with ThreadPoolExecutor(len(tasks)) as pool:
            list(pool.map(stream, tasks))
    done = ~np.isnan(ends)
    return OpenLoop((ends - due)[done] * 1e3, due[done], ends[done], np.asarray(delays), stopped)


def highest_rate(passes: Callable[[float], bool], high: float, *, precision: float = 0.05) -> float:
    """The highest rate that passes, within `precision` (a share of it); 0 when none above high / 1000 does.

    `high`: a guess of a rate that fails; it is raised while it passes, at most eight times.
    """
    low = 0.0
    for _ in range(8):
        if not passes(high):
            break
        low, high = high, high * 1.3
    else:
        return low
    floor = high / 1000
    while high - low > precision * max(low, floor):
        middle = (low + high) / 2
        if passes(middle):
            low = middle
        else:
            high = middle
        if high < floor:
            return 0.0
    return low


def benchmark_server(
    runners: Mapping[str, Runner | Sequence[Runner]],
    images: Sequence[Path],
    *,
    rates_ips: Sequence[float] = (),
    bound_ms: float | None = None,
    batch_size: int = 1,
    scope: Scope = "end_to_end",
    seconds: float = 5.0,
    least_requests: int = 1000,
    warm_up_seconds: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Clock = HOST_CLOCK,
) -> BenchmarkReport:
    """Every artifact under Poisson arrivals at each rate, and its highest rate within `bound_ms`.

    runners: a runner each, or one for each stream. rates_ips: mean arrivals a second. bound_ms: of the p99.
    batch_size: the most waiting requests that a stream takes together. scope: `end_to_end` or `h2d+compute+d2h`.
    A run lasts `seconds` or `least_requests`, whichever is longer; the first tenth is not counted.

    Raises UserError for empty or impossible arguments and for unreadable images.
    """
    streams = as_streams(runners)
    _check(rates_ips, bound_ms, batch_size, scope, seconds)
    encoded = read_pool(images)
    before, cells, bounded = environment(), list[Cell](), list[BoundedThroughput]()
    done, total = 0, len(streams) * (len(rates_ips) + (bound_ms is not None))

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with Telemetry() as telemetry, quiet_collector():
        for index, (name, parts) in enumerate(streams.items()):
            tasks = make_tasks(parts, scope, encoded, batch_size, clock)
            settled = [warm_up(tasks, size, warm_up_seconds, clock) for size in sorted({1, batch_size})][-1]
            facts = {
                "runner": name, "backend": parts[0].backend, "scenario": "server", "scope": scope, "clock": HOST,
                "batch_size": batch_size, "streams": len(parts), "warm_up": settled,
            }  # fmt: skip

            def run(rate: float, turn: int) -> Cell:
                rng = np.random.default_rng([seed, index, turn])  # noqa: B023
                telemetry.read()
                requests = _requests(rate, seconds, least_requests)
                found = open_loop(tasks, rate, requests, clock, rng, most_together=batch_size)  # noqa: B023
                telemetry.read()
                return _server_cell(found, rate, facts, seed)  # noqa: B023

            for turn, rate in enumerate(rates_ips):
                cells.append(run(rate, turn))
                advance()
            if bound_ms is not None:
                answer, cell = _search(
                    name, tasks, bound_ms, batch_size, seconds, least_requests, clock, seed + index, run
                )
                bounded.append(answer)
                cells += [cell] if cell else []
                advance()
    settings = {
        **shared_settings(streams, encoded),
        "scenario": "server", "batch_sizes": [batch_size], "scopes": [scope], "rates_ips": list(rates_ips),
        "bound_ms": bound_ms, "seconds": seconds, "least_requests": least_requests,
        "warm_up_seconds": warm_up_seconds, "seed": seed,
    }  # fmt: skip
    found = warnings(cells, before) + _overloads(cells) + troubles(telemetry.readings)
    notes = ["the artifacts were measured one after the other, not in turn: a queue needs one stretch of time"]
    return BenchmarkReport(
        cells=cells,
        bounded=bounded,
        environment=after(before),
        settings=settings,
        readings=telemetry.readings,
        notes=notes if len(streams) > 1 else [],
        warnings=found,
    )


# ----------------------------------------------------------------------------------------------------


def _check(rates_ips: Sequence[float], bound_ms: float | None, batch_size: int, scope: str, seconds: float) -> None:
    if not rates_ips and bound_ms is None:
        raise UserError("the server scenario needs a rate of requests or a bound for their latency")
    for what, values in (("rates", rates_ips), ("the bound", [] if bound_ms is None else [bound_ms])):
        if not all(value > 0 and math.isfinite(value) for value in values):
            raise UserError(f"{what} must be positive, got {', '.join(f'{value:g}' for value in values)}")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}")
    if scope not in SCOPES or scope in ("preprocess", "compute"):
        raise UserError(f"scope {scope}: requests to a server are h2d+compute+d2h or end_to_end")
    if not seconds > 0:
        raise UserError(f"seconds must be positive, got {seconds:g}")


def _requests(rate: float, seconds: float, fewest: int) -> int:
    """Count the requests that are measured, and the lead before them."""
    return math.ceil(max(rate * seconds, fewest) / (1 - LEAD))


def _server_cell(found: OpenLoop, rate: float, facts: dict[str, object], seed: int) -> Cell:
    counted = np.arange(math.ceil(len(found.latency_ms) * LEAD), len(found.latency_ms))
    slices, block_start = [], float(found.end_s[: counted[0]].max(initial=0.0))
    for part in np.array_split(counted, min(BLOCKS, len(counted))):
        block_end = max(float(found.end_s[part].max()), block_start + 1e-9)
        slices.append(Slice(found.latency_ms[part].tolist(), len(part), (block_end - block_start) * 1e3))
        block_start = block_end
    delay = float(np.percentile(found.start_delay_ms, 99)) if len(found.start_delay_ms) else None
    return make_cell(slices, seed=seed, offered_ips=rate, start_delay_ms=delay, **facts)


def _search(
    name: str,
    tasks: Sequence[Task],
    bound_ms: float,
    batch_size: int,
    seconds: float,
    least_requests: int,
    clock: Clock,
    seed: int,
    run: Callable[[float, int], Cell],
) -> tuple[BoundedThroughput, Cell | None]:
    alone = run_slice(tasks[:1], 1, min(seconds, 2.0), clock, calls=20).samples_ms
    if np.median(alone) > bound_ms:
        reason = f"an idle artifact already takes {np.median(alone):.2f} ms (median of {len(alone)} calls)"
        return BoundedThroughput(runner=name, bound_ms=bound_ms, rate_ips=None, reason=reason, probes=[]), None
    full = run_slice(tasks, batch_size, min(seconds, 2.0), clock, calls=20)
    probes: list[Probe] = []

    def passes(rate: float) -> bool:
        requests = _requests(rate, seconds, least_requests)
        allowed, over, seen = int(requests * (1 - PERCENT / 100)), 0, 0

        def give_up(latency_ms: float) -> bool:
            nonlocal over, seen
            seen, over = seen + 1, over + (latency_ms > bound_ms)
            return over > allowed

        rng = np.random.default_rng([seed, 1000 + len(probes)])
        open_loop(tasks, rate, requests, clock, rng, most_together=batch_size, give_up=give_up)
        probes.append(Probe(rate_ips=rate, requests=seen, over_bound=over, passed=over <= allowed))
        return probes[-1].passed

    rate = highest_rate(passes, 1000.0 * full.images / full.wall_ms)
    for turn in range(6):
        if rate == 0:
            break
        cell = run(rate, 2000 + turn)
        if cell.latency_ms["p99"].value <= bound_ms:
            return BoundedThroughput(runner=name, bound_ms=bound_ms, rate_ips=rate, probes=probes), cell
        rate *= 0.95  # the search was lucky
    reason = f"p99 was above {bound_ms:g} ms at every rate that was tried"
    return BoundedThroughput(runner=name, bound_ms=bound_ms, rate_ips=None, reason=reason, probes=probes), None


def _overloads(cells: Sequence[Cell]) -> list[str]:
    """A queue that grows as long as requests come has no latency; what was seen depends on when one stopped."""
    found = []
    for cell in cells:
        halves = np.array_split(np.asarray([np.median(part) for part in cell.samples_ms]), 4)
        served = cell.throughput_ips.value
        grows = all(np.median(a) < np.median(b) for a, b in pairwise(halves))
        if cell.offered_ips and served < 0.95 * cell.offered_ips and grows:
            found.append(
                f"{cell.runner}, {cell.where}: overloaded, {served:.4g} images/s is all it does; "
                "the queue grew to the end, so its latencies mean nothing"
            )
    return found
