"""Fit pictures onto the network's canvas, and boxes back to pixels of the picture: one rule of sizes, one filter."""

from __future__ import annotations

import numpy as np
from PIL import Image

from deploy.core.card import ModelCard


def fit_size(
    height: int,
    width: int,
    *,
    short: int | None = None,
    long: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The largest (height, width) of the same ratio within all limits; a side is int(side * f + 0.5), at least 1.

    Args:
        short, long: limits of the shorter and of the longer side, pixels.
        canvas: (height, width) that the result has to lie in.

    >>> fit_size(480, 640, short=800, long=1333)
    (800, 1067)
    """
    factors = []
    if canvas is not None:
        factors += [canvas[0] / height, canvas[1] / width]
    if short is not None:
        factors.append(short / min(height, width))
    if long is not None:
        factors.append(long / max(height, width))
    factor = min(factors)
    size = (max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1))
    return size if canvas is None else (min(size[0], canvas[0]), min(size[1], canvas[1]))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """RGB uint8 [h, w, 3] at (height, width): Pillow's bilinear filter, which averages where it makes smaller.

    Returns an array that may be written to; the image itself where it has this size.
    """
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def fit_canvas(image: np.ndarray, card: ModelCard) -> tuple[np.ndarray, tuple[float, float]]:
    """`letterbox` with the canvas, the limits and the padding of `card`."""
    return letterbox(image, card.input_size, card.pad_color, short=card.short, long=card.long)


def letterbox(
    image: np.ndarray,
    size_hw: tuple[int, int],
    pad_color: tuple[int, int, int],
    *,
    short: int | None = None,
    long: int | None = None,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Fit an RGB uint8 image [h, w, 3] into a canvas uint8 [3, H, W]; return it with its scale (sx, sy).

    The image keeps its ratio (`fit_size`, `resize`); the rest, right and bottom, is `pad_color`. The scale is canvas
    pixels per image pixel on each axis; the two differ a little, because each side is rounded.
    """
    (height, width), (canvas_height, canvas_width) = image.shape[:2], size_hw
    new_height, new_width = fit_size(height, width, short=short, long=long, canvas=size_hw)
    canvas = np.empty((3, canvas_height, canvas_width), dtype=np.uint8)
    canvas[:] = np.asarray(pad_color, dtype=np.uint8)[:, None, None]
    canvas[:, :new_height, :new_width] = resize(image, (new_height, new_width)).transpose(2, 0, 1)
    return canvas, (new_width / width, new_height / height)


def to_original(boxes: np.ndarray, scale: tuple[float, float], original_hw: tuple[int, int]) -> np.ndarray:
    """Canvas boxes xyxy [n, 4] in pixels of the original image, clipped to it. Float32."""
    sx, sy = scale
    height, width = original_hw
    boxes = boxes / np.asarray([sx, sy, sx, sy], dtype=np.float32)
    return np.clip(boxes, 0.0, np.asarray([width, height, width, height], dtype=np.float32)).astype(np.float32)
