"""The mAP of each layer's cut alone: what is measured, once, and the order that follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from compress.config.model import Model
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from compress.prune.cut import cut
from compress.prune.graph import PruningGraph, pruning_graph
from compress.prune.importance import importances
from compress.prune.order import blocks, leaving
from compress.prune.sensitivity import Row, Sensitivity, sensitivity
from deploy.core.errors import UserError

WIDE, NARROW = "backbone.stage3.1.widen.0", "backbone.stage3.1.narrow.0"
WIDTHS = {WIDE: 144, NARROW: 96}
SOME = (
    WIDE,
    "head.cls_convs.0.conv",
    "backbone.stage1.1.narrow.0",
    "backbone.stem.0",
)  # of 144, 32, 24 and 16 channels


@pytest.fixture(scope="module")
def detector() -> Detector:
    model = Model(backbone="nano", weights="none", neck_channels=32, head_depth=1)
    return build_detector(model, 3, seed=0).eval()


@pytest.fixture(scope="module")
def graph(detector: Detector) -> PruningGraph:
    return pruning_graph(detector)


@pytest.fixture(scope="module")
def scores(graph: PruningGraph) -> dict[str, Tensor]:
    return importances(graph, "group_norm")


class Meter:
    """Stands in for mAP: 60 points for the whole detector, less with every parameter that is gone. Ends the process, so
    to say, when it was asked `most` times."""

    def __init__(self, whole: Detector, most: int = 1000) -> None:
        self.asked: list[Detector] = []
        self._whole, self._most = _parameters(whole), most

    def __call__(self, detector: Detector) -> float:
        if len(self.asked) == self._most:
            raise KeyboardInterrupt
        self.asked.append(detector)
        return 60 * _parameters(detector) / self._whole


Measure = Callable[..., Sensitivity]


@pytest.fixture
def measure(detector: Detector, graph: PruningGraph, scores: dict[str, Tensor], tmp_path: Path) -> Measure:
    def measured(
        meter: Meter, *, images: str = "a", round_to: int = 8, names: tuple[str, ...] = SOME, **told: Any
    ) -> Sensitivity:
        store, identity, some = tmp_path / "sensitivity.json", {"images": images}, _only(graph, *names)
        return sensitivity(some, scores, detector, meter, store=store, identity=identity, round_to=round_to, **told)

    return measured


def test_each_group_is_cut_alone_to_widths_that_it_can_have(
    detector: Detector, graph: PruningGraph, measure: Measure
) -> None:
    meter = Meter(detector)
    found = measure(meter)
    groups = {group.name: group for group in graph.groups}
    assert found.map == 60 and meter.asked[0] is detector
    trials = iter(meter.asked[1:])
    for row in found.rows:
        for share, value in row.points:
            trial = next(trials)
            assert trial.model is not None and trial.model.widths is not None and value < 60
            assert set(trial.model.widths) == {member.layer for member in groups[row.name].members}
            assert trial.model.widths[row.name][0] / groups[row.name].width == share
    assert next(trials, None) is None
    left = {row.name: [share * groups[row.name].width for share, _ in row.points] for row in found.rows}
    assert left == dict(zip(SOME, ([112, 72, 40], [24, 16, 8], [16, 8], [8]), strict=True))


def test_an_interrupted_measurement_goes_on(detector: Detector, measure: Measure, tmp_path: Path) -> None:
    whole = Meter(detector)
    expected = measure(whole)
    (tmp_path / "sensitivity.json").unlink()
    done = sum(len(row.points) for row in expected.rows[:2])
    with pytest.raises(KeyboardInterrupt):  # in the third group
        measure(Meter(detector, most=1 + done + 1))
    stored = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [row["name"] for row in stored["rows"].values()] == [row.name for row in expected.rows[:2]]
    rest, steps, lines = Meter(detector), list[tuple[int, int]](), list[str]()
    assert measure(rest, progress=lambda *step: steps.append(step), say=lines.append) == expected
    assert steps == [(2, 4), (3, 4), (4, 4)] and lines == ["sensitivity: 2 of 4 measured before"]
    assert len(rest.asked) == len(whole.asked) - 1 - done
    nothing = Meter(detector, most=0)
    assert measure(nothing) == expected


def test_only_groups_that_are_cut_otherwise_are_measured_again(detector: Detector, measure: Measure) -> None:
    some = measure(Meter(detector), names=SOME[:2])
    rest, coarse = Meter(detector), Meter(detector)
    expected = measure(rest)
    assert {row.name: row for row in some.rows}.items() <= {row.name: row for row in expected.rows}.items()
    assert len(rest.asked) == sum(len(row.points) for row in expected.rows if row not in some.rows)
    measure(coarse, round_to=16)
    nothing = Meter(detector, most=0)
    assert coarse.asked and measure(nothing) == expected and measure(nothing, names=SOME[1:3]).map == 60


def test_measurements_of_something_else_are_replaced(detector: Detector, measure: Measure, tmp_path: Path) -> None:
    store = tmp_path / "sensitivity.json"
    first, other, coarse, again = (Meter(detector) for _ in range(4))
    expected = measure(first)
    measure(other, images="b")
    assert len(other.asked) == len(first.asked)
    measure(coarse, images="b", round_to=16)
    assert 1 < len(coarse.asked) < len(first.asked)
    assert measure(again) == expected and len(again.asked) == len(first.asked)
    for damaged in ("", "{", "[]", '{"key": 1}', store.read_text().replace('"map": 60', '"map": null')):
        store.write_text(damaged)
        anew = Meter(detector)
        assert measure(anew) == expected and len(anew.asked) == len(first.asked)


def test_a_file_of_somebody_else_is_left_alone(detector: Detector, measure: Measure, tmp_path: Path) -> None:
    store = tmp_path / "sensitivity.json"
    store.write_text('{"mine": [1, 2]}')
    with pytest.raises(UserError, match=r"sensitivity\.json: holds something else than what layers are worth; move it"):
        measure(Meter(detector))
    assert store.read_text() == '{"mine": [1, 2]}'


def test_drops_are_no_gains_and_do_not_fall() -> None:
    found = Sensitivity(50.0, (Row("a", ((0.75, 51.0), (0.5, 44.0), (0.25, 47.0))), Row("b", ((0.5, 50.0),))))
    assert found.drops == {"a": ((0.25, 0.0), (0.5, 6.0), (0.75, 6.0), (1.0, 50.0)), "b": ((0.5, 0.0), (1.0, 50.0))}
    assert found.to_dict() == {
        "map": 50.0,
        "rows": [
            {"name": "a", "points": [[0.75, 51.0], [0.5, 44.0], [0.25, 47.0]]},
            {"name": "b", "points": [[0.5, 50.0]]},
        ],
    }


def test_layers_lose_by_what_their_loss_costs(graph: PruningGraph, scores: dict[str, Tensor]) -> None:
    """Half of one layer is free; each channel of the other costs the same."""
    drops = {WIDE: ((0.5, 0.0), (1.0, 50.0)), NARROW: ((1.0, 60.0),)}
    order = blocks(_only(graph, WIDE, NARROW), scores, shares="sensitivity", drops=drops)
    assert [(block.group, block.width) for block in order[:9]] == [(WIDE, left) for left in range(136, 71, -8)]
    for block in order:
        gone = 1 - block.width / WIDTHS[block.group]
        costs = 60 * gone if block.group == NARROW else 100 * max(0.0, gone - 0.5)
        assert block.key == pytest.approx(costs)
    assert [block.key for block in order] == sorted(block.key for block in order)
    assert {order[9].group, order[10].group} == {WIDE, NARROW}


def test_layers_whose_loss_costs_nothing_lose_alike(graph: PruningGraph, scores: dict[str, Tensor]) -> None:
    drops = {WIDE: ((0.9, 0.0),), NARROW: ((0.9, 0.0),)}
    left = dict(WIDTHS)
    for block in blocks(_only(graph, WIDE, NARROW), scores, shares="sensitivity", drops=drops):
        left[block.group] = block.width
        assert abs(left[WIDE] / WIDTHS[WIDE] - left[NARROW] / WIDTHS[NARROW]) <= 8 / 96 + 1e-9


@pytest.mark.parametrize("shares", ["uniform", "sensitivity"])
def test_a_second_cut_goes_on_where_the_first_ended(
    detector: Detector, graph: PruningGraph, scores: dict[str, Tensor], shares: str
) -> None:
    drops = {name: ((0.5, 3.0 + n), (1.0, 40.0)) for n, name in enumerate(scores)}
    widths = {group.name: group.width for group in graph.groups}
    order = blocks(graph, scores, shares=shares, drops=drops)
    smaller = pruning_graph(cut(detector, graph, leaving(order, 20)))
    rest = blocks(smaller, importances(smaller, "group_norm"), shares=shares, drops=drops, whole=widths)
    assert [(x.group, x.width, x.key) for x in rest] == [(x.group, x.width, x.key) for x in order[20:]]


# --- details --------------------------------------------------------------------------------------------


def _parameters(model: Detector) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _only(graph: PruningGraph, *names: str) -> PruningGraph:
    return PruningGraph(tuple(group for group in graph.groups if group.name in names), graph.traced)
