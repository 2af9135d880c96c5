"""Inputs of the tests of feature methods: outputs that are only pyramid maps, and a batch that is only boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from compress.data.batch import Batch, Target
from compress.detectors.base import DensePrediction
from compress.detectors.gfl import GFL
from compress.distill.method import Outputs

SIZES = ((5, 7), (3, 4))


def maps(channels: int, seed: int, *, images: int = 2, grad: bool = False) -> list[Tensor]:
    """Random maps of two levels, float32 [images, channels, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, *size, generator=generator).requires_grad_(grad) for size in SIZES]


def outputs(features: list[Tensor], certainty: list[Tensor] | None = None) -> Outputs:
    return Outputs(features, DensePrediction([], [], (8, 16)), cast(GFL, None), certainty=certainty)


def certainties(value: float | None = None, *, images: int = 2, seed: int = 3) -> list[Tensor]:
    """[images, h, w] of each level: constant, or random with mean 1."""
    if value is not None:
        return [torch.full((images, *size), value) for size in SIZES]
    generator = torch.Generator().manual_seed(seed)
    random = [torch.rand(images, *size, generator=generator) for size in SIZES]
    return [x / x.mean() for x in random]


def batch(
    boxes: Sequence[Sequence[Sequence[float]]],
    sizes: Sequence[Sequence[int]],
    *,
    ignore: Sequence[Sequence[bool]] | None = None,
    padded: tuple[int, int] = (32, 64),
) -> Batch:
    """boxes: an image each xyxy in pixels; sizes: (height, width) of each image; padded: of the batch."""
    targets = []
    for i, (image_boxes, (h, w)) in enumerate(zip(boxes, sizes, strict=True)):
        n = len(image_boxes)
        crowd = torch.zeros(n, dtype=torch.bool) if ignore is None else torch.tensor(ignore[i], dtype=torch.bool)
        rows = torch.tensor(image_boxes, dtype=torch.float32).reshape(n, 4)
        targets.append(Target(rows, torch.zeros(n, dtype=torch.int64), crowd, None, i, (h, w), (h, w)))
    return Batch(torch.zeros(len(targets), 3, *padded, dtype=torch.uint8), targets)


EMPTY = batch([[], []], [(32, 64), (32, 64)])
