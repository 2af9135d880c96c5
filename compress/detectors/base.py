"""What a detector gives and takes: the contract between models, methods, the trainer and deployment.

Shape letters of this package: B images, K classes, L levels, h × w the grid of a level, M = h·w,
A = all locations of an image (levels concatenated, row-major), G ground-truth boxes, P positives.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from compress.data.batch import Target


class Capability(enum.Enum):
    """What a model can give to a distillation method."""

    FEATURES = "features"  # feature pyramid maps
    DENSE = "dense"  # class and box predictions at every location
    BOXES = "boxes"  # final detections


@dataclass
class DensePrediction:
    """Raw output of a dense head, one entry a level.

    logits: float [B, K, h, w], before the sigmoid.
    distribution: float [B, 4 * bins, h, w], before the softmax; channel = side * bins + bin, sides in the
        order left, top, right, bottom; bins count in units of the level's stride.
    strides: pixels between neighbouring locations; location (x, y) lies at (x * stride, y * stride).
    """

    logits: list[Tensor]
    distribution: list[Tensor]
    strides: tuple[int, ...]

    def float(self) -> DensePrediction:
        """The same prediction in float32: losses are never computed in half precision."""
        return DensePrediction([x.float() for x in self.logits], [x.float() for x in self.distribution], self.strides)

    def detach(self) -> DensePrediction:
        return DensePrediction([x.detach() for x in self.logits], [x.detach() for x in self.distribution], self.strides)

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(h, w) of every level."""
        return [(int(x.shape[2]), int(x.shape[3])) for x in self.logits]


@dataclass
class Detections:
    """Final detections of one image: boxes [n, 4] xyxy pixels, scores [n] in 0..1, labels [n] int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@runtime_checkable
class Detector(Protocol):
    """A dense detector. A foreign one implements what its `capabilities` say and nothing else."""

    num_classes: int
    strides: tuple[int, ...]

    @property
    def capabilities(self) -> frozenset[Capability]: ...

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 images [B, 3, H, W] (RGB) → pyramid maps [B, C, h, w], one a stride."""

    def predict(self, features: list[Tensor]) -> DensePrediction: ...

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        """Boxes [B, A, 4] xyxy in pixels of the network image, not clipped."""

    def decode(self, prediction: DensePrediction, targets: list[Target]) -> list[Detections]:
        """Final detections in pixels of each target's original image."""
