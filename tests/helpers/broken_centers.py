"""Copies of the example detector with one fault each, of the kinds that people make: FAULTS, class → failing check."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data.batch import Target
from compress.detectors.base import DensePrediction, ImageDetections, ImageSize, Reduce
from examples.own_detector.centers import Centers, CenterTargets


class WrongStride(Centers):
    strides = (16,)


class FixedSize(Centers):
    """Knows where it is by an embedding of one image size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.place = nn.Parameter(torch.zeros(1, self.feature_channels, 12, 16))

    def features(self, images: Tensor) -> list[Tensor]:
        return [super().features(images)[0] + self.place]


class BackgroundClass(Centers):
    """One logit more than there are classes, as heads with softmax have it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.heat[1] = nn.Conv2d(self.feature_channels, num_classes + 1, 1)


class CornerAndSize(Centers):
    """x, y, width, height."""

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        boxes = super().decode_boxes(prediction)
        return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), -1)


class InStrides(Centers):
    """Cells of the map instead of pixels."""

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        return super().decode_boxes(prediction) / 8


class RowsFirst(Centers):
    """y before x."""

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        return super().decode_boxes(prediction)[..., [1, 0, 3, 2]]


class MixedImages(Centers):
    """Takes the mean over the batch in eval mode, too."""

    def features(self, images: Tensor) -> list[Tensor]:
        (x,) = super().features(images)
        return [x - x.mean((0, 2, 3), keepdim=True)]


class RestlessDropout(Centers):
    """Drops in eval mode, too."""

    def features(self, images: Tensor) -> list[Tensor]:
        (x,) = super().features(images)
        return [F.dropout(x, 0.1, training=True)]


class MissingGradient(Centers):
    """The size branch is cut off."""

    def predict(self, features: list[Tensor]) -> DensePrediction:
        prediction = super().predict(features)
        prediction.box_deltas = [x.detach() for x in prediction.box_deltas]
        return prediction


class LossPerImage(Centers):
    """Not reduced."""

    def loss(
        self, prediction: DensePrediction, targets: CenterTargets, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        return {key: value.expand(2) for key, value in super().loss(prediction, targets, reduce).items()}


class NoObjectNoLoss(Centers):
    """Divides by the number of objects."""

    def assign(self, prediction: DensePrediction, targets: list[Target], reduce: Reduce | None = None) -> CenterTargets:
        found = super().assign(prediction, targets, reduce)
        found.avg_factor = torch.tensor(float(len(found.boxes)))
        return found


class ShiftedTargets(Centers):
    """Learns boxes three cells beside those that it says."""

    def assign(self, prediction: DensePrediction, targets: list[Target], reduce: Reduce | None = None) -> CenterTargets:
        found = super().assign(prediction, targets, reduce)
        found.boxes = found.boxes + 40
        return found


class NextClass(Centers):
    """Labels that count from 1 in training and from 0 afterwards."""

    def assign(self, prediction: DensePrediction, targets: list[Target], reduce: Reduce | None = None) -> CenterTargets:
        found = super().assign(prediction, targets, reduce)
        found.heat = found.heat.roll(1, 1)
        return found


class NetworkPixels(Centers):
    """Forgets to go back to the pixels of the file."""

    def decode(self, prediction: DensePrediction, sizes: Sequence[ImageSize], **settings: Any) -> list[ImageDetections]:
        return super().decode(prediction, [ImageSize(size.network, size.network) for size in sizes], **settings)


class HoldsALock(Centers):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.lock = threading.Lock()


class ForgottenState(Centers):
    """A running mean that is a plain tensor, not a buffer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.level = torch.zeros(1)

    def features(self, images: Tensor) -> list[Tensor]:
        (x,) = super().features(images)
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().mean()
        return [x - self.level]


class OwnDice(Centers):
    """Random numbers of its own, which no checkpoint holds."""

    def features(self, images: Tensor) -> list[Tensor]:
        (x,) = super().features(images)
        if self.training:
            dice = self.__dict__.setdefault("dice", torch.Generator().manual_seed(0))
            x = x * (1 + 0.1 * torch.randn(1, generator=dice))
        return [x]


class FrozenBatch(Centers):
    """Goes through the images one by one, which a graph cannot for batches of any size."""

    def predict(self, features: list[Tensor]) -> DensePrediction:
        (x,) = features
        parts = [super(FrozenBatch, self).predict([image[None]]) for image in x.unbind(0)]
        logits = torch.cat([part.logits[0] for part in parts])
        return DensePrediction(
            [logits], [], self.strides, box_deltas=[torch.cat([part.box_deltas[0] for part in parts])]
        )


FAULTS = {
    WrongStride: "shapes",
    FixedSize: "shapes",
    BackgroundClass: "prediction",
    CornerAndSize: "boxes",
    InStrides: "boxes",
    RowsFirst: "boxes",
    MixedImages: "independence",
    RestlessDropout: "independence",
    MissingGradient: "loss",
    LossPerImage: "loss",
    NoObjectNoLoss: "empty images",
    ShiftedTargets: "learning",
    NextClass: "learning",
    NetworkPixels: "decoding",
    HoldsALock: "copies",
    ForgottenState: "saving",
    OwnDice: "resuming",
    FrozenBatch: "export",
}
