"""The benchmark of evaluators gives all of them the same boxes, and compares what it should."""

from __future__ import annotations

from benchmarks.lib.results import is_met
from benchmarks.suites import evaluation


def test_ours_and_the_reference_give_the_same_figures() -> None:
    found = {name: [evaluation.measure(name, 12, 3, 4, 9)] for name in (evaluation.OURS, evaluation.REFERENCE)}
    ours, theirs = (rounds[0]["figures"] for rounds in found.values())
    assert len(ours) == 12 and 0.01 < ours[0] < 0.99
    (row,) = (row for row in evaluation.rows(found) if row.metric == "figures with other bits")
    assert (row.value, is_met(row)) == (0, True), (ours, theirs)


def test_bits_and_ratios_are_compared() -> None:
    def once(seconds: float, memory: float, first: float) -> dict[str, object]:
        return {"CPU time": seconds, "memory": memory, "figures": [first, *[None] * 11]}

    found = {
        evaluation.OURS: [once(1, 10, 0.5), once(3, 10, 0.5), once(2, 10, 0.5)],
        evaluation.REFERENCE: [once(90, 900, 0.5)],
        evaluation.FORMER: [once(22, 20, 0.5 + 1e-15), once(22, 20, 0.5), once(22, 20, 0.5)],
    }
    rows = {(row.variant, row.metric): row for row in evaluation.rows(found)}
    ours = rows[evaluation.OURS, "CPU time"]
    assert (ours.value, ours.low, ours.high, ours.n) == (2, 1, 3, 3)
    assert rows[evaluation.OURS, "figures with other bits"].value == 0
    assert rows[evaluation.FORMER, "figures with other bits"].value == 1
    time, memory = (rows[evaluation.FORMER, f"{metric} over ours"] for metric in evaluation.BARS)
    assert (time.value, is_met(time), memory.value, is_met(memory)) == (11, True, 2, False)
