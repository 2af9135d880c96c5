"""Harmed graphs: the gate fails them, and the diagnosis names the value that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploy.core.errors import UserError
from deploy.graph.diagnose import first_divergence
from deploy.quantize.calibrate import activation_ranges
from deploy.quantize.qdq import quantize
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.accuracy import validate
from tests.helpers.harmed_graphs import (
    Harm,
    bad_cast,
    harmed,
    log_of_negative,
    overflowing_cast,
    set_initializer,
    swapped_outputs,
    swapped_values,
    wrong_weight,
)
from tests.helpers.tiny_onnx import SIZE, labelled_pictures, pictures


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> tuple[Path, Path]:
    return labelled_pictures(tiny_onnx, tmp_path_factory.mktemp("data"), seed=3, boxes=6)


@pytest.fixture(scope="module")
def int8(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = onnx.load(str(tiny_onnx))
    ranges = activation_ranges(model, pictures(8, seed=7))
    found = {}
    for target in ("cpu", "tensorrt"):
        found[target] = tmp_path_factory.mktemp("int8") / f"{target}.onnx"
        onnx.save(quantize(model, ranges, target), str(found[target]))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("harm", [bad_cast, wrong_weight, swapped_values, swapped_outputs])
def test_the_gate_fails_a_harmed_float_file_and_names_the_tensor(
    harm: Harm, tiny_onnx: Path, dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    path, name = harmed(tiny_onnx, tmp_path / "harmed.onnx", harm)
    result = validate({"good": OnnxRunner(tiny_onnx), "bad": OnnxRunner(path)}, *dataset, reference="good")
    assert [row.gate for row in result] == ["pass", "fail"]
    assert result[0].diagnosis is None
    assert result[1].diagnosis is not None and f"first diverging tensor: '{name}'" in result[1].diagnosis
    assert ("stored in the file" in result[1].diagnosis) is (harm is wrong_weight)


@pytest.mark.parametrize("harm", [log_of_negative, overflowing_cast])
def test_values_that_are_not_finite_fail_the_gate_and_the_tensor_is_named(
    harm: Harm, tiny_onnx: Path, dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    path, name = harmed(tiny_onnx, tmp_path / "harmed.onnx", harm)
    runners = {"good": OnnxRunner(tiny_onnx), "bad": OnnxRunner(path), "other": OnnxRunner(tiny_onnx)}
    results = validate(runners, *dataset, reference="good", max_map_drop=100.0)
    assert [row.gate for row in results] == ["pass", "fail", "pass"]
    diagnosis = results[1].diagnosis
    assert diagnosis is not None and "images have values that are not finite, from image" in diagnosis
    assert f"first diverging tensor: '{name}'" in diagnosis
    assert diagnosis.endswith("it holds values that are not finite")
    assert json.dumps(results[1].to_dict(), allow_nan=False)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("which", ["activation", "weight"])
def test_a_wrong_scale_of_an_int8_file_is_named(
    target: str, which: str, tiny_onnx: Path, int8: dict[str, Path], dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    def harm(model: onnx.ModelProto) -> str:
        constants = {item.name for item in model.graph.initializer}
        ours = [
            node
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and (node.input[0] in constants) == (which == "weight")
        ]
        node = next(node for node in ours if "stem" in node.input[0]) if which == "weight" else ours[-1]
        set_initializer(model, node.input[1], 0.3)
        return node.output[0]

    path, name = harmed(int8[target], tmp_path / "harmed.onnx", harm)
    assert first_divergence(tiny_onnx, int8[target], pictures(2)).divergence is None
    found = first_divergence(tiny_onnx, path, pictures(2)).divergence
    assert found is not None and found.introduced
    assert found.tensor in (name, name.replace("Dequantize", "Quantize"))
    assert (
        validate({"good": OnnxRunner(tiny_onnx), "bad": OnnxRunner(path)}, *dataset, reference="good")[1].gate == "fail"
    )


def test_exchanged_outputs_are_refused_by_name(tiny_onnx: Path, dataset: tuple[Path, Path], tmp_path: Path) -> None:
    def harm(model: onnx.ModelProto) -> str:
        names = {"scores": "labels", "labels": "scores"}
        for node in model.graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = names.get(name, name)
            for index, name in enumerate(node.input):
                node.input[index] = names.get(name, name)
        for value in model.graph.output:
            if value.name in names:
                value.type.tensor_type.elem_type = TensorProto.INT64 if value.name == "scores" else TensorProto.FLOAT
        return "scores"

    path, name = harmed(tiny_onnx, tmp_path / "harmed.onnx", harm)
    with pytest.raises(UserError, match=f"bad: output '{name}' is int64 .* exchanged"):
        validate({"good": OnnxRunner(tiny_onnx), "bad": OnnxRunner(path)}, *dataset, reference="good")
    found = first_divergence(tiny_onnx, path, pictures(2)).divergence
    assert found is not None and found.tensor in ("scores", "labels")


def test_equal_and_quantized_files_do_not_diverge(tiny_onnx: Path, int8: dict[str, Path]) -> None:
    same = first_divergence(tiny_onnx, tiny_onnx, pictures(2))
    assert same.divergence is None and same.compared == same.produced > 100 and same.worst[1] == 0
    for path in int8.values():
        found = first_divergence(tiny_onnx, path, pictures(2))
        assert found.divergence is None and 0.001 < found.worst[1] < 0.2
        assert "int8 explains their differences" in str(found)
    assert json.dumps(same.to_dict())


def test_another_network_is_not_compared(tiny_onnx: Path, tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["images"], ["boxes"], "only", to=TensorProto.FLOAT)
    shape = ["batch", 3, *SIZE]
    graph = helper.make_graph(
        [node], "other", [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "other.onnx"))
    with pytest.raises(UserError, match="not two exports of one network"):
        first_divergence(tiny_onnx, tmp_path / "other.onnx", pictures(1))
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="not a readable ONNX file"):
        first_divergence(tiny_onnx, tmp_path / "broken.onnx", pictures(1))


def test_without_a_float_file_that_passed_it_says_why(dataset: tuple[Path, Path], tiny_onnx: Path) -> None:
    class Wrapped:
        def __init__(self, shift: float) -> None:
            self.runner = OnnxRunner(tiny_onnx)
            self.card, self.backend, self.shift = self.runner.card, "wrapped", shift

        def __call__(self, images: np.ndarray) -> object:
            found = self.runner(images)
            return replace(found, boxes=found.boxes + np.float32(self.shift))

    results = validate({"a": Wrapped(0), "b": Wrapped(5)}, *dataset, reference="a")  # type: ignore[dict-item]
    assert results[1].gate == "fail" and results[1].diagnosis == (
        "not run: only ONNX files in ONNX Runtime can be compared value by value"
    )
