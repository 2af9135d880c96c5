"""Other forms of exported files: the same answers, and refused where a program needs the usual one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.core.card import Form, card_from_file
from deploy.core.errors import UserError
from deploy.graph import form as module
from deploy.graph.form import reform
from deploy.quantize.calibrate import CalibrationImages
from deploy.quantize.file import Quantizer
from deploy.runtimes.open import open_runner
from deploy.serve.triton_repo import write_triton_model
from tests.helpers.tiny_onnx import pictures

FORMS = [
    Form(batch=1),
    Form(batch=3, labels="int32"),
    Form(images="float32"),
    Form(batch=2, labels="int32", images="float32"),
]


@pytest.mark.parametrize("form", FORMS, ids=Form.in_words)
def test_answers_are_the_same(form: Form, tiny_onnx: Path, tmp_path: Path) -> None:
    """For more images than the batch, and for fewer."""
    out = tmp_path / "other.onnx"
    card = reform(tiny_onnx, out, form)
    assert card == card_from_file(out) == card_from_file(tiny_onnx).model_copy(update={"form": form})
    graph = onnx.load(str(out)).graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    assert types["labels"].elem_type == (onnx.TensorProto.INT32 if form.labels == "int32" else onnx.TensorProto.INT64)
    assert types["images"].elem_type == (onnx.TensorProto.FLOAT if form.images == "float32" else onnx.TensorProto.UINT8)
    if form.batch is not None:
        assert {kind.shape.dim[0].dim_value for kind in types.values()} == {form.batch}
        assert not {node.op_type for node in graph.node} & {"Shape", "Size"} and not graph.value_info
    usual, other = open_runner(tiny_onnx, threads=1), open_runner(out, threads=1)
    for count in (5, 1):
        wanted, found = usual(pictures(count)), other(pictures(count))
        assert wanted.count.min() > 0
        for name, value in vars(wanted).items():
            assert getattr(found, name).dtype == value.dtype
            np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=1e-4)


def test_no_boolean_is_compared(tiny_onnx: Path) -> None:
    """An Equal of booleans, which stood in a floor division, is what tract and TVM stumble over."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(str(tiny_onnx))).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    compared = [value for node in inferred.node if node.op_type == "Equal" for value in node.input]
    assert compared and onnx.TensorProto.BOOL not in [kinds.get(value) for value in compared]
    assert not [node for node in inferred.node if node.op_type == "Mod"]


def test_a_form_has_no_other_form(tiny_onnx: Path, tmp_path: Path) -> None:
    """What is made of the usual file refuses another in one line."""
    other = tmp_path / "other.onnx"
    reform(tiny_onnx, other, Form(batch=1, labels="int32"))
    said = "other.onnx: has a fixed batch of 1, int32 labels; {} from the file that compress export writes first"
    with pytest.raises(UserError, match=said.format("another form is made")):
        reform(other, tmp_path / "third.onnx", Form())
    with pytest.raises(UserError, match=said.format("Triton's models are made")):
        write_triton_model(tmp_path / "models", other)
    with pytest.raises(UserError, match=said.format("int8 files are made")):
        Quantizer(other, CalibrationImages((), ()), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["other.onnx"]


def test_a_graph_that_computes_otherwise_is_not_written(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(graph: Any, where: Path) -> None:
        weight = next(item for item in graph.initializer if len(item.dims) == 4)
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.0001)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        take(graph, where)

    take = module._take_floats
    monkeypatch.setattr(module, "_take_floats", spoil)
    with pytest.raises(UserError, match="of the file in another form is not the same; nothing was written"):
        reform(tiny_onnx, tmp_path / "other.onnx", Form(images="float32"))
    assert not list(tmp_path.iterdir())
