"""The scanner against the `onnx` package on real files, and on every way to break one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploy.core.card import METADATA_KEY
from deploy.core.errors import UserError
from deploy.core.onnx_scan import scan_onnx


def test_it_sees_what_onnx_sees(tiny_onnx: Path) -> None:
    model, facts = onnx.load(str(tiny_onnx)), scan_onnx(tiny_onnx)
    assert (facts.ir_version, facts.opset) == (model.ir_version, model.opset_import[0].version)
    assert facts.metadata == {prop.key: prop.value for prop in model.metadata_props} and METADATA_KEY in facts.metadata
    counted = Counter(node.op_type for node in model.graph.node)
    assert {operator.op_type: operator.count for operator in facts.operators} == counted
    first = {operator.op_type: operator.first for operator in facts.operators}
    assert first["Conv"] == next(node.name for node in model.graph.node if node.op_type == "Conv")
    floats = {item.name for item in model.graph.initializer if item.data_type == TensorProto.FLOAT}
    assert set(facts.weights) == floats and facts.external == []


def test_a_digest_changes_with_its_weight_and_no_other(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(str(tiny_onnx))
    item = next(item for item in model.graph.initializer if item.name.endswith("cls.weight"))
    item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * np.float32(1.5), item.name))
    onnx.save(model, str(tmp_path / "other.onnx"))
    before, after = scan_onnx(tiny_onnx).weights, scan_onnx(tmp_path / "other.onnx").weights
    assert {name for name in before if before[name] != after[name]} == {item.name}


def test_structure_is_all_but_the_weights(tiny_onnx: Path, tmp_path: Path) -> None:
    def structure(change: Callable[[onnx.GraphProto], None]) -> str:
        model = onnx.load(str(tiny_onnx))
        change(model.graph)
        onnx.save(model, str(tmp_path / "m.onnx"))
        return scan_onnx(tmp_path / "m.onnx").structure_sha256

    def scaled(graph: onnx.GraphProto, kind: int, factor: int) -> None:
        item = next(item for item in graph.initializer if item.data_type == kind and numpy_helper.to_array(item).any())
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) * factor, item.name))

    def other_operator(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == "Relu").op_type = "Sigmoid"

    def other_stride(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "Conv")
        next(attribute for attribute in node.attribute if attribute.name == "strides").ints[0] += 1

    same = structure(lambda graph: None)
    assert structure(lambda graph: scaled(graph, TensorProto.FLOAT, 2)) == same
    changes = (other_operator, other_stride, lambda graph: scaled(graph, TensorProto.INT64, 2))
    assert len({same, *(structure(change) for change in changes)}) == 4


def test_subgraphs_and_functions_are_looked_into(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    inner = helper.make_graph(
        [helper.make_node("Sin", ["x"], ["y"], name="inside")], "g", [], [value("y", TensorProto.FLOAT, None)]
    )
    branch = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    call = helper.make_node("ours", ["z"], ["o"], domain="local")
    graph = helper.make_graph(
        [branch, call],
        "g",
        [value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, [1])],
        [value("o", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "ours", ["a"], ["b"], [helper.make_node("Cos", ["a"], ["b"])], opsets)
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function]), str(tmp_path / "m.onnx"))
    found = {operator.op_type: operator.count for operator in scan_onnx(tmp_path / "m.onnx").operators}
    assert found == {"If": 1, "Sin": 2, "Cos": 1}  # the function itself is no operator that a runtime must know


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"hello world", "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
        (bytes(1000), "not an ONNX model"),
        ("größer".encode(), "not an ONNX model"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        scan_onnx(tmp_path / "m.onnx")
    assert "\n" not in str(error.value)


@settings(max_examples=60)
@given(share=st.floats(0.0, 0.9999))
def test_a_file_cut_off_anywhere_is_refused(whole: bytes, place: Path, share: float) -> None:
    place.write_bytes(whole[: max(1, int(len(whole) * share))])
    with contextlib.suppress(DecodeError):  # between two fields the rest is a smaller model
        assume(not onnx.ModelProto.FromString(place.read_bytes()).opset_import)
    with pytest.raises(UserError, match=r"truncated|not an ONNX model"):
        scan_onnx(place)


@pytest.fixture(scope="module")
def whole(tiny_onnx: Path) -> bytes:
    return tiny_onnx.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut") / "cut.onnx"


@settings(max_examples=60)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_model_or_one_line(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    try:
        scan_onnx(place)
    except UserError as error:
        assert "\n" not in str(error)


def test_weights_in_side_files(tiny_onnx: Path, tmp_path: Path) -> None:
    path, side = tmp_path / "m.onnx", tmp_path / "m.bin"
    onnx.save(onnx.load(str(tiny_onnx)), str(path), save_as_external_data=True, location="m.bin", size_threshold=64)
    facts = scan_onnx(path)
    assert facts.external == ["m.bin"]
    content = side.read_bytes()
    side.write_bytes(bytes(len(content)))
    assert scan_onnx(path).weights != facts.weights  # the digest covers what lies outside
    side.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"weights in m.bin are truncated"):
        scan_onnx(path)
    side.unlink()
    with pytest.raises(UserError, match=r"weights are in m.bin, which is not beside it"):
        scan_onnx(path)
    model = onnx.load(str(path), load_external_data=False)
    for item in model.graph.initializer:
        for entry in item.external_data:
            entry.value = "../m.bin" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="outside of its folder"):
        scan_onnx(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        scan_onnx(tmp_path / "none.onnx")
