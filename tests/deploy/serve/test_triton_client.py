"""NVIDIA's own client, unchanged, against the Open Inference Protocol of the server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.red_rectangle_model import CARD, SLOTS, picture
from tests.helpers.server_process import Server

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
BOXES = [(10, 20, 50, 60), (0, 0, 128, 96), (64, 3, 71, 90)]
IMAGES = np.stack([picture((96, 128), box, seed=k).transpose(2, 0, 1) for k, box in enumerate(BOXES)])


@pytest.fixture
def client(red_server: Server) -> Iterator[Any]:
    client = triton.InferenceServerClient(red_server.url.removeprefix("http://"), concurrency=4)
    yield client
    client.close()


def tensor(images: np.ndarray, *, binary: bool) -> Any:
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def test_what_it_asks_before(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("red") and client.is_model_ready("red", "1")
    assert not client.is_model_ready("blue") and not client.is_model_ready("red", "2")
    extensions = client.get_server_metadata()["extensions"]
    assert extensions == ["binary_tensor_data", "model_configuration", "statistics"], "it may not load"
    metadata = client.get_model_metadata("red")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 3, 96, 128]}]
    assert [(row["name"], row["datatype"], row["shape"]) for row in metadata["outputs"]] == [
        ("boxes", "FP32", [-1, SLOTS, 4]),
        ("scores", "FP32", [-1, SLOTS]),
        ("labels", "INT64", [-1, SLOTS]),
        ("count", "INT32", [-1]),
    ]
    assert client.get_model_repository_index() == [{"name": "red", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infer_gives_the_runners_bits(client: Any, red_onnx: Any, binary_in: bool, binary_out: bool) -> None:
    wanted = OnnxRunner(red_onnx, threads=1)(IMAGES)
    assert wanted.boxes[:, 0].tolist() == [list(map(float, box)) for box in BOXES]
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("boxes", "scores", "labels", "count")
    ]
    answer = client.infer("red", [tensor(IMAGES, binary=binary_in)], outputs=outputs, request_id="seven")
    for name in ("boxes", "scores", "labels", "count"):
        found, value = answer.as_numpy(name), getattr(wanted, name)
        assert found.dtype == value.dtype and np.array_equal(found, value), name
    assert answer.get_response()["id"] == "seven" and answer.get_response()["model_name"] == "red"


def test_without_naming_outputs_and_with_a_version_and_a_timeout(client: Any) -> None:
    answer = client.infer("red", [tensor(IMAGES, binary=True)], model_version="1", timeout=5_000_000)
    assert answer.as_numpy("count").tolist() == [1, 1, 1]
    assert answer.as_numpy("labels").dtype == np.int64 and answer.as_numpy("masks") is None


@pytest.mark.parametrize("there", ["gzip", "deflate", None])
@pytest.mark.parametrize("back", ["gzip", "deflate", None])
def test_compressed_requests_and_answers_hold_the_same_bits(client: Any, there: str | None, back: str | None) -> None:
    plain = client.infer("red", [tensor(IMAGES, binary=True)])
    answer = client.infer(
        "red", [tensor(IMAGES, binary=True)], request_compression_algorithm=there, response_compression_algorithm=back
    )
    for name in ("boxes", "scores", "labels", "count"):
        assert np.array_equal(answer.as_numpy(name), plain.as_numpy(name)), name


def test_the_configuration(client: Any) -> None:
    """What a client reads of it: names, types and shapes without the batch, as in a repository of Triton itself."""
    found = client.get_model_config("red")
    assert found == client.get_model_config("red", "1")
    assert (found["name"], found["backend"], found["max_batch_size"]) == ("red", "onnxruntime", 32)
    assert [(row["name"], row["data_type"], row["dims"]) for row in (*found["input"], *found["output"])] == [
        ("images", "TYPE_UINT8", [3, 96, 128]),
        ("boxes", "TYPE_FP32", [SLOTS, 4]),
        ("scores", "TYPE_FP32", [SLOTS]),
        ("labels", "TYPE_INT64", [SLOTS]),
        ("count", "TYPE_INT32", [1]),
    ]
    assert found["output"][3]["reshape"] == {"shape": []}
    assert found["dynamic_batching"]["max_queue_delay_microseconds"] == 3000
    assert json.loads(found["parameters"]["class_names"]["string_value"]) == CARD.class_names
    for asked in (client.get_model_config, client.get_inference_statistics):
        with pytest.raises(triton.InferenceServerException, match="no such model"):
            asked("blue")


def test_statistics_count_requests_images_and_calls(client: Any) -> None:
    (before,) = client.get_inference_statistics("red")["model_stats"]
    since = time.time()
    for _ in range(2):
        client.infer("red", [tensor(IMAGES, binary=True)])
    with pytest.raises(triton.InferenceServerException, match="timeout must be"):
        client.infer("red", [tensor(IMAGES, binary=True)], timeout=-1)
    (after,) = client.get_inference_statistics()["model_stats"]
    assert (after["name"], after["version"]) == ("red", "1")
    assert after == client.get_inference_statistics("red", "1")["model_stats"][0]

    def grown(*path: str) -> Any:
        old, new = before, after
        for key in path:
            old, new = old[key], new[key]
        return new - old

    assert grown("inference_count") == 6 and 1 <= grown("execution_count") <= 6
    assert after["last_inference"] >= 1e3 * since - 1
    for stage, count in (("success", 2), ("fail", 1), ("queue", 2), ("compute_infer", 2), ("cache_hit", 0)):
        assert grown("inference_stats", stage, "count") == count, stage
    assert 0 < grown("inference_stats", "compute_infer", "ns") <= grown("inference_stats", "success", "ns")
    calls = {row["batch_size"]: row["compute_infer"]["count"] for row in after["batch_stats"]}
    assert sum(calls.values()) == after["execution_count"]
    assert sum(size * count for size, count in calls.items()) >= after["inference_count"]


def test_many_at_once(client: Any) -> None:
    requests = [client.async_infer("red", [tensor(IMAGES[k % 3 : k % 3 + 1], binary=True)]) for k in range(60)]
    for k, request in enumerate(requests):
        assert request.get_result().as_numpy("boxes")[0, 0].tolist() == list(map(float, BOXES[k % 3]))


def test_its_errors(client: Any) -> None:
    wrong = triton.InferInput("images", [1, 3, 8, 8], "UINT8")
    wrong.set_data_from_numpy(np.zeros((1, 3, 8, 8), np.uint8))
    with pytest.raises(triton.InferenceServerException, match=r"shape must be \[n, 3, 96, 128\]"):
        client.infer("red", [wrong])
    with pytest.raises(triton.InferenceServerException, match="no such model; there are: red"):
        client.infer("blue", [tensor(IMAGES, binary=True)])
    with pytest.raises(triton.InferenceServerException, match="reloading is not allowed"):
        client.load_model("red")
    assert CARD.input_size == (96, 128)
