"""Times are taken in turn, and a busy machine shows."""

from __future__ import annotations

import pytest

from benchmarks.lib import measure
from benchmarks.lib.measure import Timing, interleave, quartiles


class Quiet:
    """Other processes that use `share` of the CPUs."""

    share = 0.0

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def test_cases_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ForeignCpu", Quiet)
    order: list[str] = []

    def case(name: str) -> measure.Call:
        def call() -> dict[str, float]:
            order.append(name)
            return {"half": 0.5}

        return call

    found = interleave({"a": case("a"), "b": case("b")}, repeats=3, min_repeat_s=0)
    assert order[:6] == ["a"] * 3 + ["b"] * 3, "a first call and two that tell how many calls a repeat has"
    assert order[6:] == ["a", "b"] * 3
    assert found["a"].repeats == 3 and found["a"].disturbed == 0 and found["b"].parts_ms == {"half": 500.0}
    row = found["a"].row("variant")
    assert row.low is not None and row.high is not None and row.low <= row.value <= row.high
    assert (row.spread, row.n, row.unit, row.notes) == ("quartiles", 3, "ms", "")


def test_a_busy_machine_is_tried_again_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = type("Busy", (Quiet,), {"share": 0.5})
    monkeypatch.setattr(measure, "ForeignCpu", busy)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    (found,) = interleave({"a": call}, repeats=2, min_repeat_s=0).values()
    assert calls == 3 + 2 * (1 + measure.MAX_EXTRA)
    assert found.repeats == found.disturbed == 2 and found.row("a").notes == "busy: others used 50% of the CPUs"


def test_quartiles() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_parts_become_rows() -> None:
    timing = Timing(10.0, 9.0, 11.0, {"losses": 6.0, "backward": 4.0}, 1.5, 7, 0, 0.0)
    assert [(row.metric, row.value, row.n) for row in timing.part_rows("ours")] == [
        ("time of losses", 6.0, 7), ("time of backward", 4.0, 7)
    ]  # fmt: skip
