"""The benchmark of the evaluator gives both the same boxes."""

from __future__ import annotations

import pytest

from benchmarks.suites import evaluation


def test_both_measure_the_same_map() -> None:
    ours, theirs = evaluation.measure_ours(12, 3, 4, 9), evaluation.measure_peer(12, 3, 4, 9)
    assert 1 < ours["mAP"] < 99 and ours["mAP"] == pytest.approx(theirs["mAP"], abs=1e-9)
