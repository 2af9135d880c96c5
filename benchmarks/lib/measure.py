"""What the benchmarks share: interleaved timing, a look at who else uses the CPU, and the record of a run.

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
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

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

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Case = Callable[[], dict[str, float] | None]
"""One call of a case; it may return the seconds of named parts of itself."""


def interleave(cases: dict[str, Case], *, repeats: int, min_repeat_s: float = MIN_REPEAT_S) -> dict[str, Any]:
    """Time the cases in turn. Returns per case: `ms` (a summary of milliseconds a call), `parts_ms`,
    `first_call_s` (with whatever is compiled in it), `inner`, `clean`, `disturbed` and `foreign_cpu`."""
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
                row = _repeat(cases[name], inner[name])
            foreign[name].append(other.share)
            (clean if other.share <= MAX_FOREIGN else disturbed)[name].append(row)
    rows = {}
    for name in cases:
        used = clean[name] + disturbed[name][: max(0, repeats - len(clean[name]))]
        parts = [part for part in used[0] if part != "total"]
        rows[name] = {
            "ms": _summary([1e3 * row["total"] for row in used]),
            "parts_ms": {part: statistics.median(1e3 * row[part] for row in used) for part in parts},
            "first_call_s": first[name],
            "inner": inner[name],
            "clean": len(clean[name]),
            "disturbed": len(used) - len(clean[name]),
            "foreign_cpu": statistics.median(foreign[name]),
        }
    return rows


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


def record(**more: Any) -> dict[str, Any]:
    """Date, command, machine, load and versions of this process, and `more`."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "python " + " ".join(_relative(word) for word in sys.argv),
        "machine": {
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "versions": versions(),
        **more,
    }


def versions() -> dict[str, str]:
    """Of the packages that matter, as installed for this interpreter."""
    names = ("torch", "torchvision", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "pycocotools")
    found = {"python": platform.python_version()}
    for name in (*names, "mmdet", "mmcv", "mmengine", "opencv-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def bar(name: str, wanted: float, seen: float) -> dict[str, Any]:
    """One requirement of the form `seen >= wanted`."""
    return {"name": name, "wanted": wanted, "seen": round(seen, 3), "met": seen >= wanted}


def cost_bar(name: str, most: float, share: float, noise: float = 0.05) -> dict[str, Any]:
    """The requirement that something costs at most the share `most`, as a `bar` of negative numbers.

    Nothing costs less than nothing: a share below -`noise` says that the cases did not meet the same machine. It is
    not met, and `invalid` says why.
    """
    found = bar(name, -most, -share)
    if share >= -noise:
        return found
    why = f"a cost of {share:.1%} is impossible and more than noise ({noise:.0%}): measure again on a quiet machine"
    return {**found, "met": False, "invalid": why}


def environment_of_child(allocator: str, threads: int) -> dict[str, str]:
    """Environment variables of a measured process."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    # The first process of a benchmark counts as its own whatever descends from it.
    owner = {"BENCH_ROOT_PID": os.environ.get("BENCH_ROOT_PID", str(os.getpid()))}
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    return {**keep, **ALLOCATORS[allocator], **owner, **path, "BENCH_ALLOCATOR": allocator}


# --- details --------------------------------------------------------------------------------------------


def _seconds(run: Case) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _repeat(run: Case, inner: int) -> dict[str, float]:
    row = {"total": 0.0}
    start = time.perf_counter()
    for _ in range(inner):
        for part, seconds in (run() or {}).items():
            row[part] = row.get(part, 0.0) + seconds / inner
    row["total"] = (time.perf_counter() - start) / inner
    return row


def _summary(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": min(values),
        "max": max(values),
    }


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


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _relative(word: str) -> str:
    """A word of the command line for a file that others read: no absolute paths of this machine."""
    if not Path(word).is_absolute():
        return word
    path = word
    absolute = Path(path).resolve()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else absolute.name
