"""How long does a detector take, and how sure is that figure?

Three scopes, the same for every backend; each starts and ends in host memory, for one batch at a time:

- `preprocess`: encoded image bytes → uint8 canvas (decode, resize, pad), on one thread;
- `inference`: canvas → padded detections on the canvas (copies to and from the device included);
- `end_to_end`: encoded image bytes → detections in pixels of the original image.

How it measures. Every cell (runner × batch size × scope) is first repeated until its time is stable. Then
rounds of short slices go through all runners in a new random order each time, so that drift (clock, heat,
neighbours) falls on all of them alike. No sample is dropped or clipped. Confidence intervals come from a
bootstrap over rounds, because the samples within a slice are not independent; the speed-up over the first
runner is bootstrapped from the same rounds of both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from deploy.environment import environment
from deploy.errors import UserError
from deploy.files import write_json
from deploy.preprocess import decode_image, fit_canvas, read_image_bytes, to_original
from deploy.runtimes.base import Runner

Scope = Literal["preprocess", "inference", "end_to_end"]
SCOPES: tuple[Scope, ...] = ("preprocess", "inference", "end_to_end")
PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.95
_RESAMPLES = 1000
_POOL = 32  # encoded images kept in memory and used in turn


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WarmUp:
    """What came before the measurement. `stable` is False when the time limit ended it."""

    calls: int
    seconds: float
    stable: bool


@dataclass(frozen=True)
class Cell:
    """One runner, batch size and scope. Times are milliseconds a batch."""

    runner: str
    backend: str
    batch_size: int
    scope: Scope
    latency_ms: dict[str, Estimate]
    """`p50`, `p90`, `p95`, `p99`."""
    mean_ms: float
    throughput_ips: Estimate
    """Images a second: images done over time spent, one batch after the other."""
    speedup: Estimate | None
    """p50 of the first runner over this one's; None for the first runner."""
    warm_up: WarmUp
    samples_ms: list[list[float]]
    """Every measured call, a list a round."""

    @property
    def calls(self) -> int:
        return sum(len(samples) for samples in self.samples_ms)


@dataclass(frozen=True)
class BenchmarkReport:
    cells: list[Cell]
    environment: dict[str, Any]
    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def cell(self, runner: str, batch_size: int = 1, scope: Scope = "end_to_end") -> Cell:
        """The cell of that name; KeyError when it was not measured."""
        for cell in self.cells:
            if (cell.runner, cell.batch_size, cell.scope) == (runner, batch_size, scope):
                return cell
        raise KeyError((runner, batch_size, scope))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, raw samples included."""
        return asdict(self)


def benchmark(
    runners: Mapping[str, Runner],
    images: Sequence[Path],
    *,
    batch_sizes: Sequence[int] = (1,),
    scopes: Sequence[Scope] = SCOPES,
    seconds: float = 5.0,
    rounds: int = 10,
    warm_up_seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BenchmarkReport:
    """Measure every runner at every batch size in every scope.

    images: files to take in turn (the first 32). seconds: measuring time of a cell, split over `rounds`
    slices; a slice has at least one call. warm_up_seconds: most time spent on the warm-up of a cell. seed:
    of the order within a round and of the bootstrap. progress(done, total) is called after every slice.

    Raises UserError for empty or impossible arguments and for unreadable images.
    """
    _check(runners, images, batch_sizes, scopes, seconds, rounds)
    rng = np.random.default_rng(seed)
    encoded = [(path, read_image_bytes(path)) for path in images[:_POOL]]
    before = environment()
    cells: list[Cell] = []
    total, done = len(batch_sizes) * len(scopes) * rounds * len(runners), 0
    gc.collect()
    gc.freeze()  # what lives now is not looked at again, so that collecting before every slice stays cheap
    try:
        for batch_size in batch_sizes:
            for scope in scopes:
                tasks = {name: _task(runner, scope, encoded, batch_size) for name, runner in runners.items()}
                warm_ups = {name: _warm_up(task, warm_up_seconds) for name, task in tasks.items()}
                samples: dict[str, list[list[float]]] = {name: [] for name in runners}
                for _ in range(rounds):
                    for name in rng.permutation(list(runners)):
                        samples[name].append(_slice(tasks[name], seconds / rounds))
                        done += 1
                        if progress is not None:
                            progress(done, total)
                first = next(iter(runners))
                for name, runner in runners.items():
                    base = None if name == first else samples[first]
                    cells.append(
                        _cell(name, runner.backend, batch_size, scope, samples[name], base, warm_ups[name], seed)
                    )
    finally:
        gc.unfreeze()
    settings = {
        "images": len(encoded),
        "batch_sizes": list(batch_sizes),
        "scopes": list(scopes),
        "seconds": seconds,
        "rounds": rounds,
        "warm_up_seconds": warm_up_seconds,
        "seed": seed,
        "confidence": CONFIDENCE,
        "input_size": {name: list(runner.card.input_size) for name, runner in runners.items()},
        "threads": {name: getattr(runner, "threads", None) for name, runner in runners.items()},
    }
    after = environment()
    before["cpu"]["load_average_after"] = after["cpu"]["load_average"]
    before["gpus_after"] = after["gpus"]
    return BenchmarkReport(cells, before, settings, _warnings(cells, before))


def report_table(report: BenchmarkReport) -> Table:
    """The report for a terminal: milliseconds a batch, intervals of 95 %."""
    table = Table(title="Latency in ms a batch [95 % confidence]")
    for heading in ("artifact", "backend", "scope"):
        table.add_column(heading)
    for heading in ("batch", "p50", "p90", "p95", "p99", "images/s", "speed-up", "calls"):
        table.add_column(heading, justify="right")
    for cell in report.cells:
        p50 = cell.latency_ms["p50"]
        speedup = cell.speedup
        table.add_row(
            cell.runner,
            cell.backend,
            cell.scope,
            str(cell.batch_size),
            f"{p50.value:.2f} \\[{p50.low:.2f}, {p50.high:.2f}]",
            *(f"{cell.latency_ms[f'p{p}'].value:.2f}" for p in PERCENTILES[1:]),
            f"{cell.throughput_ips.value:.1f}",
            "-" if speedup is None else f"{speedup.value:.2f}× \\[{speedup.low:.2f}, {speedup.high:.2f}]",
            str(cell.calls),
        )
    return table


def write_report(path: Path, report: BenchmarkReport) -> None:
    """The report as JSON, with every sample."""
    write_json(path, report.to_dict())


# ----------------------------------------------------------------------------------------------------


def _check(
    runners: Mapping[str, Runner],
    images: Sequence[Path],
    batch_sizes: Sequence[int],
    scopes: Sequence[str],
    seconds: float,
    rounds: int,
) -> None:
    if not runners:
        raise UserError("nothing to benchmark: no artifact given")
    if not images:
        raise UserError("nothing to benchmark on: no images given")
    if not batch_sizes or any(size < 1 for size in batch_sizes):
        raise UserError(f"batch sizes must be at least 1, got {list(batch_sizes)}")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise UserError(f"unknown scope '{unknown[0] if unknown else ''}': choose from {', '.join(SCOPES)}")
    if not seconds > 0 or rounds < 2:
        raise UserError(f"seconds must be positive and rounds at least 2, got {seconds:g} and {rounds}")


def _task(runner: Runner, scope: Scope, encoded: list[tuple[Path, bytes]], batch_size: int) -> Callable[[], object]:
    """One call is one batch; successive calls take the next images."""
    card = runner.card
    position = 0

    def next_files() -> list[tuple[Path, bytes]]:
        nonlocal position
        chosen = [encoded[(position + i) % len(encoded)] for i in range(batch_size)]
        position = (position + batch_size) % len(encoded)
        return chosen

    def prepare(files: list[tuple[Path, bytes]]) -> tuple[np.ndarray, list[tuple[Any, tuple[int, int]]]]:
        canvases, geometry = [], []
        for path, data in files:
            pixels = decode_image(data, str(path))
            canvas, scale = fit_canvas(pixels, card)
            canvases.append(canvas)
            geometry.append((scale, (pixels.shape[0], pixels.shape[1])))
        return np.stack(canvases), geometry

    def end_to_end() -> object:
        batch, geometry = prepare(next_files())
        out = runner(batch)
        return [to_original(out.boxes[i, : out.count[i]], *where) for i, where in enumerate(geometry)]

    if scope == "preprocess":
        return lambda: prepare(next_files())
    if scope == "end_to_end":
        return end_to_end
    canvases = np.concatenate([prepare([file])[0] for file in encoded])
    order = np.arange(len(encoded) * batch_size) % len(encoded)
    batches = [canvases[part] for part in order.reshape(-1, batch_size)[: max(_POOL // batch_size, 1)]]
    turn = 0

    def inference() -> object:
        nonlocal turn
        turn = (turn + 1) % len(batches)
        return runner(batches[turn])

    return inference


def _warm_up(task: Callable[[], object], limit_seconds: float) -> WarmUp:
    """Call until three windows in a row have medians within 5 % of each other and their spread has settled.

    A window is 5 calls or 0.1 s, whichever is longer. Stable: the coefficient of variation of the last three
    window medians is at most 0.05.
    """
    start = time.perf_counter()
    calls, medians = 0, []
    while True:
        window: list[float] = []
        window_start = time.perf_counter()
        while len(window) < 5 or time.perf_counter() - window_start < 0.1:
            before = time.perf_counter()
            task()
            window.append(time.perf_counter() - before)
            if time.perf_counter() - start > limit_seconds:
                break
        calls += len(window)
        medians.append(float(np.median(window)))
        last = np.asarray(medians[-3:])
        stable = len(last) == 3 and bool(last.std() <= 0.05 * last.mean())
        spent = time.perf_counter() - start
        if stable or spent > limit_seconds:
            return WarmUp(calls, spent, stable)


def _slice(task: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call in a slice of at least `seconds`. Garbage is collected before, not within."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    samples = []
    try:
        end = time.perf_counter_ns() + int(seconds * 1e9)
        while True:
            before = time.perf_counter_ns()
            task()
            after = time.perf_counter_ns()
            samples.append((after - before) / 1e6)
            if after >= end:
                return samples
    finally:
        if enabled:
            gc.enable()


def _cell(
    name: str,
    backend: str,
    batch_size: int,
    scope: Scope,
    rounds: list[list[float]],
    base: list[list[float]] | None,
    warm_up: WarmUp,
    seed: int,
) -> Cell:
    everything = np.concatenate([np.asarray(samples) for samples in rounds])
    point = np.percentile(everything, PERCENTILES)
    # How often each round is drawn, [resamples, rounds]. The same draw serves both runners of a speed-up: what
    # disturbed one in a round disturbed the other.
    times = np.random.default_rng(seed).multinomial(len(rounds), [1 / len(rounds)] * len(rounds), _RESAMPLES)
    drawn = _resampled_percentiles(rounds, times)
    calls = np.asarray([len(samples) for samples in rounds])
    spent_ms = np.asarray([sum(samples) for samples in rounds])
    speedup = None
    if base is not None:
        value = float(np.median(np.concatenate([np.asarray(samples) for samples in base])) / point[0])
        speedup = _estimate(value, _resampled_percentiles(base, times)[:, 0] / drawn[:, 0])
    return Cell(
        runner=name,
        backend=backend,
        batch_size=batch_size,
        scope=scope,
        latency_ms={f"p{p}": _estimate(float(point[i]), drawn[:, i]) for i, p in enumerate(PERCENTILES)},
        mean_ms=float(everything.mean()),
        throughput_ips=_estimate(
            1000.0 * batch_size * len(everything) / float(everything.sum()),
            1000.0 * batch_size * (times @ calls) / (times @ spent_ms),
        ),
        speedup=speedup,
        warm_up=warm_up,
        samples_ms=rounds,
    )


def _resampled_percentiles(rounds: list[list[float]], times: np.ndarray) -> np.ndarray:
    """Percentiles of the pooled samples with round i taken times[r, i] times: [resamples, percentiles].

    Equal to np.percentile of the repeated samples (linear interpolation), without repeating or sorting them
    again.
    """
    samples = np.concatenate([np.asarray(part) for part in rounds])
    order = np.argsort(samples)
    owner = np.repeat(np.arange(len(rounds)), [len(part) for part in rounds])[order]
    samples = samples[order]
    out = np.empty((len(times), len(PERCENTILES)))
    for r, weights in enumerate(times):
        ranks_below = weights[owner].cumsum()
        position = (ranks_below[-1] - 1) * np.asarray(PERCENTILES) / 100
        low = np.floor(position)
        high = np.minimum(low + 1, ranks_below[-1] - 1)
        left, right = (samples[np.searchsorted(ranks_below, rank, side="right")] for rank in (low, high))
        out[r] = left + (right - left) * (position - low)
    return out


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    tail = (1.0 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def _warnings(cells: list[Cell], facts: dict[str, Any]) -> list[str]:
    """What a reader should know before believing the figures."""
    found = []
    for cell in cells:
        where = f"{cell.runner}, batch {cell.batch_size}, {cell.scope}"
        if not cell.warm_up.stable:
            found.append(f"{where}: not stable after {cell.warm_up.seconds:.1f} s of warm-up")
        if cell.calls < 100:
            found.append(f"{where}: {cell.calls} calls: p99 is close to the largest of them")
    cores, load = facts["cpu"]["usable_cores"], facts["cpu"]["load_average"]
    if cores and load and load[0] > 0.5 * cores:
        found.append(f"the machine was busy before the measurement: load {load[0]:.1f} on {cores} cores")
    if facts["cpu"]["governor"] not in (None, "performance"):
        found.append(f"the CPU governor is '{facts['cpu']['governor']}', not 'performance'")
    return found
