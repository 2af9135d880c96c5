"""What the OpenAPI document promises, tried by schemathesis on the running server."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.encoded_pictures import encode, kinds
from tests.helpers.red_rectangle_model import CARD, picture
from tests.helpers.server_process import Server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance  # noqa: E402

PICTURES = st.sampled_from([encode(picture((48, 64), (10, 10, 30, 30))), *kinds().values()])
for media_type in ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif"):
    schemathesis.openapi.media_type(media_type, PICTURES)
schemathesis.openapi.format("binary", PICTURES)


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Half of the names are that of the model: a random one only finds 404."""
    if path_parameters and len(str(path_parameters.get("name"))) % 2:
        path_parameters = {**path_parameters, "name": "red"}
        if "version" in path_parameters:
            path_parameters["version"] = "1"
    return path_parameters


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_query(context: Any, query: Any) -> Any:
    return {**query, "model": "red"} if query and isinstance(query.get("model"), str) and "model" in query else query


def test_the_server_keeps_what_its_document_promises(red_server: Server) -> None:
    """All checks of schemathesis, with valid and with invalid requests, on every operation.

    But one for tensors: that valid JSON is accepted. No JSON schema says that the length of `data` is the product of
    `shape`."""
    api = schemathesis.openapi.from_url(f"{red_server.url}/openapi.json")
    tried: Counter[str] = Counter()
    for result in api.get_all_operations():
        operation = result.ok()
        _try(operation, GenerationMode.POSITIVE, tried)
        if operation.path in ("/v1/detect", "/v2/models/{name}/infer"):  # elsewhere everything is valid
            _try(operation, GenerationMode.NEGATIVE, tried)
    assert tried["POST /v1/detect 200"] >= 5 and tried["POST /v1/detect 422"] >= 1, tried
    assert len({key.rsplit(" ", 1)[0] for key in tried}) == 21, tried


def _try(operation: Any, mode: Any, tried: Counter[str]) -> None:
    excluded = [positive_data_acceptance] if operation.path.endswith("/infer") else []

    @settings(max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(operation.as_strategy(generation_mode=mode))
    def keeps_its_promise(case: Any) -> None:
        response = case.call()
        # Its list of refusals lacks 413, which is ours to more pictures than a request may have.
        refused = [negative_data_rejection] if response.status_code == 413 else []
        case.validate_response(response, excluded_checks=[*excluded, *refused])
        tried[f"{operation.label} {response.status_code}"] += 1

    keeps_its_promise()


def test_the_example_of_a_tensor_is_taken(red_server: Server) -> None:
    """What the excluded check would have shown."""
    image = picture((96, 128), (10, 20, 50, 60)).transpose(2, 0, 1)
    body = {
        "inputs": [{"name": "images", "shape": [1, 3, 96, 128], "datatype": "UINT8", "data": image.ravel().tolist()}]
    }
    answer = httpx.post(f"{red_server.url}/v2/models/red/infer", json=body, timeout=600)
    assert answer.status_code == 200
    boxes = next(row for row in answer.json()["outputs"] if row["name"] == "boxes")
    assert np.array(boxes["data"]).reshape(boxes["shape"])[0, 0].tolist() == [10, 20, 50, 60]


def test_every_route_is_in_the_document(red_server: Server) -> None:
    document = httpx.get(f"{red_server.url}/openapi.json", timeout=600).json()
    assert set(document["paths"]) == {
        "/v1/detect",
        "/v1/models",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/stats",
        "/v2/models/{name}",
        "/v2/models/{name}/config",
        "/v2/models/{name}/stats",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/infer",
        "/v2/models/{name}/versions/{version}",
        "/v2/models/{name}/versions/{version}/config",
        "/v2/models/{name}/versions/{version}/stats",
        "/v2/models/{name}/versions/{version}/ready",
        "/v2/models/{name}/versions/{version}/infer",
        "/v2/repository/index",
        "/v2/repository/models/{name}/load",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert "/tmp" not in json.dumps(document) and CARD.name not in document["info"]["title"]
