"""Open Inference Protocol requests, byte by byte: what is taken, what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.serve.batching import Row
from deploy.serve.protocol import InferRequest, answer_infer, parse_infer
from deploy.serve.settings import RefusalError
from tests.helpers.red_rectangle_model import CARD

CARD_2X2 = CARD.model_copy(update={"input_size": (2, 2)})


def tensor(**more: Any) -> dict[str, Any]:
    return {"name": "images", "datatype": "UINT8", "shape": [1, 3, 2, 2], "data": list(range(12)), **more}


def parse(content: Any, tail: bytes = b"", most: int = 4) -> InferRequest:
    head = content if isinstance(content, bytes) else json.dumps(content).encode()
    return parse_infer(head + tail, str(len(head)) if tail else None, CARD_2X2, most)


@given(st.integers(1, 4), st.booleans(), st.booleans(), st.data())
@settings(max_examples=60)
def test_json_flat_json_nested_and_binary_are_one(n: int, nested: bool, binary: bool, data: st.DataObject) -> None:
    images = np.frombuffer(data.draw(st.binary(min_size=12 * n, max_size=12 * n)), np.uint8).reshape(n, 3, 2, 2)
    if binary:
        head = tensor(shape=[n, 3, 2, 2], parameters={"binary_data_size": images.nbytes})
        del head["data"]
        found = parse({"inputs": [head]}, images.tobytes())
    else:
        values = images.tolist() if nested else images.ravel().tolist()
        found = parse({"inputs": [tensor(shape=[n, 3, 2, 2], data=values)]})
    assert found.images.dtype == np.uint8 and np.array_equal(found.images, images)


def test_what_a_request_asks_for() -> None:
    found = parse({"inputs": [tensor()]})
    assert found.outputs == dict.fromkeys(["boxes", "scores", "labels", "count"], False)
    assert found.request_id is None and found.deadline_s is None
    found = parse(
        {
            "id": "a",
            "inputs": [tensor()],
            "parameters": {"binary_data_output": True, "timeout": 250_000},
            "outputs": [{"name": "count"}, {"name": "boxes", "parameters": {"binary_data": False}}],
        }
    )
    assert found.outputs == {"count": True, "boxes": False}
    assert found.request_id == "a" and found.deadline_s == 0.25


@pytest.mark.parametrize("timeout", [10**13, 10**400, 10**4000])
def test_a_timeout_beyond_any_float_is_a_long_one(timeout: int) -> None:
    found = parse({"inputs": [tensor()], "parameters": {"timeout": timeout}})
    assert found.deadline_s is not None and 1e6 <= found.deadline_s <= 1e9


NESTED = np.arange(12).reshape(1, 3, 2, 2).tolist()
WRONG: dict[str, Any] = {
    "not json": b"{",
    "not utf-8": b'{"inputs": "\xff"}',
    "a list": [],
    "nothing": {},
    "an unknown field": {"inputs": [tensor()], "input": 1},
    "two tensors": {"inputs": [tensor(), tensor()]},
    "another name": {"inputs": [tensor(name="image")]},
    "another type": {"inputs": [tensor(datatype="FP32")]},
    "another shape": {"inputs": [tensor(shape=[1, 2, 2, 3])]},
    "no image": {"inputs": [tensor(shape=[0, 3, 2, 2], data=[])]},
    "a shape of truth": {"inputs": [tensor(shape=[True, 3, 2, 2])]},
    "a shape of five": {"inputs": [tensor(shape=[1, 1, 3, 2, 2])]},
    "a shape of text": {"inputs": [tensor(shape="1322")]},
    "too few values": {"inputs": [tensor(data=list(range(11)))]},
    "values of text": {"inputs": [tensor(data=["1"] * 12)]},
    "one long text": {"inputs": [tensor(data=["1" * 10_000] + [1] * 11)]},
    "values that are not whole": {"inputs": [tensor(data=[0.5] * 12)]},
    "values of truth": {"inputs": [tensor(data=[True] * 12)]},
    "values above 255": {"inputs": [tensor(data=[256] * 12)]},
    "values below 0": {"inputs": [tensor(data=[-1] * 12)]},
    "values beyond any type": {"inputs": [tensor(data=[10**40] * 12)]},
    "not a number": b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1,3,2,2], "data": [NaN]}]}',
    "ragged lists": {"inputs": [tensor(data=[[[[0, 1], [2]], NESTED[0][1], NESTED[0][2]]])]},
    "lists too deep": b"[" * 100_000,
    "millions of lists": b'{"inputs": [' + b"[]," * 300_000 + b"[]]}",
    "both kinds of data": {"inputs": [tensor(parameters={"binary_data_size": 12})]},
    "data in no memory of ours": {"inputs": [tensor(parameters={"shared_memory_region": "a"})]},
    "an unknown output": {"inputs": [tensor()], "outputs": [{"name": "masks"}]},
    "an output twice": {"inputs": [tensor()], "outputs": [{"name": "boxes"}, {"name": "boxes"}]},
    "an output that is a list": {"inputs": [tensor()], "outputs": [["boxes"]]},
    "classification": {"inputs": [tensor()], "outputs": [{"name": "boxes", "parameters": {"classification": 3}}]},
    "parameters that are a list": {"inputs": [tensor()], "parameters": []},
    "a timeout of text": {"inputs": [tensor()], "parameters": {"timeout": "1"}},
    "an id that is a number": {"inputs": [tensor()], "id": 3},
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name: str) -> None:
    with pytest.raises(RefusalError) as caught:
        parse(WRONG[name])
    assert caught.value.status == 400 and len(caught.value.message) < 200


def test_too_many_images_are_413() -> None:
    with pytest.raises(RefusalError) as caught:
        parse({"inputs": [tensor(shape=[5, 3, 2, 2], data=[0] * 60)]})
    assert caught.value.status == 413


@pytest.mark.parametrize("length", ["", "-1", "1e1", "99999", "9" * 50, "٣"])
def test_header_lengths(length: str) -> None:
    with pytest.raises(RefusalError):
        parse_infer(json.dumps({"inputs": [tensor()]}).encode(), length, CARD_2X2, 4)


@pytest.mark.parametrize("size", [11, 13, "12", 12.0, None])
def test_binary_sizes(size: Any) -> None:
    head = tensor(parameters={} if size is None else {"binary_data_size": size})
    del head["data"]
    with pytest.raises(RefusalError):
        parse({"inputs": [head]}, bytes(12))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: (
    st.lists(x, max_size=4)
    | st.dictionaries(st.sampled_from(["inputs", "outputs", "name", "shape", "data", "parameters", "datatype"]), x)
)))  # fmt: skip
@settings(max_examples=200)
def test_any_json_is_refused_in_one_line(content: Any) -> None:
    for body in (content, {"inputs": content}, {"inputs": [tensor()], "outputs": content}, {"inputs": [content]}):
        try:
            parse(body)
        except RefusalError as error:
            assert error.status in (400, 413) and "\n" not in error.message
        else:
            assert body["outputs"] in (None, []) or "inputs" in body


def test_answers_are_padded_and_hold_every_bit() -> None:
    rng = np.random.default_rng(0)
    boxes, scores = rng.random((2, 4), np.float32), rng.random(2, np.float32)
    row = Row(boxes, scores, np.array([1, 0]), 0.0, 0.0, 1)
    none = Row(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0.0, 0.0, 1)
    request = parse({"id": "x", "inputs": [tensor()], "outputs": [{"name": "boxes"}, {"name": "count"}]})
    body, length = answer_infer("m", request, [row, none], 3)
    assert length is None
    answer = json.loads(body)
    assert answer["id"] == "x" and answer["model_version"] == "1"
    found = np.array(answer["outputs"][0]["data"], np.float32).reshape(answer["outputs"][0]["shape"])
    assert np.array_equal(found[0, :2], boxes) and not found[0, 2].any() and not found[1].any()
    assert answer["outputs"][1] == {"name": "count", "datatype": "INT32", "shape": [2], "data": [2, 0]}
