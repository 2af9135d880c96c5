"""What the suites make of their measurements: ratios, differences and shares, by hand."""

from __future__ import annotations

import pytest

from benchmarks.lib import blocks
from benchmarks.lib.measure import Timing
from benchmarks.lib.results import Row, is_met
from benchmarks.suites import method_cost, recipe, teacher_cache, view_gain, vs_mmdet
from benchmarks.suites.kernels import fpn


def timing(ms: float, **parts: float) -> Timing:
    return Timing(ms, 0.9 * ms, 1.1 * ms, parts, 0.5, 7, 0, 0.0)


def figures(rows: list[Row]) -> dict[tuple[str, str], float]:
    found = {(row.variant, row.metric): row.value for row in rows}
    assert len(found) == len(rows)
    return found


def test_times_as_fast_as_mmdet() -> None:
    timings = {
        "mmdet": timing(100),
        "mmdet assignment": timing(30),
        "ours": timing(20, losses=5),
        "ours assignment": timing(10),
        "ours channels last": timing(25),
    }
    rows = vs_mmdet.rows(timings, 100)
    found = figures(rows)
    ratios = {variant: value for (variant, metric), value in found.items() if metric == "times as fast"}
    assert ratios == {"ours": 5.0, "ours assignment": 3.0, "ours channels last": 4.0}
    assert found["ours", "time of losses"] == 5 and found["mmdet", "first call"] == 0.5
    met = {row.variant: is_met(row) for row in rows if row.metric == "times as fast"}
    assert met == {"ours": True, "ours assignment": False, "ours channels last": None}
    few = [row for row in vs_mmdet.rows(timings, 20) if row.variant == "ours assignment" and row.bar]
    assert few == [], "the bar of the assignment is one of many boxes"
    alone = vs_mmdet.rows({"ours": timing(20)}, 100)
    assert {row.metric for row in alone} == {"time", "first call"}, "nothing is compared without mmdet"


def test_what_a_method_adds() -> None:
    best = {"student": 40.0, "teacher": 10.0, "head": 5.0, "fgd": 15.0, "uet+fgd": 18.0, "uet+fgd, N=10": 21.0}
    found = figures(method_cost.rows(best, 7))
    assert found["fgd", "added time"] == 10 and found["student", "time"] == 40
    assert found["uet+fgd", "share of a step"] == pytest.approx(3 / (40 + 10 + 10))
    assert found["uet+fgd, N=10", "share of a step"] == pytest.approx(6 / (40 + 10 + 10))


def test_operators_against_what_they_replace() -> None:
    """The first implementation of an operator is the peer."""
    rows = fpn.rows({"fgd": {"published": timing(24), "eager": timing(8), "compiled": timing(6)}})
    ratios = {row.variant: (row.value, is_met(row)) for row in rows if row.metric == "times as fast"}
    assert ratios == {"fgd: eager": (3.0, True), "fgd: compiled": (4.0, False)}


def test_operators_agree_and_are_timed_on_tiny_maps() -> None:
    found = fpn.measure(threads=1, repeats=1, small=True)
    assert set(found) == {operator for operator, _ in fpn.BARS}
    assert [next(iter(found[name])) for name in ("mc_dropout", "fgd")] == ["stack_eager", "published"]
    assert all(Timing(**row).ms > 0 for rows in found.values() for row in rows.values())


def test_a_report_becomes_rows() -> None:
    report = {
        "models": {"student": {"map": 20.5, "params_m": 0.65, "gflops": None, "per_class": {"cat": 30.0}}},
        "artifacts": [
            {
                "file": "student.onnx", "backend": "onnxruntime cpu", "map": 20.4, "map_drop": 0.1, "size_mb": 2.9,
                "gate": "pass", "latency_ms": {"p50": 1.2, "p99": 3.3},
            },
            {"file": "student.engine", "map": None, "gate": "not run: no GPU", "latency_ms": None},
        ],
    }  # fmt: skip
    rows = recipe.rows_of(report)
    name = "student.onnx, onnxruntime cpu"
    assert figures(rows) == {
        ("student", "mAP"): 20.5, ("student", "parameters"): 0.65, ("student", "AP of cat"): 30.0,
        (name, "mAP"): 20.4, (name, "mAP drop"): 0.1, (name, "size"): 2.9, (name, "p50"): 1.2, (name, "p99"): 3.3,
    }  # fmt: skip
    assert [row.notes for row in rows if row.variant == name and row.metric == "mAP"] == ["gate: pass"]


def test_a_step_with_a_cache_is_compared_with_the_plain_one_of_its_round() -> None:
    """A machine that becomes twice as slow changes no ratio."""
    times = {
        "plain": [(100, 110), (200, 220), (100, 90)],
        "teacher": [(180, 220), (360, 440), (180, 180)],
        "cache": [(110, 132), (220, 264), (110, 108)],
    }
    found = {name: [blocks.Block(cpu, wall, 0.0) for cpu, wall in taken] for name, taken in times.items()}
    rows = blocks.rows(found, "plain", {"cache": teacher_cache.BAR})
    ratios = {
        (row.variant, row.metric): (round(row.value, 6), is_met(row)) for row in rows if row.metric.endswith("of plain")
    }
    assert ratios == {
        ("teacher", "CPU time of plain"): (1.8, None),
        ("teacher", "wall time of plain"): (2.0, None),
        ("cache", "CPU time of plain"): (1.1, True),
        ("cache", "wall time of plain"): (1.2, False),
    }


def test_views_against_free_augmentation() -> None:
    maps = {"free baseline": [20.0, 21.0, 22.0], "2 views": [18.0, 19.5, 20.5], "8 views": [19.5, 21.0, 22.0]}
    rows = [Row(arm, "mAP", value, seed=seed) for arm, values in maps.items() for seed, value in enumerate(values)]
    found = {row.variant: row for row in view_gain.differences(rows)}
    assert [(found[arm].value, is_met(found[arm])) for arm in ("2 views", "8 views")] == [
        (-1.667, False),
        (-0.167, True),
    ]
    low, high = found["8 views"].low, found["8 views"].high
    assert found["8 views"].bar == ">= -1.000" and low is not None and high is not None and low < -0.167 < high
