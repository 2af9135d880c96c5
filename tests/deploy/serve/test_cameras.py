"""Camera systems: what Frigate and Home Assistant send is answered in their form."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import httpx
import pytest

from tests.helpers.encoded_pictures import encode
from tests.helpers.red_rectangle_model import CARD, picture
from tests.helpers.server_process import Server

PNG = encode(picture((480, 640), (100, 100, 300, 200)))
"""One red rectangle, found at (100, 100) to (300, 200)."""


@pytest.fixture
def http(red_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=red_server.url, timeout=600) as client:
        yield client


def test_deepstack(http: httpx.Client) -> None:
    """As Frigate posts it: the picture under a name of its own, and a key that nobody asked for."""
    response = http.post("/v1/vision/detection", files={"image": PNG}, data={"api_key": ""})
    answer = response.json()
    assert response.status_code == 200 and answer["success"] is True and answer["count"] == 1
    (found,) = answer["predictions"]
    sides = {name: found.pop(name) for name in ("x_min", "y_min", "x_max", "y_max")}
    assert sides == {"x_min": 100, "y_min": 100, "x_max": 300, "y_max": 200}
    assert found["label"] == "red" and CARD.shown_score <= found["confidence"] <= 1
    name = http.get("/v1/models").json()[0]["name"]
    assert http.post(f"/v1/vision/custom/{name}", files={"image": PNG}).json()["predictions"][0]["label"] == "red"
    least = {"min_confidence": str(found["confidence"] + 1e-6)}
    if found["confidence"] < 1:
        assert http.post("/v1/vision/detection", files={"image": PNG}, data=least).json()["predictions"] == []


def test_doods(red_server: Server) -> None:
    """By the client that Home Assistant uses, which asks for the detectors when it begins."""
    pydoods = pytest.importorskip("pydoods", reason="pydoods is not installed: pip install pydoods")
    client = pydoods.PyDOODS(red_server.url)
    (detector,) = client.get_detectors()["detectors"]
    height, width = CARD.input_size
    assert detector["labels"] == CARD.class_names and (detector["width"], detector["height"]) == (width, height)
    for wanted, count in (({"*": 30}, 1), ({"red": 30}, 1), ({"green": 0}, 0), ({"*": 0, "red": 100}, 0), ({}, 1)):
        found = client.detect(PNG, dconfig=wanted, detector_name=detector["name"])["detections"]
        assert len(found) == count, wanted
    box = [found[0][key] for key in ("left", "top", "right", "bottom")]
    assert box == pytest.approx([100 / 640, 100 / 480, 300 / 640, 200 / 480])
    assert 30 <= found[0]["confidence"] <= 100


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/vision/detection", {"files": {"image": b"no picture"}}, 415, "not a JPEG"),
        ("/v1/vision/detection", {"data": {"image": "text"}}, 400, ""),
        ("/v1/vision/detection", {"files": {"image": PNG}, "data": {"min_confidence": "2"}}, 422, "from 0 to 1"),
        ("/v1/vision/detection", {"files": {"image": PNG}, "data": {"min_confidence": "nan"}}, 422, "from 0 to 1"),
        ("/v1/vision/custom/other", {"files": {"image": PNG}}, 404, "no such model"),
        ("/detect", {"content": b"{"}, 400, "no JSON"),
        ("/detect", {"json": [1]}, 400, "JSON object"),
        ("/detect", {"json": {"data": 3}}, 422, "base64"),
        ("/detect", {"json": {"data": "!!!"}}, 422, "base64"),
        ("/detect", {"json": {"data": base64.b64encode(PNG).decode(), "detect": {"*": 101}}}, 422, "from 0 to 100"),
        ("/detect", {"json": {"data": base64.b64encode(PNG).decode(), "detect": [1]}}, 422, "label and confidence"),
        ("/detect", {"json": {"data": base64.b64encode(PNG).decode(), "detector_name": "other"}}, 404, "no such model"),
    ],
)
def test_mistakes(http: httpx.Client, path: str, body: dict[str, object], status: int, message: str) -> None:
    response = http.post(path, **body)  # type: ignore[arg-type]
    assert response.status_code == status, response.text
    assert message in response.json()["error"]
