"""For camera systems: the two forms of requests that they know. Both take one picture and answer with what people are
shown, from the operating point on, unless the request says another score.

- DeepStack's, `/v1/vision/detection`: Frigate, Blue Iris and clients of CodeProject.AI.
- DOODS', `/detectors` and `/detect`: Home Assistant.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response

from deploy.serve.answers import image_answer
from deploy.serve.bodies import multipart_parts
from deploy.serve.detect import detect_pictures
from deploy.serve.service import Service, admit, counted, json_answer, timing_ms, unless_gone
from deploy.serve.settings import RefusalError

MOST = 20
"""Objects of an answer in DeepStack's form: Frigate has no room for more."""


def add_deepstack(app: FastAPI, service: Service) -> None:
    """DeepStack's form: the picture as a file of a form, boxes in pixels."""

    @app.post("/v1/vision/detection", include_in_schema=False)
    @app.post("/v1/vision/custom/{model}", include_in_schema=False)
    async def deepstack(request: Request, model: str | None = None) -> Response:
        name = service.models.get(model).name
        async with counted(service, name), service.bodies.read(request) as data:
            received = time.monotonic()
            files, fields = await multipart_parts(request, data, max_files=1)
            if not files:
                raise RefusalError(400, "no picture: send it as a file of the form")
            least = _share(fields.get("min_confidence"), "min_confidence", most=1.0)
            answer = await _look(request, service, name, files[0], received, least)
        predictions = [
            {"confidence": found["score"], "label": found["class_name"],
             **dict(zip(("x_min", "y_min", "x_max", "y_max"), (round(side) for side in found["box"]), strict=True))}
            for found in answer["detections"][:MOST]
        ]  # fmt: skip
        return json_answer({"success": True, "code": 200, "count": len(predictions), "predictions": predictions})


def add_doods(app: FastAPI, service: Service) -> None:
    """DOODS' form: the picture in base64, boxes and scores as shares."""

    @app.get("/detectors", include_in_schema=False)
    async def detectors() -> Response:
        rows = []
        for name in service.models.names:
            if service.models.is_ready(name):
                card = service.models.get(name).card
                height, width = card.input_size
                rows.append({"name": name, "type": "onnx", "model": card.name, "labels": card.class_names,
                             "width": width, "height": height, "channels": 3})  # fmt: skip
        return json_answer({"detectors": rows})

    @app.post("/detect", include_in_schema=False)
    async def doods(request: Request) -> Response:
        first = service.models.get(None).name  # which one is wanted stands in the body
        async with counted(service, first), service.bodies.read(request) as data:
            received = time.monotonic()
            content = _object(data)
            picture = _picture(content.get("data"))
            named = content.get("detector_name") or "default"
            name = service.models.get(None if named == "default" else str(named)).name
            wanted = content.get("detect") or {}
            if not isinstance(wanted, dict):
                raise RefusalError(422, "detect: must be an object of label and confidence")
            least = {str(label): _share(value, f"detect.{label}"[:60], most=100.0) for label, value in wanted.items()}
            answer = await _look(request, service, name, picture, received, 0.0 if least else None)
        height, width = answer["height"], answer["width"]
        detections = [
            {"label": found["class_name"], "confidence": 100 * found["score"], "top": y1 / height, "left": x1 / width,
             "bottom": y2 / height, "right": x2 / width}
            for found in answer["detections"]
            for x1, y1, x2, y2 in (found["box"],)
            if _is_wanted(found, least)
        ]  # fmt: skip
        return json_answer({"id": str(content.get("id") or ""), "detections": detections})


# ----------------------------------------------------------------------------------------------------


async def _look(
    request: Request, service: Service, name: str, picture: bytes, received: float, least: float | None
) -> dict[str, Any]:
    """An `ImageAnswer` with what scores at least so much; None: what people are shown."""
    served = service.models.get(name)
    with admit(service, served, 1, None) as ticket:
        work = detect_pictures(service, served, ticket, [picture])
        decoded, rows, decode_s = await unless_gone(request, work)
        answer = image_answer(rows[0], decoded[0], served.card, served.card.shown_score if least is None else least)
        timing_ms(service, request, served, rows, received, {"decode": decode_s})
    return answer


def _is_wanted(found: Mapping[str, Any], least: Mapping[str, float | None]) -> bool:
    """least: score by label, in percent; `*` of all others. Without any, all are wanted."""
    if not least:
        return True
    label = found["class_name"] if found["class_name"] in least else "*"
    return label in least and 100 * found["score"] >= (least[label] or 0.0)


def _share(value: Any, where: str, *, most: float) -> float | None:
    """A number from 0 to `most`, or None where there is none. Raises RefusalError."""
    if value in (None, ""):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= most:
        raise RefusalError(422, f"{where}: must be a number from 0 to {most:g}")
    return number


def _object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise RefusalError(400, "the body is no JSON") from None
    if not isinstance(content, dict):
        raise RefusalError(400, "the body must be a JSON object")
    return content


def _picture(text: Any) -> bytes:
    try:
        picture = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        picture = b""
    if not picture:
        raise RefusalError(422, "data: must be a picture in base64")
    return picture
