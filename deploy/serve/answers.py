"""Detections as JSON and as a picture; the models of these answers are what the OpenAPI document shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from deploy.core import detections as core
from deploy.core.canvas import to_original
from deploy.core.card import ModelCard
from deploy.core.draw import draw_boxes
from deploy.serve.batching import Row
from deploy.serve.decode import Decoded

_Number = Annotated[float, Field(ge=0)]


class Detection(BaseModel):
    """One box. `box` is xyxy in pixels of the picture, after it was turned as its EXIF data says."""

    box: Annotated[list[_Number], Field(min_length=4, max_length=4)]
    score: Annotated[float, Field(ge=0, le=1)]
    label: Annotated[int, Field(ge=0)]
    """Index into the model's class names."""
    class_name: str
    category_id: int
    """The dataset's own id of the class."""


class ImageAnswer(BaseModel):
    """Detections of one picture, highest score first."""

    width: int
    height: int
    """Pixels of the picture, turned upright; boxes are in these."""
    orientation: int
    """What it was turned from: 1 to 8 as EXIF counts, 1 for not at all."""
    detections: list[Detection]


class Timing(BaseModel):
    """Milliseconds inside the server."""

    receive: _Number
    decode: _Number
    queue: _Number
    inference: _Number
    total: _Number


class DetectAnswer(BaseModel):
    """The answer of /v1/detect: one entry in `images` for each picture, in their order."""

    model: str
    images: list[ImageAnswer]
    batch: int
    """Images in the call of the runtime that the last picture rode in."""
    timing_ms: Timing
    request_id: str


class ErrorAnswer(BaseModel):
    """Answer to a request that failed: what went wrong, in one line."""

    error: str
    request_id: str


class ModelAnswer(BaseModel):
    """One model of this server."""

    name: str
    ready: bool
    backend: str | None = None
    """What really runs it."""
    card: dict[str, Any] | None = None


def image_answer(row: Row, picture: Decoded, card: ModelCard, min_score: float) -> dict[str, Any]:
    """An `ImageAnswer`. float32 values become the float64 of the same value, so that JSON carries every bit."""
    boxes = to_original(row.boxes, picture.scale, picture.size_hw)
    height, width = picture.size_hw
    return {
        "width": width,
        "height": height,
        "orientation": picture.orientation,
        "detections": [
            {
                "box": box,
                "score": score,
                "label": label,
                "class_name": card.class_names[label],
                "category_id": card.category_ids[label],
            }
            for box, score, label in zip(boxes.tolist(), row.scores.tolist(), row.labels.tolist(), strict=True)
            if score >= min_score
        ],
    }


MAX_JPEG_SIDE = 65_500
"""Pixels; libjpeg writes no larger picture."""


def annotated_jpeg(pixels: np.ndarray, detections: Sequence[dict[str, Any]]) -> bytes:
    """A JPEG of the picture uint8 [h, w, 3] with its boxes; lowest score first, so that the best is on top.

    Its sides are at most `MAX_JPEG_SIDE`."""
    picture = Image.fromarray(pixels)
    draw_boxes(picture, [core.Detection(**found) for found in detections])
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()
