"""A picture as a foreign network takes it: `prepare`, from an `OnnxInput`, as arithmetic on arrays.

Libraries resize differently, and a network notices. `resized` has the three filters that detectors are run with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from compress.config.teacher import OnnxInput
from compress.teachers.base import Preprocessing
from deploy.core.canvas import fit_size, resize

KEEP_RATIO_MULTIPLE = 32
OPENCV_ONE = 2048
"""OpenCV's weights are whole numbers, of which two make this sum."""


@dataclass(frozen=True)
class Placed:
    """Place of an image on the network's canvas.

    canvas: (height, width). scale: canvas pixels per image pixel, (x, y). offset: of the image's corner, (x, y).
    """

    canvas: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int] = (0, 0)


def prepare(image: np.ndarray, how: OnnxInput, size: tuple[int, int]) -> tuple[np.ndarray, Placed]:
    """An RGB image uint8 [h, w, 3] as a network takes it: float32 [1, 3, H, W], or [1, H, W, 3] for nhwc."""
    height, width = image.shape[:2]
    canvas, inside = size, size
    if how.resize == "keep_ratio":
        inside = fit_size(height, width, short=size[0], long=size[1])
        canvas = tuple(-(-side // KEEP_RATIO_MULTIPLE) * KEEP_RATIO_MULTIPLE for side in inside)  # type: ignore[assignment]
    elif how.resize != "stretch":
        factor = min(size[0] / height, size[1] / width)
        inside = _side(height * factor, size[0], how.rounding), _side(width * factor, size[1], how.rounding)
    left, top = 0, 0
    if how.resize == "letterbox_center":
        left, top = (canvas[1] - inside[1]) // 2, (canvas[0] - inside[0]) // 2
    pixels = np.full((*canvas, 3), how.pad_color, np.float32)
    pixels[top : top + inside[0], left : left + inside[1]] = resized(image, inside, how.filter)
    if how.color == "bgr":
        pixels = pixels[..., ::-1]
    normalised = (pixels / how.divide_by - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    axes = (0, 1, 2) if how.layout == "nhwc" else (2, 0, 1)
    placed = Placed(canvas, (inside[1] / width, inside[0] / height), (left, top))
    return np.ascontiguousarray(normalised.transpose(axes)[None], np.float32), placed


def resized(image: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """An image uint8 [h, w, 3] in `size` (height, width): uint8, or float32 in 0..255 for `torch`.

    filter: `pillow`, `opencv` or `torch`, see `compress.config.teacher.OnnxInput.filter`.
    """
    if image.shape[:2] == size:
        return image
    if filter == "opencv":
        return opencv_linear(image, size)
    if filter == "torch":
        planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        return F.interpolate(planes, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    return resize(image, size)


def opencv_linear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`cv2.resize(image, ..., interpolation=cv2.INTER_LINEAR)` of uint8 [h, w, c], to the bit: whole numbers with
    weights of 11 bits, and the mean of four pixels where both sides are halved."""
    (height, width), source = size, image.astype(np.int32)
    if image.shape[:2] == (2 * height, 2 * width):
        four = source[0::2, 0::2] + source[1::2, 0::2] + source[0::2, 1::2] + source[1::2, 1::2]
        return ((four + 2) >> 2).astype(np.uint8)
    (first, second), (near, far) = _taps(image.shape[1], width)
    left_of_it, right_of_it = first < 0, first >= image.shape[1] - 1
    near, far = np.where(left_of_it | right_of_it, OPENCV_ONE, near), np.where(left_of_it | right_of_it, 0, far)
    first, second = (place.clip(0, image.shape[1] - 1) for place in (first, second))
    rows = (source[:, first] * near[:, None] + source[:, second] * far[:, None]) >> 4
    (first, second), (near, far) = _taps(image.shape[0], height)
    first, second = (place.clip(0, image.shape[0] - 1) for place in (first, second))
    total = ((rows[first] * near[:, None, None]) >> 16) + ((rows[second] * far[:, None, None]) >> 16)
    return ((total + 2) >> 2).clip(0, 255).astype(np.uint8)


def described(how: OnnxInput, size: tuple[int, int]) -> Preprocessing:
    """The same for people."""
    height, width = size
    words = {
        "letterbox": f"letterbox to {width} x {height}",
        "letterbox_center": f"letterbox to {width} x {height}, centred",
        "stretch": f"stretched to {width} x {height}",
        "keep_ratio": f"short side {height}, long side {width}",
    }
    by = {"pillow": "", "opencv": ", as OpenCV resizes", "torch": ", without antialiasing"}
    mean, std = (tuple(value * how.divide_by for value in values) for values in (how.mean, how.std))
    return Preprocessing(words[how.resize] + by[how.filter], how.color.upper(), mean, std)


# --- details --------------------------------------------------------------------------------------------


def _side(side: float, most: int, rounding: str) -> int:
    whole = {"nearest": int(side + 0.5), "even": round(side), "down": int(side)}[rounding]
    return min(max(whole, 1), most)


def _taps(source: int, target: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The two source pixels that each target pixel lies between, which may be beyond the edge, and their weights."""
    place = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    near, far = (np.rint(part * np.float32(OPENCV_ONE)).astype(np.int32) for part in (np.float32(1) - share, share))
    return (first, first + 1), (near, far)
