"""Detections as JSON and as a picture; the models of these answers are what the OpenAPI document shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, Field

from deploy.core.card import ModelCard
from deploy.core.image import to_original
from deploy.serve.batching import Row
from deploy.serve.decode import Decoded

COLOURS = ("#ffd23f", "#4fd1ff", "#ff7ac6", "#7ee36b", "#ff9d4d", "#c3a6ff", "#3fe0c0", "#ff7d7d", "#b7d7ff", "#e8e27a")

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
    """What went wrong, in one line."""

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


def draw_boxes(pixels: np.ndarray, detections: Sequence[dict[str, Any]]) -> bytes:
    """A JPEG of the picture uint8 [h, w, 3] with its boxes; lowest score first, so that the best is on top.

    Its sides are at most `MAX_JPEG_SIDE`."""
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    side = min(picture.size)
    line, size = max(2, side // 250), max(11, side // 40)
    font = ImageFont.load_default(size)
    for found in reversed(detections):
        colour = COLOURS[found["label"] % len(COLOURS)]
        x1, y1, x2, y2 = found["box"]
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
        text = f"{found['class_name']} {found['score']:.2f}"
        left, top = x1, max(0.0, y1 - size - 4)
        box = draw.textbbox((left + 2, top), text, font=font)
        draw.rectangle((left, top, box[2] + 2, top + size + 4), fill=colour)
        draw.text((left + 2, top), text, font=font, fill="#111")
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return out.getvalue()
