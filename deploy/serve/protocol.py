"""The Open Inference Protocol, version 2: requests to tensors, detections to tensors, in JSON or binary.

https://github.com/open-inference/open-inference-protocol (HTTP/REST), and the binary tensor data extension of
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md: the first
`Inference-Header-Content-Length` bytes of a body are JSON, the rest are tensors, little endian, in their order.

A model has one input, `images` UINT8 [n, 3, H, W], and the outputs of `deploy.runtimes.base.DetectionBatch`. Boxes
are in pixels of the canvas that the client made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from deploy.core.card import ModelCard
from deploy.runtimes.base import DetectionBatch
from deploy.serve.batching import Row
from deploy.serve.settings import RefusalError, Settings

VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"
OUTPUTS = {"boxes": "FP32", "scores": "FP32", "labels": "INT64", "count": "INT32"}
_DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}
MAX_TOKENS = 200_000
"""Brackets and quotes in a JSON body. A body of empty lists would take thirty times its size in memory."""
_LONGEST_US = 10**12  # of a client's timeout: longer than any limit of a server, and within a float


@dataclass(frozen=True)
class InferRequest:
    """images: uint8 [n, 3, H, W]. outputs: name → as binary. deadline_s: what the client asked for, or None."""

    images: np.ndarray
    outputs: dict[str, bool]
    request_id: str | None
    deadline_s: float | None


def extensions(*, reload: bool) -> list[str]:
    """Extensions of the protocol that this server has. `model_repository` only where clients may load models."""
    return ["binary_tensor_data", "model_configuration", "statistics", *(["model_repository"] if reload else [])]


def model_metadata(name: str, backend: str, card: ModelCard) -> dict[str, Any]:
    """The answer to GET /v2/models/{name}."""
    height, width = card.input_size
    shapes = {"boxes": [-1, card.max_detections, 4], "count": [-1]}
    return {
        "name": name,
        "versions": [VERSION],
        "platform": backend.replace(" ", "_"),
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 3, height, width]}],
        "outputs": [
            {"name": output, "datatype": kind, "shape": shapes.get(output, [-1, card.max_detections])}
            for output, kind in OUTPUTS.items()
        ],
    }


def model_config(name: str, backend: str, card: ModelCard, settings: Settings) -> dict[str, Any]:
    """The answer to GET /v2/models/{name}/config: the message `inference.ModelConfig` as JSON, what applies of it.

    Shapes are without the batch; `count` is one number an image, for which Triton has a one that is reshaped away.
    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_configuration.md
    """
    height, width = card.input_size
    dims = {"boxes": [card.max_detections, 4], "count": [1]}
    return {
        "name": name,
        "platform": backend.replace(" ", "_"),
        "backend": backend.partition(" ")[0],
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": settings.images_a_request,
        "input": [
            {"name": "images", "data_type": "TYPE_UINT8", "format": "FORMAT_NCHW", "dims": [3, height, width]}
            | {"is_shape_tensor": False, "allow_ragged_batch": False, "optional": False}
        ],
        "output": [
            {"name": output, "data_type": f"TYPE_{kind}", "dims": dims.get(output, [card.max_detections])}
            | ({"reshape": {"shape": []}} if output == "count" else {})
            | {"label_filename": "", "is_shape_tensor": False}
            for output, kind in OUTPUTS.items()
        ],
        "batch_input": [],
        "batch_output": [],
        "dynamic_batching": {
            "preferred_batch_size": [settings.max_batch],
            "max_queue_delay_microseconds": round(1e3 * settings.max_delay_ms),
            "preserve_ordering": False,
        },
        "instance_group": [{"name": name, "kind": "KIND_CPU" if backend.endswith("cpu") else "KIND_GPU", "count": 1}],
        "parameters": {
            "class_names": {"string_value": json.dumps(card.class_names)},
            "category_ids": {"string_value": json.dumps(card.category_ids)},
        },
        "model_warmup": [],
    }


def parse_infer(body: bytes, header_length: str | None, card: ModelCard, max_images: int) -> InferRequest:
    """Raises RefusalError 400. Slow for JSON tensors: call it outside the event loop."""
    if header_length is None:
        head, tail = body, memoryview(b"")
    else:
        if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > len(body):
            raise _bad(f"{HEADER_LENGTH}: must be a length within the body")
        head, tail = body[: int(header_length)], memoryview(body)[int(header_length) :]
    content = _json(head)
    unknown = set(content) - {"id", "inputs", "outputs", "parameters"}
    if unknown:
        raise _bad(f"unknown field: {sorted(unknown)[0][:50]}")
    request_id = content.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise _bad("id: must be text")
    parameters = _parameters(content, "parameters")
    images = _images(content.get("inputs"), tail, card, max_images)
    all_binary = parameters.get("binary_data_output", False) is True
    return InferRequest(images, _outputs(content.get("outputs"), all_binary), request_id, _deadline(parameters))


def answer_infer(
    name: str, request: InferRequest, rows: Sequence[Row], max_detections: int
) -> tuple[bytes, int | None]:
    """Body, and the length of its JSON when tensors follow it."""
    found = _pad(rows, max_detections)
    outputs: list[dict[str, Any]] = []
    tensors: list[bytes] = []
    for output, binary in request.outputs.items():
        kind = OUTPUTS[output]
        value = np.ascontiguousarray(getattr(found, output), dtype=_DTYPES[kind])
        row: dict[str, Any] = {"name": output, "datatype": kind, "shape": list(value.shape)}
        if binary:
            tensors.append(value.tobytes())
            row["parameters"] = {"binary_data_size": value.nbytes}
        else:
            row["data"] = value.ravel().tolist()
        outputs.append(row)
    answer: dict[str, Any] = {"model_name": name, "model_version": VERSION, "outputs": outputs}
    if request.request_id is not None:
        answer["id"] = request.request_id
    head = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
    return (b"".join([head, *tensors]), len(head)) if tensors else (head, None)


# ----------------------------------------------------------------------------------------------------


def _bad(message: str) -> RefusalError:
    return RefusalError(400, message)


def _json(head: bytes) -> dict[str, Any]:
    if sum(head.count(token) for token in (b"[", b"{", b'"')) > MAX_TOKENS:
        raise _bad("the JSON is too deep or has too many parts: send the tensor as binary data")
    try:
        content = json.loads(head)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _bad("the body is not JSON") from error
    if not isinstance(content, dict):
        raise _bad("the body is not a JSON object")
    return content


def _parameters(owner: dict[str, Any], where: str) -> dict[str, Any]:
    found = owner.get("parameters", {})
    if not isinstance(found, dict):
        raise _bad(f"{where}: must be an object")
    for name in found:
        if name.startswith("shared_memory"):
            raise _bad("shared memory is not supported")
        if name.startswith("sequence"):
            raise _bad("sequences are not supported")
    return found


def _images(inputs: Any, tail: memoryview, card: ModelCard, max_images: int) -> np.ndarray:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad("inputs: must be one tensor, named images")
    tensor = inputs[0]
    if tensor.get("name") != "images":
        raise _bad("inputs: the tensor must be named images")
    if tensor.get("datatype") != "UINT8":
        raise _bad("images: datatype must be UINT8")
    shape, wanted = tensor.get("shape"), [3, *card.input_size]
    if not isinstance(shape, list) or not all(type(side) is int for side in shape) or len(shape) != 4:
        raise _bad("images: shape must be four whole numbers")
    if shape[1:] != wanted or shape[0] < 1:
        raise _bad(f"images: shape must be [n, {', '.join(map(str, wanted))}]")
    if shape[0] > max_images:
        raise RefusalError(413, f"images: at most {max_images} in a request")
    size = _parameters(tensor, "images").get("binary_data_size")
    if size is None:
        if len(tail):
            raise _bad("images: binary data follows, but binary_data_size is missing")
        return _numbers(tensor.get("data"), shape)
    if "data" in tensor:
        raise _bad("images: both data and binary_data_size")
    if type(size) is not int or size != len(tail) or size != math.prod(shape):
        raise _bad("images: binary_data_size must be the bytes that follow the header, one a value of the shape")
    return np.frombuffer(tail, np.uint8).reshape(shape)


def _numbers(data: Any, shape: list[int]) -> np.ndarray:
    """Row-major values, flat or nested as the shape. By hand: NumPy would make sense of text, and of ragged lists."""
    wrong = _bad("images: data must be whole numbers from 0 to 255, as many as the shape says, flat or nested like it")
    flat = data
    if isinstance(data, list) and data and isinstance(data[0], list):
        if len(data) != shape[0]:
            raise wrong
        for side in shape[1:]:
            if any(type(row) is not list or len(row) != side for row in flat):
                raise wrong
            flat = list(chain.from_iterable(flat))
    if not isinstance(flat, list) or len(flat) != math.prod(shape) or set(map(type, flat)) != {int}:
        raise wrong
    try:
        return np.frombuffer(bytes(flat), np.uint8).reshape(shape)
    except ValueError:  # not 0 to 255
        raise wrong from None


def _outputs(wanted: Any, all_binary: bool) -> dict[str, bool]:
    if wanted is None or wanted == []:
        return dict.fromkeys(OUTPUTS, all_binary)
    if not isinstance(wanted, list) or len(wanted) > len(OUTPUTS):
        raise _bad("outputs: must be a list of the outputs that are wanted")
    found: dict[str, bool] = {}
    for row in wanted:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or name not in OUTPUTS or name in found:
            raise _bad(f"outputs: choose from {', '.join(OUTPUTS)}, each once")
        parameters = _parameters(row, f"outputs: {name}")
        if parameters.get("classification"):
            raise _bad(f"outputs: {name}: classification is not supported")
        found[name] = parameters.get("binary_data", all_binary) is True
    return found


def _deadline(parameters: dict[str, Any]) -> float | None:
    """Triton's `timeout`, in microseconds; 0 is none."""
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise _bad("parameters: timeout must be microseconds, a whole number")
    return min(timeout, _LONGEST_US) / 1e6 if timeout else None


def _pad(rows: Sequence[Row], detections: int) -> DetectionBatch:
    boxes = np.zeros((len(rows), detections, 4), np.float32)
    scores = np.zeros((len(rows), detections), np.float32)
    labels = np.zeros((len(rows), detections), np.int64)
    for i, row in enumerate(rows):
        n = len(row.scores)
        boxes[i, :n], scores[i, :n], labels[i, :n] = row.boxes, row.scores, row.labels
    return DetectionBatch(boxes, scores, labels, np.array([len(row.scores) for row in rows], np.int32))
