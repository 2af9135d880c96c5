"""An int8 graph changed for the CPU: the same bits from the operator that suppresses, and from integers upsampled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.graph.structure import BOXES, SCORES
from deploy.quantize.cpu_form import for_cpu
from tests.helpers.tiny_onnx import pictures

OUTPUTS = ["boxes", "scores", "labels", "count"]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], names: list[str] | None = None) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(names, feed)
    return found


def part(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """What computes `outputs` from `inputs`: images, or scores and boxes of every location."""
    known = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None, None]) for name in (SCORES, BOXES)]
    model.graph.value_info.extend(known)
    found: onnx.ModelProto = onnx.utils.Extractor(model).extract_model(inputs, outputs)
    return found


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_suppression_by_the_operator_finds_the_same(tiny_onnx: Path, share: float) -> None:
    """share: of the scores that are above the threshold. Scores are few different ones, so that many are equal."""
    whole = part(onnx.load(str(tiny_onnx)), [SCORES, BOXES], OUTPUTS)
    changed = copy.deepcopy(whole)
    for_cpu(changed)
    onnx.checker.check_model(changed)
    kinds = [node.op_type for node in changed.graph.node]
    assert kinds.count("NonMaxSuppression") == 1 and "MatMul" not in kinds
    rng = np.random.default_rng(round(100 * share))
    locations, classes = 120, 3
    corners = rng.uniform(0, 40, (3, locations, 2)).round(1)
    boxes = np.concatenate([corners, corners + rng.uniform(-1, 30, corners.shape).round(1)], -1).astype(np.float32)
    above, below = rng.integers(55, 75, (2, 3, locations, classes)) / np.array([[[[100]]], [[[2000]]]])
    scores = np.where(rng.random(above.shape) < share, above, below).astype(np.float32)
    detections = 0
    for batch in (1, 3):
        feed = {SCORES: scores[:batch], BOXES: boxes[:batch]}
        wanted, found = run(whole, feed, OUTPUTS), run(changed, feed, OUTPUTS)
        detections += wanted[3].sum()
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(a, b)
    assert (detections > 0) == (share > 0)


def test_a_whole_file_finds_the_same(tiny_onnx: Path) -> None:
    whole, images = onnx.load(str(tiny_onnx)), pictures(4, seed=3)
    changed = copy.deepcopy(whole)
    for_cpu(changed)
    for a, b in zip(run(whole, {"images": images}), run(changed, {"images": images}), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_graph_without_suppression_is_left(tiny_onnx: Path) -> None:
    model = part(onnx.load(str(tiny_onnx)), ["images"], [SCORES, BOXES])
    before = model.SerializeToString()
    for_cpu(model)
    assert model.SerializeToString() == before


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
