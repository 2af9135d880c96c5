"""Files that TensorRT cannot take: refused in one line, with the operator, the reason and a hint."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from deploy.core.card import METADATA_KEY
from tests.helpers import tensorrt_rig
from tests.helpers.tensorrt_build import refusal
from tests.helpers.tiny_onnx import CARD

tensorrt_rig.need_tensorrt()

from deploy.tensorrt.network import library, load_tensorrt  # noqa: E402


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, str(folder / "m.onnx"))
    return folder / "m.onnx"


def test_no_file_no_onnx_and_half_a_file(tiny_onnx: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.onnx") == "no such file"
    (tmp_path / "text.onnx").write_text("hello world")
    assert refusal(tmp_path / "text.onnx").startswith("not an ONNX model")
    content = tiny_onnx.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    assert refusal(tmp_path / "cut.onnx").startswith("truncated: ")


def test_weights_that_are_not_there(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=64)
    (tmp_path / "m.bin").unlink()
    assert "weights are in m.bin, which is not beside it" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [3, 99])
def test_wrong_opset(model: onnx.ModelProto, tmp_path: Path, opset: int) -> None:
    model.opset_import[0].version = opset
    assert refusal(saved(model, tmp_path)).startswith(f"opset {opset}: TensorRT reads 9 to 25: export it again")


def test_every_unsupported_operator_is_named_before_anything_is_built(model: onnx.ModelProto, tmp_path: Path) -> None:
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for node in convolutions[:2]:
        node.op_type = "Banana"
    convolutions[2].op_type = "Unique"
    line = refusal(saved(model, tmp_path))
    assert f"has no importer for Banana (2 nodes, first '{convolutions[0].name}'), Unique (1 node" in line
    assert line.endswith("write it with ordinary operators, or leave this part out of the graph")


def test_operators_of_onnx_runtime_have_their_own_hint(model: onnx.ModelProto, tmp_path: Path) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.op_type, node.domain = "FusedConv", "com.microsoft"
    line = refusal(saved(model, tmp_path))
    assert "com.microsoft.FusedConv (1 node" in line and "made for ONNX Runtime" in line and "--target tensorrt" in line


def test_a_parser_error_names_node_operator_reason_and_hint(model: onnx.ModelProto, tmp_path: Path) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sub")
    node.input[0] = "nowhere"
    line = refusal(saved(model, tmp_path))
    assert f"node '{node.name}' (Sub): " in line and "not registered" in line
    assert line.endswith("the graph is damaged: export it again")


def test_a_foreign_file_has_no_card(model: onnx.ModelProto, tmp_path: Path) -> None:
    del model.metadata_props[:]
    assert "no model card" in refusal(saved(model, tmp_path))


def test_only_the_batch_may_be_dynamic_and_it_must_be(model: onnx.ModelProto, tmp_path: Path) -> None:
    shape = model.graph.input[0].type.tensor_type.shape
    shape.dim[0].ClearField("dim_param")
    shape.dim[0].dim_value = 2
    assert "exported for a batch of 2: give --batch 2" in refusal(saved(model, tmp_path))


def suppression_by_operator() -> onnx.ModelProto:
    value, constant = helper.make_tensor_value_info, helper.make_tensor
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "score"], ["kept"], name="nms")
    inputs = [value("boxes", TensorProto.FLOAT, ["b", 10, 4]), value("scores", TensorProto.FLOAT, ["b", 3, 10])]
    constants = [
        constant("most", TensorProto.INT64, [1], [5]),
        constant("iou", TensorProto.FLOAT, [1], [0.5]),
        constant("score", TensorProto.FLOAT, [1], [0.05]),
    ]
    graph = helper.make_graph([node], "g", inputs, [value("kept", TensorProto.INT64, [None, 3])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_an_operator_that_is_read_but_not_implemented(tmp_path: Path) -> None:
    path = saved(suppression_by_operator(), tmp_path)
    if library(load_tensorrt())[0] != "TensorRT-RTX":
        pytest.skip("TensorRT itself implements NonMaxSuppression")
    assert "(NonMaxSuppression): TensorRT-RTX reads this operator but has no implementation" in refusal(path)


def test_a_static_and_a_foreign_network_are_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "g",
        [value("a", TensorProto.FLOAT, ["n", 2]), value("b", TensorProto.FLOAT, ["n", 2])],
        [value("c", TensorProto.FLOAT, ["n", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: CARD.model_dump_json()})
    assert "2 inputs; a deployable file has one" in refusal(saved(model, tmp_path))
