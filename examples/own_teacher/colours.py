"""A teacher without a network: things of a known colour, found by a threshold and connected components.

Enough to label dyed cells, cones on grass or parts on a belt, and to show how little `compress` asks of a teacher. It
gives boxes and nothing else, so it can label images (`pseudo_labels`), not teach features. In a recipe:

    pseudo_labels:
      teachers:
        - custom: {factory: "examples.own_teacher.colours:Colours", options: {classes: {red square: [220, 30, 30]}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.detectors.base import Capability, ImageDetections
from compress.teachers.base import Sample, View, final, original


class Colours:
    """Boxes around areas of a colour. The score is the share of the box that has the colour.

    Args:
        classes: class name → (red, green, blue), 0..255.
        tolerance: largest difference of each channel.
        smallest: area in pixels below which a spot is noise.
        device: where to compute.
        categories: the data's classes by id; not needed here.
    """

    file = "colours"
    capabilities = frozenset({Capability.BOXES})
    detector = None
    view = View.ORIGINAL
    preprocessing = None

    def __init__(
        self,
        *,
        classes: Mapping[str, Sequence[int]],
        tolerance: int = 40,
        smallest: int = 16,
        device: torch.device | str = "cpu",
        categories: Mapping[int, str] | None = None,
    ) -> None:
        self.class_names: tuple[str, ...] = tuple(classes)
        self.settings: Mapping[str, Any] = {
            "classes": {name: list(colour) for name, colour in classes.items()},
            "tolerance": tolerance,
            "smallest": smallest,
        }
        self.sha256 = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self._colours = torch.tensor([list(colour) for colour in classes.values()], device=device)  # [K, 3]
        self._tolerance, self._smallest = tolerance, smallest

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        """Accept any image."""
        return None

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        """Boxes in pixels of each file, best first."""
        return [self._detect(original(sample), score_threshold) for sample in samples]

    def _detect(self, picture: Tensor, score_threshold: float) -> ImageDetections:
        """picture uint8 [3, h, w]."""
        picture = picture.to(self._colours.device).int()
        boxes, scores, labels = [], [], []
        for label, colour in enumerate(self._colours):
            mask = ((picture - colour[:, None, None]).abs() <= self._tolerance).all(0)
            parts = _components(mask)
            for part in parts[mask].unique():
                y, x = torch.nonzero(parts == part, as_tuple=True)
                if len(x) < self._smallest:
                    continue
                box = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()
                boxes.append(box)
                scores.append(len(x) / float((box[2] - box[0]) * (box[3] - box[1])))
                labels.append(label)
        size = (int(picture.shape[1]), int(picture.shape[2]))
        found = torch.stack(boxes) if boxes else torch.zeros(0, 4)
        return final(
            found.cpu(), torch.tensor(scores), torch.tensor(labels), size=size, score_threshold=score_threshold
        )


def _components(mask: Tensor) -> Tensor:
    """bool [h, w] → int64 [h, w]: cells that touch, corners too, share a number: the largest floods its part."""
    number = torch.arange(1, mask.numel() + 1, device=mask.device, dtype=torch.float64).view(mask.shape) * mask
    while True:
        grown = F.max_pool2d(number[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(grown, number):
            return number.long()
        number = grown
