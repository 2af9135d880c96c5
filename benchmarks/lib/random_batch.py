"""Batches of noise, for measurements of speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.config.model import Model
from compress.data.batch import Batch, Target

BOXES = 6  # an image


@dataclass(frozen=True)
class Setting:
    """Models and batch of a column."""

    student: Model
    teacher: Model
    images: int
    size: int  # pixels, height and width
    classes: int


def random_batch(setting: Setting) -> Batch:
    """Noise with `BOXES` boxes an image."""
    generator = torch.Generator().manual_seed(0)
    size = setting.size
    images = torch.randint(0, 256, (setting.images, 3, size, size), generator=generator, dtype=torch.uint8)
    targets = []
    for i in range(setting.images):
        corner = torch.rand(BOXES, 2, generator=generator) * size * 0.6
        side = torch.rand(BOXES, 2, generator=generator) * size * 0.3 + size * 0.08
        targets.append(
            Target(
                boxes=torch.cat((corner, corner + side), 1),
                labels=torch.randint(0, setting.classes, (BOXES,), generator=generator),
                ignore=torch.zeros(BOXES, dtype=torch.bool),
                scores=None,
                image_id=i,
                size=(size, size),
                original_size=(size, size),
            )
        )
    return Batch(images, targets)
