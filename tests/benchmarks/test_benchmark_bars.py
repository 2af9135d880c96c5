"""Requirements of the benchmarks: met, missed, and not measured at all."""

from __future__ import annotations

import pytest

from benchmarks.lib import measure


@pytest.mark.parametrize(
    ("share", "met", "valid"),
    [(0.02, True, True), (0.1, True, True), (0.101, False, True), (-0.04, True, True), (-0.13, False, False)],
)
def test_a_cost_below_nothing_is_no_measurement(share: float, met: bool, valid: bool) -> None:
    bar = measure.cost_bar("suppression", 0.1, share)
    assert (bar["wanted"], bar["seen"], bar["met"], "invalid" not in bar) == (-0.1, -share, met, valid)
    if not valid:
        assert bar["invalid"].startswith("a cost of -13.0% is impossible and more than noise (5%)")
