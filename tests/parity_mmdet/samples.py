"""Random images with boxes of every size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.data.batch import Target

CLASSES = 80
ORIGINAL_SCALE = 1.7


def sample(index: int, size: tuple[int, int]) -> tuple[Tensor, Target]:
    """A smooth random image, and boxes of all sizes from 2 pixels to the whole image; the third image has none."""
    generator = torch.Generator().manual_seed(index)
    height, width = size
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    image = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)[0]
    image = (image * 255 + 20 * torch.randn(image.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    n = 0 if index == 2 else 24
    extent = torch.tensor([width, height])
    # Up to 0.97 of the image: boxes that fill it have centres at equal distance from several anchors, and of equal
    # distances neither implementation promises which counts as one of the nine nearest.
    sides = torch.exp2(1 + torch.rand(n, 2, generator=generator) * torch.log2(0.485 * extent))
    corner = torch.rand(n, 2, generator=generator) * (extent - sides)
    target = Target(
        boxes=torch.cat((corner, corner + sides), 1),
        labels=torch.randint(CLASSES, (n,), generator=generator),
        ignore=torch.rand(n, generator=generator) < 0.1,
        scores=None,
        image_id=index,
        size=size,
        original_size=(round(height * ORIGINAL_SCALE), round(width * ORIGINAL_SCALE)),
    )
    return image, target
