"""What a detector gives and takes: the contract between models, methods, the trainer and deployment.

Shape letters of this package: B images, K classes, L levels, h × w the grid of a level, N predictions at a location
(1, or the anchors of a RetinaNet), M = h·w·N, A = all predictions of an image (levels concatenated, row-major, the N of
a location beside each other), G ground-truth boxes, P positives.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.data.batch import Target

if TYPE_CHECKING:
    from compress.detectors.gfl import Reduce, Targets


class Capability(enum.Enum):
    """What a model can give to a distillation method."""

    FEATURES = "features"  # feature pyramid maps
    DENSE = "dense"  # class and box predictions at every location
    DISTRIBUTIONS = "box distributions"  # dense, with every side of a box as a distribution over bins
    BOXES = "boxes"  # final detections


@dataclass
class DensePrediction:
    """Raw output of a dense head, one entry a level.

    logits: float [B, N * K, h, w], before the sigmoid; channel = n * K + class.
    distribution: float [B, 4 * bins, h, w], before the softmax; channel = side * bins + bin, sides in the
        order left, top, right, bottom; bins count in units of the level's stride. Empty for heads without.
    strides: pixels between neighbouring locations; location (x, y) lies at (x * stride, y * stride).
    sides: float [B, N * 4, h, w], boxes of heads without distributions, as their box coder takes them.
    centerness: float [B, 1, h, w], before the sigmoid (FCOS). Empty for heads without.
    anchors: N.
    """

    logits: list[Tensor]
    distribution: list[Tensor]
    strides: tuple[int, ...]
    sides: list[Tensor] = field(default_factory=list)
    centerness: list[Tensor] = field(default_factory=list)
    anchors: int = 1

    def float(self) -> DensePrediction:
        """The same prediction in float32: losses are never computed in half precision."""
        return self._map(Tensor.float)

    def detach(self) -> DensePrediction:
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> DensePrediction:
        names = ("logits", "distribution", "sides", "centerness")
        mapped: dict[str, Any] = {name: [function(x) for x in getattr(self, name)] for name in names}
        return replace(self, **mapped)

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(h, w) of every level."""
        return [(int(x.shape[2]), int(x.shape[3])) for x in self.logits]

    @property
    def counts(self) -> list[int]:
        """M of every level."""
        return [h * w * self.anchors for h, w in self.level_sizes]

    def class_logits(self, level: int) -> Tensor:
        """[B, K, M] of a level."""
        logits = self.logits[level].flatten(2)  # [B, N * K, h * w]
        if self.anchors == 1:
            return logits
        return logits.unflatten(1, (self.anchors, -1)).permute(0, 2, 3, 1).flatten(2)

    def scores(self) -> Tensor:
        """What detections are ranked by, [B, A, K] in 0..1: sigmoid(logits), in FCOS its geometric mean with the
        centerness."""
        logits = torch.cat([self.class_logits(level) for level in range(len(self.logits))], 2).transpose(1, 2)
        if not self.centerness:
            return logits.sigmoid()
        centerness = torch.cat([x.flatten(2) for x in self.centerness], 2).transpose(1, 2)  # [B, A, 1]
        return (logits.sigmoid() * centerness.sigmoid()).sqrt()


@dataclass
class Detections:
    """Final detections of one image: boxes [n, 4] xyxy pixels, scores [n] in 0..1, labels [n] int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Detector(nn.Module):
    """A detector. It implements what its `capabilities` say; students also `assign` and `loss`.

    family: the name that recipes and checkpoints have for it.
    strides: of the maps that `features` gives, in pixels; feature_channels: their width C.
    cells: where a dense head predicts at a location: None for points (one prediction each), else the widths and heights
        of its N anchors in pixels, a level. Two heads are comparable place by place if strides and cells agree.
    mean, std: of RGB pixels 0..255, [1, 3, 1, 1]; what the detector normalises its images with.
    """

    family: str
    capabilities: frozenset[Capability]
    num_classes: int
    strides: tuple[int, ...]
    feature_channels: int
    cells: tuple[tuple[tuple[float, float], ...], ...] | None = None
    mean: Tensor
    std: Tensor

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 images [B, 3, H, W] (RGB), H and W multiples of 32 → pyramid maps [B, C, h, w], one a stride."""
        raise self._lacks(Capability.FEATURES)

    def predict(self, features: list[Tensor]) -> Any:
        """What the head makes of the maps: a `DensePrediction` if the detector has Capability.DENSE."""
        raise self._lacks(Capability.DENSE)

    def forward(self, images: Tensor) -> Any:
        return self.predict(self.features(images))

    def assign(self, prediction: Any, targets: list[Target], reduce: Reduce | None = None) -> Targets:
        """Ground truth of a batch and where it belongs; `reduce` sums over processes."""
        raise TypeError(f"{self.family} cannot be trained here")

    def loss(self, prediction: Any, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Weighted scalars, float32."""
        raise TypeError(f"{self.family} cannot be trained here")

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        """Boxes [B, A, 4] xyxy in pixels of the network image, not clipped."""
        raise self._lacks(Capability.DENSE)

    def decode(
        self,
        prediction: Any,
        targets: list[Target],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Final detections in pixels of each target's original image, best first."""
        raise self._lacks(Capability.BOXES)

    def _lacks(self, capability: Capability) -> TypeError:
        return TypeError(f"{self.family} gives no {capability.value}")
