"""The benchmark of the start: torch is seen where it is loaded, and the import loads none."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.lib.results import Row, is_met
from benchmarks.suites import startup


@pytest.mark.parametrize("loads", [False, True])
def test_rows_and_bars(monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    """With two programs of a few milliseconds in the places of the real ones."""
    code = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')" if loads else "pass"
    monkeypatch.setattr(startup, "COMMANDS", {"import compress": ["-c", code]})
    monkeypatch.setattr(startup, "CODES", {"import compress": code})
    (case,) = startup.run(argparse.Namespace(repeats=1))
    rows: dict[str, Row] = {row.metric: row for row in case.rows}
    assert set(rows) == {"wall time", "CPU time", "torch is loaded"}
    assert rows["wall time"].bar == "<= 200" and rows["CPU time"].value > 0
    assert is_met(rows["torch is loaded"]) is not loads
