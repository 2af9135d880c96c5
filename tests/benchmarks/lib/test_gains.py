"""Figures over seeds: paired, per group, with their interval."""

from __future__ import annotations

import pytest

from benchmarks.lib.gains import BASELINE, SEPARATOR, arm_results, summary
from benchmarks.lib.results import Row


def rows(arm: str, *maps: float, settings: tuple[str, ...] = ()) -> list[Row]:
    return [
        row
        for seed, value in enumerate(maps)
        for row in (
            Row(arm, "mAP", value, seed=seed, notes=SEPARATOR.join(settings)),
            Row(arm, "mAP50", 2 * value, seed=seed),
        )
    ]


def test_figures_are_paired() -> None:
    baseline, taught = arm_results([
        *rows(BASELINE, 10.0, 12.0, 11.0),
        *rows("A & B", 13.0, 14.0, 15.0, settings=("x=1", "y={a: b}")),
        Row("teacher", "mAP", 70.0),
    ])  # fmt: skip
    assert baseline.is_baseline and baseline.gain.mean == 0
    assert taught.map.mean == 14.0 and taught.gain.mean == 3.0  # differences 3, 2, 4
    assert taught.gain.stdev == 1.0 and taught.gain.interval is not None
    assert taught.gain.interval[1] - 3 == pytest.approx(4.303 / 3**0.5, abs=1e-3)  # Student's t, 2 degrees of freedom
    assert taught.maps == {0: 13.0, 1: 14.0, 2: 15.0} and taught.settings == ("x=1", "y={a: b}")


def test_every_group_has_its_own_baseline() -> None:
    found = arm_results([
        *rows("one baseline", 10, 10), *rows("one FGD", 20, 20), *rows("two baseline", 20, 20), *rows("two FGD", 10, 10)
    ])  # fmt: skip
    assert [(arm.name, arm.gain.mean) for arm in found] == [
        ("one baseline", 0), ("one FGD", 10), ("two baseline", 0), ("two FGD", -10)
    ]  # fmt: skip


def test_an_arm_needs_its_baseline() -> None:
    with pytest.raises(ValueError, match="FGD: the baseline has no seed 0, 1"):
        arm_results(rows("FGD", 1, 2))
    with pytest.raises(ValueError, match="FGD: the baseline has no seed 2"):
        arm_results([*rows(BASELINE, 1, 2), *rows("FGD", 1, 2, 3)])


def test_one_seed_has_no_spread() -> None:
    assert (summary([1.23456]).mean, summary([1.0]).stdev, summary([1.0]).interval) == (1.235, None, None)
