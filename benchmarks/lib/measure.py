"""Interleaved timing, and a look at who else uses the CPU.

Rules of every ratio: all cases are timed in turn (A B C A B C ...), so that drift of the machine falls on all of
them alike; a repeat lasts at least `MIN_REPEAT_S`; a repeat during which other processes used more than
`MAX_FOREIGN` of the CPUs is set aside and taken again; when the machine never becomes quiet the disturbed
repeats are used after all, and the row says so. Standard library and torch-free, because it also runs in the
environments of the projects that we compare with.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.results import ROOT, Row

MIN_REPEAT_S = 0.2
MAX_FOREIGN = 0.10
MAX_EXTRA = 2  # up to this many times the wanted repeats are taken again

# Touching fresh memory is slow on virtual machines, and glibc gives a large tensor back to the system after
# every use. `reuse` keeps freed memory in the process, as a caching allocator or a GPU does; `default` is glibc
# as it is.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "reuse": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
    },
}

Call = Callable[[], dict[str, float] | None]
"""One call of what is timed; it may return the seconds of named parts of itself."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over the repeats that were used, and medians of named parts.

    first_call_s: with whatever is compiled in it. disturbed: repeats among the used ones during which other processes
    were busy. foreign_cpu: the median share of the CPUs that others used.
    """

    ms: float
    q1: float
    q3: float
    parts_ms: dict[str, float]
    first_call_s: float
    repeats: int
    disturbed: int
    foreign_cpu: float

    def row(self, variant: str, metric: str = "time") -> Row:
        notes = f"busy: others used {self.foreign_cpu:.0%} of the CPUs" if self.disturbed else ""
        return Row(variant, metric, self.ms, "ms", self.q1, self.q3, "quartiles", self.repeats, notes=notes)

    def part_rows(self, variant: str) -> list[Row]:
        return [Row(variant, f"time of {part}", ms, "ms", n=self.repeats) for part, ms in self.parts_ms.items()]


def interleave(cases: dict[str, Call], *, repeats: int, min_repeat_s: float = MIN_REPEAT_S) -> dict[str, Timing]:
    """Time the cases in turn."""
    first: dict[str, float] = {}
    inner: dict[str, int] = {}
    for name, run in cases.items():
        first[name] = _seconds(run)
        _seconds(run)
        inner[name] = max(1, math.ceil(min_repeat_s / _seconds(run)))
    clean: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    disturbed: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    foreign: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats * (1 + MAX_EXTRA)):
        waiting = [name for name in cases if len(clean[name]) < repeats]
        if not waiting:
            break
        for name in waiting:
            with ForeignCpu() as other:
                seconds = _repeat(cases[name], inner[name])
            foreign[name].append(other.share)
            (clean if other.share <= MAX_FOREIGN else disturbed)[name].append(seconds)
    timings = {}
    for name in cases:
        used = clean[name] + disturbed[name][: max(0, repeats - len(clean[name]))]
        q1, median, q3 = quartiles([1e3 * seconds["total"] for seconds in used])
        timings[name] = Timing(
            median,
            q1,
            q3,
            {part: statistics.median(1e3 * seconds[part] for seconds in used) for part in used[0] if part != "total"},
            first[name],
            len(used),
            len(used) - len(clean[name]),
            statistics.median(foreign[name]),
        )
    return timings


def range_row(variant: str, metric: str, values: list[float], unit: str) -> Row:
    """The median of rounds, with the least and the greatest."""
    return Row(variant, metric, statistics.median(values), unit, min(values), max(values), "range", len(values))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value three times that."""
    if len(values) < 2:
        return (values[0],) * 3
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


class ForeignCpu:
    """`share` of all CPUs that processes outside this benchmark used while the block ran; 0 where it cannot
    be known (no /proc)."""

    def __enter__(self) -> ForeignCpu:
        self._busy, self._own, self._start = _busy_seconds(), _own_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        wall = time.perf_counter() - self._start
        foreign = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        self.share = max(0.0, foreign) / (wall * (os.cpu_count() or 1))


def environment_of_child(allocator: str, threads: int) -> dict[str, str]:
    """Environment variables of a measured process."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    # The first process of a benchmark counts as its own whatever descends from it.
    owner = {"BENCH_ROOT_PID": os.environ.get("BENCH_ROOT_PID", str(os.getpid()))}
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    return {**keep, **ALLOCATORS[allocator], **owner, **path, "BENCH_ALLOCATOR": allocator}


# --- details --------------------------------------------------------------------------------------------


def _seconds(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _repeat(run: Call, inner: int) -> dict[str, float]:
    """Seconds a call, total and by part, of `inner` calls."""
    row = {"total": 0.0}
    start = time.perf_counter()
    for _ in range(inner):
        for part, seconds in (run() or {}).items():
            row[part] = row.get(part, 0.0) + seconds / inner
    row["total"] = (time.perf_counter() - start) / inner
    return row


def _busy_seconds() -> float:
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks


def _own_seconds() -> float:
    """CPU seconds of the benchmark's process tree, reaped children included."""
    parents, seconds = {}, {}
    for pid, fields in _processes():
        parents[pid] = int(fields[1])
        seconds[pid] = sum(int(fields[i]) for i in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")
    root = int(os.environ.get("BENCH_ROOT_PID", os.getpid()))

    def ours(pid: int) -> bool:
        while pid != root and pid in parents:
            pid = parents[pid]
        return pid == root

    return sum(value for pid, value in seconds.items() if ours(pid))


def _processes() -> Iterator[tuple[int, list[str]]]:
    if not os.path.isdir("/proc"):
        return
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield int(name), Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
