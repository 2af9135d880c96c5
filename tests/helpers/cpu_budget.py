"""CPU seconds of every test, its fixtures and its child processes: what a slower or busier machine does not change.

`pytest --cpu-report FILE` writes one line a test, the longest first: seconds of set-up, call and teardown, and its
name.
"""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PHASES = ("setup", "call", "teardown")


def cpu_seconds() -> float:
    """Seconds of this process and of all its children that have ended, user and system together."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


class CpuReport:
    """Measures in the process that runs a test; collects in the one that reports (another one under xdist)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds: dict[str, dict[str, float]] = defaultdict(dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        report.cpu_seconds = item.stash.get(_SECONDS, {}).get(call.when, 0.0)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        return (yield from _measured(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from _measured(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        return (yield from _measured(item, "teardown"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid][report.when] = getattr(report, "cpu_seconds", 0.0)
        if report.when == "teardown" and self.path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
            self._write()  # at once: a session may be killed

    def _write(self) -> None:
        assert self.path is not None
        rows = sorted(self.seconds.items(), key=lambda row: -sum(row[1].values()))
        total = sum(sum(phases.values()) for _, phases in rows)
        lines = [f"{total:.1f} CPU seconds, {len(rows)} tests", " ".join(f"{x:>8}" for x in ("total", *PHASES))]
        for name, phases in rows:
            figures = [sum(phases.values()), *(phases.get(phase, 0.0) for phase in PHASES)]
            lines.append(" ".join(f"{x:8.2f}" for x in figures) + f"  {name}")
        self.path.write_text("\n".join([*lines, ""]), encoding="utf-8")


_SECONDS = pytest.StashKey[dict[str, float]]()


def _measured(item: pytest.Item, phase: str) -> Iterator[None]:
    before = cpu_seconds()
    try:
        return (yield)
    finally:
        item.stash.setdefault(_SECONDS, {})[phase] = cpu_seconds() - before
