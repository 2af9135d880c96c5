"""The model card: round trip through an ONNX file, and cards that are missing or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploy.core.card import METADATA_KEY, ModelCard, card_from_file, card_from_session, parse_card
from deploy.core.errors import UserError

CARD = ModelCard(name="tiny", class_names=["a", "b"], category_ids=[3, 7], input_size=(64, 96), val_map=12.5)


def model_with(text: str | None) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if text is not None:
        helper.set_model_props(model, {METADATA_KEY: text})
    return model


def test_a_card_survives_the_file_and_the_session(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model_with(CARD.model_dump_json()), str(path))
    assert card_from_file(path) == CARD
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert card_from_session(session) == CARD


def test_missing_and_wrong_cards_are_one_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model_with(None), str(path))
    with pytest.raises(UserError, match="no model card"):
        card_from_file(path)
    with pytest.raises(UserError, match="no such file"):
        card_from_file(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("this is not a model")
    with pytest.raises(UserError, match="not a readable ONNX file") as error:
        card_from_file(tmp_path / "text.onnx")
    assert "\n" not in str(error.value)
    good = json.loads(CARD.model_dump_json())
    for change, message in [
        ({"schema_version": 2}, "schema 2"),
        ({"category_ids": [1]}, "2 class_names but 1 category_ids"),
        ({"category_ids": [1, 1]}, "not unique"),
        ({"input_size": [0, 4]}, "input_size.0"),
        ({"colour": "red"}, "colour"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_card(json.dumps({**good, **change}), "m.onnx")
    with pytest.raises(UserError, match="not JSON"):
        parse_card("{", "m.onnx")


@pytest.mark.parametrize(("method", "hashes"), [("minmax", []), ("minmax", ["0"]), ("dynamic", [])])
def test_ranges_that_come_from_images_say_from_which(method: str, hashes: list[str]) -> None:
    """Validation refuses these images, so a card cannot leave them out."""
    made = {"target": "cpu", "layers": 1, "method": method, "image_hashes": hashes}
    text = json.dumps({**CARD.model_dump(mode="json"), "quantization": made})
    if method == "minmax" and not hashes:
        with pytest.raises(UserError, match="image_hashes: is empty, and ranges of minmax come from images"):
            parse_card(text, "m.onnx")
    else:
        assert parse_card(text, "m.onnx").quantization is not None
