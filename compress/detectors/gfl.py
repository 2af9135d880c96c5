"""GFL, the generalised focal loss detector (Li et al., NeurIPS 2020): FPN, shared head, loss, inference.

Behaviour and constants are those of mmdet 3.3's GFL configuration, so that official checkpoints load and give
the same numbers. One difference: padding is the rounded mean colour in uint8 instead of zero after
normalisation (at most 0.0082 standard deviations away), because a deployed graph sees only the padded image.

Shape letters: see `compress.detectors.base`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.detectors.base import (
    GROUP_WIDTH,
    NO_PROBABILITY,
    REG_MAX,
    STRIDES,
    Capability,
    DensePrediction,
    Detector,
    Reduce,
    Targets,
    decode_level,
)
from compress.detectors.level_norm import LevelNorm, at_level
from kernels.common.distribution import boxes_to_distances, distribution_focal_loss
from kernels.ops.distribution_iou_loss import distribution_iou_loss
from kernels.ops.quality_focal_loss import quality_focal_loss

if TYPE_CHECKING:
    from compress.detectors.backbones import Backbone

BOX_WEIGHT, DFL_WEIGHT, QFL_BETA = 2.0, 0.25, 2.0


class GFL(Detector):
    """Generalised focal loss detector.

    Args:
        num_classes: K.
        backbone: gives C3, C4, C5 of normalised images.
        neck_channels: width of the pyramid and the head, a multiple of 8 (the groups of GroupNorm).
        head_depth: convolutions in each of the two towers.
        head_norm: behind each of them, `group` or `batch`.
        compiled: run the dense loss passes through torch.compile.
    """

    family = "gfl"
    capabilities = Detector.capabilities | {Capability.DISTRIBUTIONS}
    quantizable = True
    weights_labels = True
    ignores_regions = True
    crossable = True
    strides = STRIDES

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        *,
        neck_channels: int = 256,
        head_depth: int = 4,
        head_norm: str = "group",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if neck_channels % GROUP_WIDTH:
            raise ValueError(f"neck_channels must be a multiple of {GROUP_WIDTH}, got {neck_channels}")
        self.num_classes = num_classes
        self.feature_channels = neck_channels
        self.compiled = compiled
        self.backbone = backbone
        self.neck = FPN(backbone.out_channels, neck_channels)
        self.head = GFLHead(num_classes, neck_channels, head_depth, head_norm)
        self.set_normalisation()

    @classmethod
    def build(
        cls, num_classes: int, backbone: Backbone, *, neck_channels: int, head_depth: int, head_norm: str = "group"
    ) -> GFL:
        """Make one with fresh neck and head; see the constructor."""
        return cls(num_classes, backbone, neck_channels=neck_channels, head_depth=head_depth, head_norm=head_norm)

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 RGB images [B, 3, H, W] → P3..P7, each float [B, neck_channels, h, w]."""
        return self.neck(self.backbone(self.normalise(images)))

    def predict(self, features: list[Tensor]) -> DensePrediction:
        logits, distribution = self.head(features)
        return DensePrediction(logits, distribution, STRIDES)

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        """Boxes [B, A, 4] xyxy in pixels of the network image, not clipped."""
        levels = zip(prediction.distribution, prediction.strides, strict=True)
        return torch.cat([decode_level(x) * stride for x, stride in levels], 1)

    def loss(self, prediction: DensePrediction, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Quality focal, GIoU and distribution focal loss: scalars, weighted (1, 2, 0.25), float32."""
        return {name: value.sum() for name, value in self.loss_by_level(prediction, targets, reduce).items()}

    def loss_by_level(
        self, prediction: DensePrediction, targets: Targets, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """Losses as [L] tensors, one entry a level. Formulas: methods of mmdet 3.3 `GFLHead`.

        The class target of a positive location is the IoU of its box, times the score of a pseudo label that has one.
        The box terms are weighted by the best class score of the location and divided by the sum of those
        weights over all processes, at least 1. (mmdet takes the mean over processes before that bound; with
        one process both are the same, with several ours does not depend on their number.)
        """
        prediction = prediction.float()
        L = len(prediction.logits)
        classification, level_of = [], []
        positive_logits, wanted, scores, box_losses = [], [], [], []
        gt_levels = targets.assignment.gt_index.split(prediction.counts, 1)
        valid_levels = targets.assignment.valid.split(prediction.counts, 1)
        unknown_levels = None if targets.unknown is None else targets.unknown.split(prediction.counts, 2)
        for level, stride in enumerate(prediction.strides):
            logits = prediction.logits[level].flatten(2)  # [B, K, M]
            if unknown_levels is not None:  # a probability of 0 where it should be 0: no loss, no gradient
                logits = logits.masked_fill(unknown_levels[level], NO_PROBABILITY)
            M, w = logits.shape[2], prediction.logits[level].shape[3]
            gt = gt_levels[level]
            b, m = (gt >= 0).nonzero(as_tuple=True)  # [P]
            box = targets.boxes[b, gt[b, m]] / stride
            label = targets.labels[b, gt[b, m]]
            point = torch.stack((m % w, m // w), -1).to(box.dtype)  # stride units
            side_logits = prediction.distribution[level].flatten(2)[b, :, m].view(-1, 4, REG_MAX + 1)  # [P, 4, R]
            score = logits.detach()[b, :, m].amax(1).sigmoid()
            box_loss, quality = distribution_iou_loss(side_logits, point, box, score)
            if targets.scores is not None:
                quality = quality * targets.scores[b, gt[b, m]]
            weight = valid_levels[level].to(logits.dtype)
            classification.append(
                quality_focal_loss(logits, b * M + m, label, quality, weight, beta=QFL_BETA, compiled=self.compiled)
            )
            scores.append(score)
            box_losses.append(box_loss)
            positive_logits.append(side_logits)
            wanted.append(boxes_to_distances(point, box, limit=REG_MAX - 0.1))
            level_of.append(torch.full_like(b, level))

        weight = torch.cat(scores)
        total = weight.sum()[None]
        if reduce is not None:
            total = reduce(total)
        total = total.clamp(min=1) / targets.world_size
        sides = torch.cat(wanted).flatten()
        dfl_rows = distribution_focal_loss(torch.cat(positive_logits).flatten(0, 1), sides).view(-1, 4).sum(1) / 4
        levels = torch.cat(level_of)
        zero = weight.new_zeros(L)
        return {
            "loss_cls": torch.stack(classification) / (targets.avg_factor + torch.finfo(torch.float32).eps),
            "loss_bbox": BOX_WEIGHT * torch.stack(box_losses) / total,
            "loss_dfl": DFL_WEIGHT * zero.index_add(0, levels, dfl_rows * weight) / total,
        }


class FPN(nn.Module):
    """C3, C4, C5 → P3..P7. Extra levels are strided convolutions of the outputs, with no ReLU between."""

    def __init__(self, in_channels: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        strides = (1, 1, 1, 2, 2)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, s, 1) for s in strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        lateral = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (1, 0):
            lateral[i] = lateral[i] + F.interpolate(lateral[i + 1], size=lateral[i].shape[2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, lateral, strict=False)]
        for conv in self.fpn_convs[3:]:
            outputs.append(_in_float32(conv, outputs[-1]) if torch.is_autocast_enabled("cpu") else conv(outputs[-1]))
        return outputs


def _in_float32(conv: nn.Module, x: Tensor) -> Tensor:
    """bfloat16 convolutions of 1 × 1 maps are wrong on the CPU (torch 2.15, channels last); these maps are tiny."""
    with torch.autocast("cpu", enabled=False):
        result: Tensor = conv(x.float())
    return result


class GFLHead(nn.Module):
    """Two towers shared by all levels, a joint class-quality branch and a distribution branch."""

    def __init__(self, num_classes: int, channels: int, depth: int, norm: str) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList(ConvNorm(channels, norm) for _ in range(depth))
        self.reg_convs = nn.ModuleList(ConvNorm(channels, norm) for _ in range(depth))
        self.gfl_cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(channels, 4 * (REG_MAX + 1), 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in STRIDES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.gfl_cls.bias is not None
        nn.init.constant_(self.gfl_cls.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, distribution = [], []
        for level, (x, scale) in enumerate(zip(features, self.scales, strict=True)):
            classes = sides = x
            for conv in self.cls_convs:
                classes = conv(classes, level)
            for conv in self.reg_convs:
                sides = conv(sides, level)
            logits.append(self.gfl_cls(classes))
            distribution.append(scale(self.gfl_reg(sides)))
        return logits, distribution


class ConvNorm(nn.Module):
    """3×3 convolution without bias, norm, ReLU, for maps [B, channels, h, w] of any level.

    norm: `group` (8 channels a group: mmdet's 32 groups at 256 channels) or `batch` (`LevelNorm`).
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        if norm == "batch":
            self.bn = LevelNorm(channels)
        else:
            self.gn = nn.GroupNorm(channels // GROUP_WIDTH, channels)

    @property
    def norm(self) -> nn.Module:
        """The norm, which runs once a level."""
        return self.gn if hasattr(self, "gn") else self.bn

    def normalised(self, x: Tensor, level: int) -> Tensor:
        """What the ReLU takes."""
        return at_level((self.conv, self.norm), x, level)

    def forward(self, x: Tensor, level: int) -> Tensor:
        return F.relu(self.normalised(x, level))


class Scale(nn.Module):
    """One learnable factor, initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale
