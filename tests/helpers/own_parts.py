"""Parts of a user's own, as import paths name them: small, and some of them wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.detectors.assign import location_points
from compress.detectors.base import DensePrediction, Detector, ImageDetections, Reduce, Targets
from compress.teachers.base import BoxTeacher, Sample, View, final


class Stem(nn.Module):
    """A backbone: three convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c3 = nn.Conv2d(3, width, 8, 8)
        self.c4, self.c5 = (nn.Conv2d(width, width, 2, 2) for _ in range(2))
        self.out_channels = (width, width, width)

    def forward(self, images: Tensor) -> list[Tensor]:
        c3 = self.c3(images).relu()
        c4 = self.c4(c3).relu()
        return [c3, c4, self.c5(c4).relu()]


def stem(width: int) -> Stem:
    return Stem(width)


def unannotated(width):  # type: ignore[no-untyped-def]
    raise AssertionError("must not be called")


class NoWidths(nn.Module):
    pass


class Points(Detector):
    """A dense detector without a head to speak of: distances in strides and class logits by one convolution each."""

    strides = (8, 16, 32)

    def __init__(self, num_classes: int, *, backbone: nn.Module | None = None, width: int = 8, seen: int = 0) -> None:
        super().__init__()
        self.num_classes, self.feature_channels = num_classes, width
        self.backbone = Stem(width) if backbone is None else backbone
        self.logits = nn.Conv2d(width, num_classes, 1)
        self.box_deltas = nn.Conv2d(width, 4, 1)
        self.set_normalisation()

    def features(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.backbone(self.normalise(images))
        return maps

    def predict(self, features: list[Tensor]) -> DensePrediction:
        logits = [self.logits(x) for x in features]
        return DensePrediction(logits, [], self.strides, box_deltas=[F.softplus(self.box_deltas(x)) for x in features])

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        points = location_points(prediction.level_sizes, prediction.strides, prediction.logits[0].device)
        sides = [
            x.flatten(2).transpose(1, 2) * s for x, s in zip(prediction.box_deltas, prediction.strides, strict=True)
        ]
        left_top, right_bottom = torch.cat(sides, 1).chunk(2, -1)
        return torch.cat((points - left_top, points + right_bottom), -1)

    def loss(self, prediction: DensePrediction, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        prediction = prediction.float()
        logits = torch.cat([prediction.class_logits(level) for level in range(3)], 2)  # [B, K, A]
        image, location = (targets.assignment.gt_index >= 0).nonzero(as_tuple=True)
        box = targets.assignment.gt_index[image, location]
        wanted = torch.zeros_like(logits)
        wanted[image, targets.labels[image, box], location] = 1
        boxes = self.decode_boxes(prediction)[image, location]
        return {
            "loss_cls": F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / targets.avg_factor,
            "loss_bbox": F.l1_loss(boxes, targets.boxes[image, box], reduction="sum") / 100 / targets.avg_factor,
        }


class OneBoxAnObject(Points):
    """Says that its boxes need no suppression."""

    has_nms = False


class NoStrides(Detector):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


class Growing(Points):
    """Another model each time."""

    made = 0

    def __init__(self, num_classes: int) -> None:
        type(self).made += 1
        super().__init__(num_classes, width=8 * self.made)


class Fixed(BoxTeacher):
    """Finds one box in every image, of the class that its options name."""

    view = View.ORIGINAL

    def __init__(self, device: torch.device, categories: Mapping[int, str] | None, name: str, score: float) -> None:
        self.sha256, self.settings = "0" * 64, {"name": name}
        self.class_names = (name,)
        self._score = score

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        box, label = torch.tensor([[2.0, 3.0, 20.0, 30.0]]), torch.zeros(1, dtype=torch.int64)
        return [
            final(box, torch.tensor([self._score]), label, size=s.size.original, score_threshold=score_threshold)
            for s in samples
        ]


def points_teacher(device: torch.device, categories: Mapping[int, str] | None, width: int) -> Detector:
    assert categories is not None
    torch.manual_seed(0)
    detector = Points(len(categories), width=width)
    detector.class_names = tuple(categories.values())
    return detector


def nothing(**options: Any) -> dict[str, Any]:
    return options
