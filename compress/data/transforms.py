"""Image and box transforms, uint8 from end to end (normalisation belongs to the model, on its device).

Built from torchvision's v2 functions; image and boxes are wrapped as tv_tensors for the geometry, so that
torchvision moves both by the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from compress.data.coco import Transform
from deploy.core.canvas import fit_size
from deploy.core.canvas import resize as resize_pixels
from deploy.core.card import PAD_COLOR

MIN_KEPT = 0.3
"""After zooming in, a box of which less than this share is left is no target any more, but background."""


def train_transform(
    short: int | tuple[int, int],
    long: int,
    flip: float = 0.5,
    photometric: bool = False,
    scale_jitter: tuple[float, float] | None = None,
) -> Transform:
    """Zoom and crop (optional), colour (optional), keep-ratio resize, horizontal flip.

    Args:
        short: the shorter side's limit in pixels; a pair is a closed range to draw from for every image.
        long: the longer side's limit in pixels.
        flip: probability of a horizontal flip.
        photometric: brightness, contrast, saturation, hue and channel order, each at random (as SSD does).
        scale_jitter: a range (low, high) to draw a zoom factor from, log-uniform. Above 1 a random window of
            the image fills the frame; below 1 the image lies at a random place on a larger padded canvas.
    """
    low, high = (short, short) if isinstance(short, int) else short
    return _Train(low, high, long, flip, v2.RandomPhotometricDistort() if photometric else None, scale_jitter)


def eval_transform(short: int, long: int, canvas: tuple[int, int] | None = None) -> Transform:
    """Keep-ratio resize only, by the function that fits pictures for exported files: the same pixels to the bit.

    canvas: (height, width) that the image has to lie in besides.
    """
    return _Eval(short, long, canvas)


@dataclass(frozen=True)
class _Train:
    """A class, because spawned workers cannot pickle a closure. Chance: torch's global generator."""

    low: int
    high: int
    long: int
    flip: float
    distort: v2.Transform | None
    zoom: tuple[float, float] | None

    def __call__(self, image: Tensor, boxes: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes = _wrap(boxes, image)
        if self.zoom is not None:
            image, boxes, ignore = random_zoom(image, boxes, ignore, self.zoom)
        if self.distort is not None:
            image = self.distort(image)
        short = self.low if self.low == self.high else int(torch.randint(self.low, self.high + 1, ()))
        size = fit_size(image.shape[1], image.shape[2], short=short, long=self.long)
        image, boxes = resize(image, boxes, size)
        if self.flip > 0 and torch.rand(()) < self.flip:
            image, boxes = horizontal_flip(image, boxes)
        return image, F.clamp_bounding_boxes(boxes).as_subclass(Tensor), ignore

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size gets at most; the zoom leaves the frame as it is."""
        return fit_size(height, width, short=self.high, long=self.long)

    def outcomes(self) -> float:
        """How many different images this can make of one; infinity: countless."""
        if self.distort is not None or self.zoom is not None:
            return math.inf
        return (self.high - self.low + 1) * (2 if 0 < self.flip < 1 else 1)


@dataclass(frozen=True)
class _Eval:
    short: int
    long: int
    canvas: tuple[int, int] | None

    def __call__(self, image: Tensor, boxes: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.largest(image.shape[1], image.shape[2])
        moved = _as_boxes(F.resize(_wrap(boxes, image), list(size)))
        return resize_exactly(image, size), F.clamp_bounding_boxes(moved).as_subclass(Tensor), ignore

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size gets."""
        return fit_size(height, width, short=self.short, long=self.long, canvas=self.canvas)

    def outcomes(self) -> float:
        return 1


def resize_exactly(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`deploy.core.canvas.resize` of an image uint8 [3, h, w]."""
    pixels = resize_pixels(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), size)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, boxes: BoundingBoxes, size: tuple[int, int]) -> tuple[Tensor, BoundingBoxes]:
    """Bilinear with antialiasing, in uint8; boxes scale by new / old of each axis.

    This is for training's steps alone. It takes a seventh of the time of `resize_exactly`, from which a pixel differs
    by one level of 255 where it rounds the other way, and by two at the most.
    """
    return F.resize_image(image, list(size), antialias=True), _as_boxes(F.resize(boxes, list(size)))


def horizontal_flip(image: Tensor, boxes: BoundingBoxes) -> tuple[Tensor, BoundingBoxes]:
    """x becomes width - x."""
    return F.horizontal_flip_image(image), _as_boxes(F.horizontal_flip(boxes))


def random_zoom(
    image: Tensor, boxes: BoundingBoxes, ignore: Tensor, factors: tuple[float, float]
) -> tuple[Tensor, BoundingBoxes, Tensor]:
    """Cut a window out of the image, or lay the image on a larger canvas of `PAD_COLOR`; same aspect ratio.

    Boxes are cut at the window. One that keeps less than `MIN_KEPT` of its area is set to ignore; one that
    keeps nothing comes back empty.
    """
    height, width = image.shape[1:]
    factor = math.exp(float(torch.empty(()).uniform_(math.log(factors[0]), math.log(factors[1]))))
    rows, columns = max(1, round(height / factor)), max(1, round(width / factor))
    down, across = torch.rand(2).tolist()
    # Zooming out, `height - rows` is negative: the window starts above and left of the image.
    top, left = round(down * (height - rows)), round(across * (width - columns))
    if factor >= 1:
        image = F.crop_image(image, top, left, rows, columns)
    else:
        right, bottom = columns - width + left, rows - height + top
        image = F.pad_image(image, [-left, -top, right, bottom], fill=list(PAD_COLOR))
    before = boxes.as_subclass(Tensor)
    area = (before[:, 2] - before[:, 0]) * (before[:, 3] - before[:, 1])
    moved = before - before.new_tensor((left, top, left, top))
    moved[:, 0::2] = moved[:, 0::2].clamp(0, columns)
    moved[:, 1::2] = moved[:, 1::2].clamp(0, rows)
    kept = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1])
    return image, _wrap(moved, image), ignore | (kept < MIN_KEPT * area)


def _wrap(boxes: Tensor, image: Tensor) -> BoundingBoxes:
    canvas = (image.shape[1], image.shape[2])
    return BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=canvas)


def _as_boxes(value: object) -> BoundingBoxes:
    assert isinstance(value, BoundingBoxes)
    return value
