"""The search for float layers: exact on made-up losses, and the whole of it on a tiny network."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from io import StringIO
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from deploy.core.errors import UserError
from deploy.graph.structure import Layer
from deploy.quantize import guided
from deploy.quantize.calibrate import choose_images, list_images
from deploy.quantize.file import Quantizer
from deploy.quantize.guided import GuidedResult, Sensitivity, Trial, search
from deploy.quantize.picture import sensitivity_table, trade_off_svg, trials_table
from tests.helpers.harmed_graphs import harmed, log_of_negative
from tests.helpers.tiny_onnx import SIZE, labelled_pictures, pictures

FLOAT_MAP = 40.0


class MadeUp:
    """Measurements of a network whose layers cost what `cost` says, and add up."""

    def __init__(self, cost: dict[str, float], noise: dict[str, float], last: float) -> None:
        self.cost, self.noise, self.last, self.measured = cost, noise, last, 0

    def expect(self, more: int) -> None: ...

    def float_map(self) -> float:
        return FLOAT_MAP

    def map(self, float_layers: frozenset[str]) -> float:
        self.measured += 1
        costs = {**self.cost, "last": self.last}
        return FLOAT_MAP - sum(cost for name, cost in costs.items() if name not in float_layers)

    def sensitivity(self, layer: str) -> Sensitivity:
        return Sensitivity(layer, self.cost[layer] + self.noise[layer], 0.0)

    def finish(self, result: GuidedResult) -> GuidedResult:
        return result


def search_made_up(
    costs: list[float], noise: list[float], budget: float, last: float = 100.0
) -> tuple[GuidedResult, MadeUp]:
    names = [f"layer{i}" for i in range(len(costs))]
    made_up = MadeUp(dict(zip(names, costs, strict=True)), dict(zip(names, noise, strict=True)), last)
    layers = (*(Layer(name, name, (name,), False) for name in names), Layer("last", "last", ("last",), True))
    structure = SimpleNamespace(layers=layers, output_names=("last",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided, "_Measurements", lambda *_: made_up)
        quantizer: Any = SimpleNamespace(structure=structure)
        return search(quantizer, Path(), Path(), Path(), max_map_drop=budget), made_up


costs = st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=2, max_size=9)  # sums are exact


@settings(max_examples=200)
@given(costs=costs, budget=st.integers(0, 128).map(lambda n: n / 64))
def test_with_a_true_ranking_the_fewest_layers_are_kept(costs: list[float], budget: float) -> None:
    result, _ = search_made_up(costs, [0.0] * len(costs), budget)
    fewest = next(
        (k for k in range(len(costs)) if any(sum(costs) - sum(kept) <= budget for kept in combinations(costs, k))), None
    )
    if fewest is None:
        assert result.chosen is None
    else:
        assert result.chosen is not None
        assert result.chosen.map_drop <= budget and "last" in result.chosen.float_layers
        assert len(result.chosen.float_layers) == fewest + 1


@settings(max_examples=100)
@given(costs=costs, data=st.data())
def test_with_a_bad_ranking_the_budget_holds_and_no_kept_layer_is_needless(costs: list[float], data: Any) -> None:
    noise = data.draw(st.lists(st.floats(0, 2), min_size=len(costs), max_size=len(costs)))
    budget = sum(costs) / 2
    result, made_up = search_made_up(costs, noise, budget)
    if result.chosen is None:
        return
    assert result.chosen.map_drop <= budget
    for name in set(result.chosen.float_layers) - {"last"}:
        assert result.chosen.map_drop + made_up.cost[name] > budget
    steps = len(costs).bit_length() + 1
    assert made_up.measured <= 1 + steps + len(costs) + 1


def test_within_the_budget_at_once_no_layer_is_looked_at() -> None:
    result, made_up = search_made_up([0.1, 0.1], [0, 0], 0.5)
    assert result.chosen is not None and result.chosen.float_layers == ("last",)
    assert made_up.measured == 2 and result.sensitivities == []


@pytest.mark.parametrize(("last", "kept"), [(0.25, ()), (0.5, ("last",))])
def test_output_layers_are_given_up_last_and_only_within_the_budget(last: float, kept: tuple[str, ...]) -> None:
    result, _ = search_made_up([0.125, 0.125], [0, 0], 0.5, last)
    assert result.chosen is not None and result.chosen.float_layers == kept
    result, _ = search_made_up([0.25, 0.5, 0.25], [0, 0, 0], 0.5, last)
    assert result.chosen is not None and set(result.chosen.float_layers) == {"layer1", "last"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> tuple[Path, Path]:
    return labelled_pictures(tiny_onnx, tmp_path_factory.mktemp("labelled"), seed=11, boxes=8)


@pytest.fixture(scope="module")
def spoiled(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    """A network whose second layer cannot be quantized: the range of what it reads is a thousand times too wide."""
    folder = tmp_path_factory.mktemp("calibration")
    for i, picture in enumerate(pictures(4, seed=21)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i}.png")
    quantizer = Quantizer(tiny_onnx, choose_images(list_images(folder), 4), "tensorrt")
    down = next(node for node in quantizer.model.graph.node if "module.detector.down.weight" in node.input)
    low, high = quantizer.ranges[down.input[0]]
    quantizer.ranges[down.input[0]] = (low * 1000, high * 1000)
    return quantizer


def test_the_layer_that_hurts_stays_in_float_and_the_search_resumes(
    spoiled: Quantizer, labelled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "guided.json"
    seen: list[tuple[int, int]] = []
    result = search(spoiled, *labelled, record, max_map_drop=10.0, progress=lambda *step: seen.append(step))
    assert result.chosen is not None and result.chosen.float_layers == ("cls", "down", "reg")
    assert [row.layer for row in result.sensitivities] == ["down", "stem"]
    assert result.trials[0].map_drop > 10 >= result.chosen.map_drop
    assert all(done <= total for done, total in seen) and seen[-1][0] == len(seen)
    assert json.loads(record.read_text())["result"]["chosen"]["float_layers"] == ["cls", "down", "reg"]

    content = json.loads(record.read_text())
    interrupted = {"key": content["key"], "values": {k: v for k, v in content["values"].items() if k != "alone stem"}}
    record.write_text(json.dumps(interrupted))
    measured: list[str] = []
    monkeypatch.setattr(guided._Measurements, "_map_of", lambda *_: pytest.fail("measured again"))
    original = spoiled.graph
    monkeypatch.setattr(spoiled, "graph", lambda kept, **more: measured.append("stem") or original(kept, **more))
    again = search(spoiled, *labelled, record, max_map_drop=10.0)
    assert again.to_dict() == result.to_dict() and measured == ["stem"]

    report = spoiled.save(tmp_path / "tiny.int8.onnx", again.chosen.float_layers, guided_map_drop=1.0)  # type: ignore[union-attr]
    assert report.layers == 1 and report.float_layers == ("down", "cls", "reg")

    record.write_text("{")  # a damaged record costs time, nothing else
    with pytest.raises(BaseException, match="measured again"):
        search(spoiled, *labelled, record, max_map_drop=10.0)


def test_measurements_hold_for_the_same_images_and_versions_only(
    spoiled: Quantizer, labelled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(labelled[1], tmp_path / "labelled")
    annotations, record = folder / labelled[0].name, tmp_path / "guided.json"

    def measured() -> float:
        return guided._Measurements(spoiled, annotations, folder, record, None).float_map()

    monkeypatch.setattr(guided._Measurements, "_map_of", lambda *_: 1.0)
    assert measured() == 1
    monkeypatch.setattr(guided._Measurements, "_map_of", lambda *_: 2.0)
    assert measured() == 1  # read from the record
    Image.new("RGB", (SIZE[1], SIZE[0])).save(folder / "3.png")  # another picture under the same name
    assert measured() == 2
    monkeypatch.setattr(guided._Measurements, "_map_of", lambda *_: 3.0)
    monkeypatch.setattr(guided, "version", lambda _: "999.0")
    assert measured() == 3


def test_a_budget_that_cannot_be_met_is_said(spoiled: Quantizer, labelled: tuple[Path, Path], tmp_path: Path) -> None:
    result = search(spoiled, *labelled, tmp_path / "guided.json", max_map_drop=-1.0)
    assert result.chosen is None
    assert "cannot be met" in trade_off_svg(result)


def test_a_float_file_with_values_that_are_not_finite_is_refused(
    tiny_onnx: Path, labelled: tuple[Path, Path], spoiled: Quantizer, tmp_path: Path
) -> None:
    path, _ = harmed(tiny_onnx, tmp_path / "nan.onnx", log_of_negative)
    quantizer: Any = SimpleNamespace(**{**vars(spoiled), "source": path})
    with pytest.raises(UserError, match=r"nan\.onnx: 6 of 6 images have values that are not finite"):
        search(quantizer, *labelled, tmp_path / "guided.json", max_map_drop=1.0)


def test_table_and_picture_show_every_layer_and_trial() -> None:
    rows = [Sensitivity(f"head.<{i}>", 0.1 / (i + 1), 0.02) for i in range(30)]
    trials = [Trial(("last",), 38.0, 2.0), Trial(("head.<0>", "last"), 39.8, 0.2)]
    result = GuidedResult(0.5, 40.0, 31, rows, trials, trials[1])
    svg = ET.fromstring(trade_off_svg(result))
    text = " ".join("".join(node.itertext()) for node in svg.iter() if node.tag.endswith("text"))
    assert "2 of 31 layers in float: +0.20 mAP points lost, budget 0.5" in text
    assert "head.<0>" in text and "6 less sensitive layers are not shown" in text
    assert sum(node.tag.endswith("circle") for node in svg.iter()) == 2
    width, height = (float(v) for v in svg.attrib["viewBox"].split()[2:])
    for node in svg.iter():
        for key, limit in (("x", width), ("x2", width), ("cx", width), ("y", height), ("cy", height), ("y2", height)):
            assert 0 <= float(node.attrib.get(key, 0)) <= limit
    console = Console(width=100, record=True, file=StringIO())
    console.print(sensitivity_table(result), trials_table(result))
    shown = console.export_text()
    assert shown.count("int8") == 29 and "met ←" in shown and "missed" in shown
