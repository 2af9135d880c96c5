"""Boxes drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

COLORS = ("#ffd23f", "#4fd1ff", "#ff7ac6", "#7ee36b", "#ff9d4d", "#c3a6ff", "#3fe0c0", "#ff7d7d", "#b7d7ff", "#e8e27a")
"""Colors by label; the web page of the server has the same."""


class Labeled(Protocol):
    """A box with what is written beside it: xyxy in pixels, score in 0..1, number and name of the class."""

    @property
    def box(self) -> tuple[float, float, float, float]: ...
    @property
    def score(self) -> float: ...
    @property
    def label(self) -> int: ...
    @property
    def class_name(self) -> str: ...


def draw_boxes(picture: Image.Image, detections: Sequence[Labeled]) -> None:
    """Draw into `picture`, an RGB image; the last one first, so that the best is on top."""
    draw = ImageDraw.Draw(picture)
    side = min(picture.size)
    line, size = max(2, side // 250), max(11, side // 40)
    font = ImageFont.load_default(size)
    for found in reversed(detections):
        color = COLORS[found.label % len(COLORS)]
        x1, y1, x2, y2 = found.box
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=line)
        text = f"{found.class_name} {found.score:.2f}"
        wide = draw.textlength(text, font=font) + 4
        left, top = max(0.0, min(x1, picture.width - wide)), max(0.0, y1 - size - 4)  # as much as fits is readable
        draw.rectangle((left, top, left + wide, top + size + 4), fill=color)
        draw.text((left + 2, top), text, font=font, fill="#111")
