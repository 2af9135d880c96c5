"""Times and errors of implementations that do the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.lib.results import Row

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative: of the loss, and of gradients in norm

Run = Callable[[], tuple[Tensor, ...]]
"""Forward and backward; returns the results and gradients that are compared."""


@dataclass(frozen=True)
class Choice:
    """Choice of what is measured. compiled: also the reference under torch.compile."""

    device: torch.device
    backend: str
    smoke: bool
    compiled: bool
    repeats: int


@dataclass(frozen=True)
class Implementations:
    """An operator at one size: implementations by name ("fused" is ours), what must move, and whether the numbers of
    all are equal (random draws are not)."""

    name: str
    runs: dict[str, Run]
    floor_bytes: int
    comparable: bool = True


def copy_bandwidth(choice: Choice) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    device = choice.device
    source = torch.ones(2**24 if choice.smoke or device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(time_in_turn({"copy": lambda: (target.copy_(source),)}, device, 10)["copy"])
    return 2 * source.numel() / ms * 1e3


def time_in_turn(runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every repeat, the cases in turn, each with a cold cache; two calls before do not count."""
    flush = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            flush.zero_()
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(1_000_000)  # the queue fills meanwhile: launches are not what is measured
                start.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def measure(implementations: Implementations, choice: Choice, copy: float) -> list[Row]:
    """Rows of every implementation, after their results were compared. copy: bytes a second that a copy moves."""
    errors = _compare(implementations)
    times = time_in_turn(implementations.runs, choice.device, choice.repeats)
    fused = statistics.median(times["fused"])
    rows = []
    for name, values in times.items():
        variant, ms, n = f"{implementations.name}: {name}", statistics.median(values), len(values)
        ordered = sorted(values)
        low, high = ordered[n // 10], ordered[-1 - n // 10]
        share = implementations.floor_bytes / (ms * 1e-3) / copy
        rows += [
            Row(variant, "time", ms, "ms", low, high, "p10 to p90", n),
            Row(variant, "share of copy", share, notes=f"floor bytes {implementations.floor_bytes}"),
        ]
        if name != "fused":
            rows.append(Row(variant, "time over fused", ms / fused, "×"))
        if name in errors:
            rows.append(Row(variant, "error", errors[name], notes="against eager, relative, in norm"))
        if choice.device.type == "cuda":
            rows.append(Row(variant, "extra memory", _extra_memory(implementations.runs[name]), "bytes"))
        print(f"{variant:80s} {ms:9.3f} ms  {share:6.1%} of copy  fused is {ms / fused:6.2f}x as fast", flush=True)
    return rows


def _extra_memory(run: Run) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _compare(implementations: Implementations) -> dict[str, float]:
    """Greatest relative error (in norm) of every implementation against eager."""
    expected = implementations.runs["eager"]()
    errors = {}
    for name, run in implementations.runs.items():
        if name == "eager" or not implementations.comparable:
            continue
        result = run()
        errors[name] = max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
            for a, b in zip(result, expected, strict=True)
        )
        tolerance = TOLERANCE[torch.bfloat16 if torch.bfloat16 in {x.dtype for x in result} else torch.float32]
        if not errors[name] <= tolerance:
            raise SystemExit(
                f"error: {implementations.name}: {name} differs from eager by {errors[name]:.2e} > {tolerance}"
            )
    return errors
