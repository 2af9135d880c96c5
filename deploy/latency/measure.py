"""Closed loop: as soon as a call has returned, the next one starts.

Every cell (artifact x scope x batch size) is first repeated until its time is stable. Then rounds of short slices go
through all artifacts in a new random order each time, so that drift (clock, heat, neighbours) falls on all of them
alike. No sample is dropped or clipped. `single-stream` has one session of each artifact, `multi-stream` several that
work at the same time, each in a thread of its own; `offline` asks for the throughput of each batch size.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.core.progress import Progress
from deploy.latency.clock import HOST_CLOCK, Clock
from deploy.latency.compare import compare_cells
from deploy.latency.results import BenchmarkReport, Cell, Scenario, Scope, WarmUp
from deploy.latency.scopes import SCOPES, USUAL_SCOPES, Encoded, Task, clock_of, make_task, read_pool, scopes_of
from deploy.latency.statistics import PERCENTILES, SIGNIFICANCE, calls_needed, estimates, name_of, ratio_of_sums
from deploy.latency.telemetry import Telemetry, troubles
from deploy.runtimes.base import Runner

Streams = Mapping[str, Sequence[Runner]]


def benchmark(
    runners: Mapping[str, Runner | Sequence[Runner]],
    images: Sequence[Path],
    *,
    batch_sizes: Sequence[int] = (1,),
    scopes: Sequence[Scope] = USUAL_SCOPES,
    scenario: Scenario | None = None,
    seconds: float = 5.0,
    rounds: int = 20,
    warm_up_seconds: float = 10.0,
    tolerance: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Clock = HOST_CLOCK,
) -> BenchmarkReport:
    """Measure every artifact at every batch size in every scope.

    runners: a runner each, or one for each stream. images: files to take in turn (the first 32). scenario: the name
    in the report; None is `single-stream` or `multi-stream`, whichever `runners` is. seconds: measuring time of a
    cell, split over `rounds` slices; a slice has at least one call. warm_up_seconds: most time spent on the warm-up of
    a cell. tolerance: share by which an artifact may be slower than the first one. seed: of the order within a round
    and of the bootstrap. progress(done, total) is called after every slice.

    Raises UserError for empty or impossible arguments and for unreadable images.
    """
    streams = as_streams(runners)
    _check(batch_sizes, scopes, seconds, rounds)
    encoded = read_pool(images)
    scenario = scenario or ("single-stream" if max(map(len, streams.values())) == 1 else "multi-stream")
    planned, notes = _plan(streams, scopes)
    rng = np.random.default_rng(seed)
    before, cells = environment(), list[Cell]()
    done, total = 0, len(batch_sizes) * rounds * sum(map(len, planned.values()))

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with Telemetry() as telemetry, quiet_collector():
        how = _How(scenario, seconds, rounds, warm_up_seconds, seed, clock, telemetry)
        for batch_size in batch_sizes:
            for scope in dict.fromkeys(scope for chosen in planned.values() for scope in chosen):
                measured = {name: parts for name, parts in streams.items() if scope in planned[name]}
                cells += _in_turn(measured, scope, batch_size, encoded, how, rng, advance)
    comparisons = compare_cells(cells, tolerance=tolerance, seed=seed)
    settings = {
        **shared_settings(streams, encoded),
        "scenario": scenario,
        "batch_sizes": list(batch_sizes),
        "scopes": list(scopes),
        "seconds": seconds,
        "rounds": rounds,
        "warm_up_seconds": warm_up_seconds,
        "tolerance": tolerance,
        "seed": seed,
    }
    found = warnings(cells, before) + troubles(telemetry.readings)
    if comparisons and len(comparisons) * 2.0 ** (1 - rounds) >= SIGNIFICANCE:  # the rarest of all swaps
        found.append(f"{rounds} rounds are too few to tell any difference in {len(comparisons)} figures")
    return BenchmarkReport(
        cells=cells,
        comparisons=comparisons,
        environment=after(before),
        settings=settings,
        readings=telemetry.readings,
        notes=notes,
        warnings=found,
    )


# -------------------------------------------------------------------- shared with the open loop of server.py


@dataclass(frozen=True)
class Slice:
    """Measured calls in the order of time, the images they handled and the time that took."""

    samples_ms: list[float]
    images: int
    wall_ms: float


def as_streams(runners: Mapping[str, Runner | Sequence[Runner]]) -> dict[str, Sequence[Runner]]:
    """A list of runners for each name. Raises UserError for none."""
    streams = {name: [given] if not isinstance(given, Sequence) else list(given) for name, given in runners.items()}
    if not streams or not all(streams.values()):
        raise UserError("nothing to benchmark: no artifact given")
    return streams  # type: ignore[return-value]  # a Runner is no Sequence


def make_tasks(streams: Sequence[Runner], scope: Scope, encoded: Encoded, most_images: int, clock: Clock) -> list[Task]:
    """A task for each stream; each begins with another image."""
    return [make_task(runner, scope, encoded, most_images, clock, start) for start, runner in enumerate(streams)]


def warm_up(tasks: Sequence[Task], batch_size: int, limit_seconds: float, clock: Clock) -> WarmUp:
    """Call until the medians of three windows in a row have a coefficient of variation of at most 0.05.

    A window is 5 calls of each stream or 0.1 s, whichever is longer.
    """
    start, calls, medians = clock.now(), 0, list[float]()
    while True:
        left = start + limit_seconds - clock.now()
        window = run_slice(tasks, batch_size, max(min(0.1, left), 0.0), clock, calls=5 if left > 0 else 1)
        calls += len(window.samples_ms)
        medians.append(float(np.median(window.samples_ms)))
        last = np.asarray(medians[-3:])
        stable = len(last) == 3 and bool(last.std() <= 0.05 * last.mean())
        spent = clock.now() - start
        if stable or spent >= limit_seconds:
            return WarmUp(calls=calls, seconds=round(spent, 3), stable=stable)


def run_slice(tasks: Sequence[Task], batch_size: int, seconds: float, clock: Clock, *, calls: int = 1) -> Slice:
    """All tasks at the same time, each for at least `seconds` and `calls` calls. Garbage is collected before, not
    within."""
    with _no_collection():
        if len(tasks) == 1:
            parts = [_loop(tasks[0], batch_size, seconds, clock, calls)]
        else:
            gate = Barrier(len(tasks))

            def stream(task: Task) -> list[tuple[float, float]]:
                gate.wait()
                return _loop(task, batch_size, seconds, clock, calls)

            with ThreadPoolExecutor(len(tasks)) as pool:
                parts = list(pool.map(stream, tasks))
    # The streams do not end together. The sum of their own rates has no tail in which only some still work.
    rate = sum(len(part) / max(sum(ms for _, ms in part), 1e-9) for part in parts)
    samples = [ms for _, ms in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
    return Slice(samples, len(samples) * batch_size, len(samples) / rate)


def make_cell(slices: Sequence[Slice], *, seed: int, **facts: Any) -> Cell:
    """A cell with the figures of these blocks."""
    blocks = [np.asarray(part.samples_ms) for part in slices]
    calls = np.asarray([len(part) for part in blocks], float)
    images = np.asarray([part.images for part in slices], float)
    wall_ms = np.asarray([part.wall_ms for part in slices])
    percentiles = estimates(blocks, PERCENTILES, seed=seed)
    return Cell(
        **facts,
        latency_ms={name_of(p): found for p, found in zip(PERCENTILES, percentiles, strict=True)},
        mean_ms=ratio_of_sums(np.asarray([part.sum() for part in blocks]), calls, seed=seed),
        throughput_ips=ratio_of_sums(images, wall_ms / 1000, seed=seed),
        samples_ms=[part.samples_ms for part in slices],
        images=[part.images for part in slices],
        wall_ms=wall_ms.tolist(),
    )


def shared_settings(streams: Streams, encoded: Encoded) -> dict[str, Any]:
    """Description of what was measured, as every scenario records it."""
    first = {name: runners[0] for name, runners in streams.items()}
    return {
        "images": len(encoded),
        "images_sha256": hashlib.sha256(b"".join(data for _, data in encoded)).hexdigest(),
        "streams": {name: len(runners) for name, runners in streams.items()},
        "input_size": {name: list(runner.card.input_size) for name, runner in first.items()},
        "precision": {name: dict(runner.card.precision) for name, runner in first.items()},
        "threads": {name: getattr(runner, "threads", None) for name, runner in first.items()},
        "runtime": {name: dict(runner.settings) for name, runner in first.items() if hasattr(runner, "settings")},
    }


def warnings(cells: Sequence[Cell], facts: dict[str, Any]) -> list[str]:
    """Reasons to doubt the figures, for their reader."""
    found = []
    for cell in cells:
        found += [f"{cell.runner}, {cell.where}: {why}" for why in _unsteady(cell)]
    few = [p for p in PERCENTILES if not all(cell.latency_ms[name_of(p)].supported for cell in cells)]
    if few:
        needs = ", ".join(f"{name_of(p)} {calls_needed(p)}" for p in few)
        least = min(cell.calls for cell in cells)
        found.append(f"too few calls (the fewest: {least}) for an interval; needed for {needs}: give more seconds")
    cores, load = facts["cpu"]["usable_cores"], facts["cpu"]["load_average"]
    if cores and load and load[0] > 0.5 * cores:
        found.append(f"the machine was busy before the measurement: load {load[0]:.1f} on {cores} cores")
    if facts["cpu"]["governor"] not in (None, "performance"):
        found.append(f"the CPU governor is '{facts['cpu']['governor']}', not 'performance'")
    return found


def doubts(report: BenchmarkReport, cells: Sequence[Cell]) -> list[str]:
    """Reasons not to believe the figures of some cells of a report: a warm-up that did not settle, and what disturbed
    the machine meanwhile. Its load before the measurement is none: that may be the caller's own work."""
    return list(dict.fromkeys([why for cell in cells for why in _unsteady(cell)] + troubles(report.readings)))


def after(before: dict[str, Any]) -> dict[str, Any]:
    """The environment with what changed since `before` was taken."""
    now = environment()
    cpu = {**before["cpu"], "load_average_after": now["cpu"]["load_average"]}
    return {**before, "cpu": cpu, "gpus_after": now["gpus"]}


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Freeze the objects that live now, so that collecting before every slice stays cheap."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ----------------------------------------------------------------------------------------------------


def _unsteady(cell: Cell) -> list[str]:
    return [] if cell.warm_up.stable else [f"not stable after {cell.warm_up.seconds:.1f} s of warm-up"]


def _check(batch_sizes: Sequence[int], scopes: Sequence[str], seconds: float, rounds: int) -> None:
    if not batch_sizes or any(size < 1 for size in batch_sizes):
        raise UserError(f"batch sizes must be at least 1, got {list(batch_sizes)}")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise UserError(f"unknown scope '{unknown[0] if unknown else ''}': choose from {', '.join(SCOPES)}")
    if not seconds > 0 or rounds < 2:
        raise UserError(f"seconds must be positive and rounds at least 2, got {seconds:g} and {rounds}")


@dataclass(frozen=True)
class _How:
    """Settings that the measurements of one report have in common."""

    scenario: Scenario
    seconds: float
    rounds: int
    warm_up_seconds: float
    seed: int
    clock: Clock
    telemetry: Telemetry


def _in_turn(
    streams: Streams,
    scope: Scope,
    batch_size: int,
    encoded: Encoded,
    how: _How,
    rng: np.random.Generator,
    advance: Callable[[], None],
) -> list[Cell]:
    """A cell for each artifact, after a slice of each a round, in a new random order each time. advance() is called
    after every slice."""
    tasks = {name: make_tasks(parts, scope, encoded, batch_size, how.clock) for name, parts in streams.items()}
    warm_ups = {name: warm_up(tasks[name], batch_size, how.warm_up_seconds, how.clock) for name in tasks}
    how.telemetry.read()
    slices: dict[str, list[Slice]] = {name: [] for name in tasks}
    for _ in range(how.rounds):
        for name in rng.permutation(list(tasks)).tolist():
            slices[name].append(run_slice(tasks[name], batch_size, how.seconds / how.rounds, how.clock))
            how.telemetry.read()
            advance()
    return [
        make_cell(
            slices[name],
            runner=name,
            backend=parts[0].backend,
            scenario=how.scenario,
            scope=scope,
            clock=clock_of(parts[0], scope, encoded),
            batch_size=batch_size,
            streams=len(parts),
            warm_up=warm_ups[name],
            seed=how.seed,
        )
        for name, parts in streams.items()
    ]


def _plan(streams: Streams, scopes: Sequence[Scope]) -> tuple[dict[str, list[Scope]], list[str]]:
    """The scopes of each artifact, in the order of `scopes`, and notes for the reader."""
    planned, notes = {}, []
    for name, runners in streams.items():
        planned[name], note = scopes_of(runners[0], name, scopes)
        notes += [note] if note else []
    return planned, notes


def _loop(task: Task, batch_size: int, seconds: float, clock: Clock, calls: int) -> list[tuple[float, float]]:
    """(end in seconds, milliseconds) of each call."""
    found: list[tuple[float, float]] = []
    end = clock.now() + seconds
    while True:
        before = clock.now()
        device_ms = task(batch_size)
        now = clock.now()
        found.append((now, (now - before) * 1e3 if device_ms is None else device_ms))
        if now >= end and len(found) >= calls:
            return found


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
