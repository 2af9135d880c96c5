"""Random boxes for the IoU loss."""

from __future__ import annotations

import torch

from kernels.ops import iou_loss as ops

KINDS: tuple[ops.Kind, ...] = ("iou", "giou", "diou", "ciou")


def boxes(count: int, g: torch.Generator, kind: str = "boxes") -> torch.Tensor:
    """float32 [count, 4]: of sides 0.1 to 10, of integer corners (many ties and points), or of corners in disorder."""
    corner = torch.rand(count, 2, generator=g) * 10
    other = corner + 0.1 + 9.9 * torch.rand(count, 2, generator=g)
    if kind == "integers":
        return torch.cat((corner // 4, corner // 4 + torch.randint(0, 3, (count, 2), generator=g)), 1)
    return torch.cat((corner, corner[torch.randperm(count, generator=g)] if kind == "disorder" else other), 1)
