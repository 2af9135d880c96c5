"""The benchmark of the label index opens the file that it says, and compares what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lib.results import is_met
from benchmarks.suites import label_index
from compress.data import index


def test_the_drawn_file_is_opened_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(index, "SMALLEST", 0)
    label_index.draw(tmp_path / "labels.json", 20, 100, 3, 5)
    with_index = label_index._Labels(str(tmp_path / "labels.json"))
    monkeypatch.setattr(index, "SMALLEST", 1 << 60)
    without = label_index._Labels(str(tmp_path / "labels.json"))
    assert isinstance(with_index._tables, index.MappedTables) and not isinstance(without._tables, index.MappedTables)
    assert len(with_index) == len(without) == 20 and with_index.boxes_by_class == without.boxes_by_class
    assert without.num_boxes > 90


def test_ratios_and_bars() -> None:
    def once(seconds: float, memory: float) -> dict[str, float]:
        return dict(zip(label_index.UNITS, (seconds, 2 * seconds, memory, memory + 500), strict=True))

    found = {
        label_index.FIRST: [once(3, 100), once(5, 100), once(4, 100)],
        label_index.AGAIN: [once(0.4, 0), once(0.6, 0), once(0.7, 0)],
        label_index.PLAIN: [once(36, 200)],
    }
    rows = {(row.variant, row.metric): row for row in label_index.rows(found, {"fork": 3.0, "spawn": 70.0})}
    time, memory = (rows[label_index.PLAIN, f"{metric} over the first time's"] for metric in label_index.RATIOS)
    assert (time.value, is_met(time), memory.value, is_met(memory)) == (9, True, 2, False)
    again = rows[label_index.AGAIN, "wall time"]
    assert (again.value, again.low, again.high, again.n, is_met(again)) == (1.2, 0.8, 1.4, 3, False)
    assert [is_met(rows[f"worker, {kind}", "own memory"]) for kind in label_index.KINDS] == [True, False]
    assert not any(row.bar.startswith(">=") for row in label_index.rows({label_index.FIRST: [once(1, 1)]}, {}))
