"""Shared parts of the detectors built of torchvision's modules: pixels to maps, the pyramid, grids of anchors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from compress.data.batch import Target
from compress.detectors.base import GROUP_WIDTH, MEAN, STD, Detector, ImageDetections, ImageSize, Reduce, pad_targets

IMAGENET = (MEAN, STD)


class Body(nn.Module):
    """A body of torchvision's detectors, which gives maps by name, as a list of maps."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.body(images).values())

    all_maps = forward


class Pyramid(nn.Module):
    """torchvision's feature pyramid, from a list of maps to a list of maps."""

    def __init__(self, fpn: FeaturePyramidNetwork) -> None:
        super().__init__()
        self.fpn = fpn

    @classmethod
    def build(cls, in_channels: Sequence[int], channels: int, extra: ExtraFPNBlock | None) -> Pyramid:
        return cls(FeaturePyramidNetwork(list(in_channels), channels, extra_blocks=extra))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(self.fpn(OrderedDict((str(index), x) for index, x in enumerate(maps))).values())


class TorchvisionDetector(Detector):
    """Holds backbone and pyramid.

    Args:
        normalisation: mean and standard deviation of RGB pixels 0..255.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module,
        neck: Pyramid,
        normalisation: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = neck
        self.feature_channels = int(neck.fpn.layer_blocks[0][0].out_channels)
        self.set_normalisation(*normalisation)


def group_norm(channels: int) -> nn.GroupNorm:
    """8 channels a group: torchvision's 32 groups at 256 channels, and groups that mean something in narrow heads."""
    return nn.GroupNorm(channels // GROUP_WIDTH, channels)


def grid_anchors(base_anchors: Sequence[Tensor], level_sizes: Sequence[tuple[int, int]], stride: int) -> list[Tensor]:
    """Anchors as torchvision's AnchorGenerator gives them for an image: float32 [M, 4] xyxy in pixels, a level.

    The distance between locations is the side of the image divided by that of the grid, rounded down: less than the
    level's stride where a grid covers more than the image.

    Args:
        base_anchors: anchors around (0, 0), [N, 4] a level.
        level_sizes: (h, w) of every level.
        stride: of the first level, which divides the image.
    """
    height, width = (side * stride for side in level_sizes[0])
    levels = []
    for base, (h, w) in zip(base_anchors, level_sizes, strict=True):
        y, x = torch.meshgrid(
            torch.arange(h, device=base.device) * (height // h),
            torch.arange(w, device=base.device) * (width // w),
            indexing="ij",
        )
        shift = torch.stack((x, y, x, y), -1).view(-1, 1, 4)
        levels.append((shift + base).view(-1, 4))
    return levels


def anchor_sizes(base_anchors: Sequence[Tensor]) -> tuple[tuple[tuple[float, float], ...], ...]:
    """`Detector.anchor_sizes` of anchors around (0, 0)."""
    return tuple(tuple((float(x2 - x1), float(y2 - y1)) for x1, y1, x2, y2 in base.tolist()) for base in base_anchors)


def pad_labelled(targets: Sequence[Target], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad targets without crowd boxes, which torchvision's losses do not know: what they cover is background."""
    kept = [
        replace(t, boxes=t.boxes[~t.ignore], labels=t.labels[~t.ignore], ignore=t.ignore[~t.ignore]) for t in targets
    ]
    return pad_targets(kept, device)


def per_image(boxes: Tensor, labels: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    """Padded ground truth as torchvision's losses take it."""
    return [{"boxes": b[m], "labels": c[m]} for b, c, m in zip(boxes, labels, mask, strict=True)]


def summed(value: Tensor, reduce: Reduce | None) -> tuple[Tensor, int]:
    """`value` summed over processes, and their number."""
    return (value, 1) if reduce is None else (reduce(value), dist.get_world_size())


def in_original_pixels(found: Sequence[dict[str, Tensor]], sizes: Sequence[ImageSize]) -> list[ImageDetections]:
    """torchvision's detections in the network image → ours in the image file."""
    return [
        ImageDetections(resize_boxes(row["boxes"], size.network, size.original), row["scores"], row["labels"])
        for row, size in zip(found, sizes, strict=True)
    ]
