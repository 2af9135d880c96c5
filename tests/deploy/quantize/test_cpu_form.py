"""An int8 graph changed for the CPU: the same bits with fewer candidates and with integers that are upsampled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.graph.structure import SCORES
from deploy.quantize.cpu_form import for_cpu
from tests.helpers.tiny_onnx import pictures

OUTPUTS = ["boxes", "scores", "labels", "count"]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], names: list[str] | None = None) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(names, feed)
    return found


def with_output(model: onnx.ModelProto, name: str, kind: int) -> onnx.ModelProto:
    model = copy.deepcopy(model)
    model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return model


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_detections_are_the_same_with_the_candidates_that_pass(tiny_onnx: Path, share: float) -> None:
    """share: of the scores of an image that are above the threshold."""
    whole = onnx.load(str(tiny_onnx))
    images = pictures(4, seed=3)
    scores = run(with_output(whole, SCORES, TensorProto.FLOAT), {"images": images}, [SCORES])[0].reshape(4, -1)
    first, second = (node for node in whole.graph.node if node.op_type == "TopK")
    candidates, most = (int(numpy_helper.to_array(constant(whole, node.input[1])).item()) for node in (first, second))
    threshold = np.float32(2.0 if share == 0 else np.quantile(scores, 1 - share))
    greater = next(node for node in whole.graph.node if node.op_type == "Greater" and node.input[0] == first.output[0])
    constant(whole, greater.input[1]).CopyFrom(numpy_helper.from_array(np.array(threshold), greater.input[1]))
    few = copy.deepcopy(whole)
    for_cpu(few)
    onnx.checker.check_model(few)
    counting = with_output(few, "candidates", TensorProto.INT64)
    for batch in (1, 4):
        feed = {"images": images[:batch]}
        (number,) = run(counting, feed, ["candidates"])
        passing = (scores[:batch] > threshold).sum(1).max()
        assert number.tolist() == [max(most, min(candidates, passing))]
        for a, b in zip(run(whole, feed, OUTPUTS), run(few, feed, OUTPUTS), strict=True):
            np.testing.assert_array_equal(a, b)


def test_upsampling_copies_integers() -> None:
    value, text = helper.make_tensor_value_info, {"mode": "nearest", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        helper.make_node(
            "Resize", ["y", "", "scales"], ["up"], "up", coordinate_transformation_mode="asymmetric", **text
        ),
        helper.make_node("Relu", ["up"], ["out"]),
    ]
    constants = {"s": np.float32(0.1), "z": np.uint8(7), "scales": np.array([1, 1, 2, 2], np.float32)}
    graph = helper.make_graph(
        nodes, "neck", [value("x", TensorProto.FLOAT, [1, 2, 3, 3])], [value("out", TensorProto.FLOAT, [1, 2, 6, 6])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    after = copy.deepcopy(before)
    for_cpu(after)
    assert [node.op_type for node in after.graph.node] == ["QuantizeLinear", "Resize", "DequantizeLinear", "Relu"]
    x = np.random.default_rng(0).normal(0, 5, (1, 2, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(*(run(model, {"x": x})[0] for model in (before, after)))
