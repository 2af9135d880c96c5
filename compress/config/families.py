"""Detector families and backbones as recipes know them: what each takes and what it can. No torch.

What is built from these names stands in `compress.detectors.build.FAMILIES` and `compress.detectors.backbones`. A
family has a row here, one there, and its class; a backbone of a known kind has its row here and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class FamilyFacts:
    """Facts about a detector family that a recipe needs before anything is built.

    defaults: the keys of `SPECIAL` that it takes, each with the value where the recipe says null.
    most_convolutions: limit of head_depth and whose it is; None: there is none.
    sizes: those of a detector that a library builds as a whole, with a backbone of its own; it takes
        `size`, `options` and `init`.
    quantizable, weights_labels, ignores_regions: as its class says (`compress.detectors.base.Detector`).
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    most_convolutions: tuple[int, str] | None = None
    sizes: tuple[str, ...] = ()
    quantizable: bool = False
    weights_labels: bool = False
    ignores_regions: bool = True

    @property
    def whole(self) -> bool:
        """Whether a library builds it from a configuration."""
        return bool(self.sizes)


class Abilities(Protocol):
    """Protocol of what a recipe asks of a student: facts of a family, or the class of a user's own detector."""

    @property
    def quantizable(self) -> bool: ...
    @property
    def weights_labels(self) -> bool: ...
    @property
    def ignores_regions(self) -> bool: ...


SPECIAL = {
    "head_norm": "has no head with BatchNorm",
    "anchor_scale": "has no anchors to scale",
    "roi_samples": "has no second stage",
}
"""Keys of a model that not every family takes, and why one may not."""

FAMILY_FACTS = {
    "gfl": FamilyFacts({"head_norm": "group"}, quantizable=True, weights_labels=True),
    "fcos": FamilyFacts({"head_norm": "group"}),
    "retinanet": FamilyFacts(
        {"anchor_scale": 4.0}, most_convolutions=(4, "torchvision's RetinaNet has at most 4 convolutions in a tower")
    ),
    "faster_rcnn": FamilyFacts({"anchor_scale": 8.0, "roi_samples": 512}, ignores_regions=False),
    "d_fine": FamilyFacts(sizes=("n", "s", "m", "l", "x", "tiny", "tiny2x"), ignores_regions=False),
    "rt_detr_v2": FamilyFacts(sizes=("r18", "r34", "r50m", "r50", "r101", "tiny", "tiny2x"), ignores_regions=False),
    "rf_detr": FamilyFacts(sizes=("nano", "small", "medium", "large", "base"), ignores_regions=False),
    "lw_detr": FamilyFacts(sizes=("tiny", "small", "medium", "large", "xlarge"), ignores_regions=False),
}


def families_with(ability: str) -> str:
    """The families that have one of `Abilities`, or `sizes`, for messages: `gfl, fcos or retinanet`."""
    names = [name for name, facts in FAMILY_FACTS.items() if getattr(facts, ability)]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about a backbone.

    kind: key of `compress.detectors.backbones.KINDS`. options: arguments of its class.
    imagenet: torchvision has weights trained on ImageNet for it, under its name.
    """

    kind: str
    options: Mapping[str, Any]
    imagenet: bool = True


BACKBONES = {
    "resnet18": BackboneFacts("resnet", {"name": "resnet18"}),
    "resnet34": BackboneFacts("resnet", {"name": "resnet34"}),
    "resnet50": BackboneFacts("resnet", {"name": "resnet50"}),
    "resnet101": BackboneFacts("resnet", {"name": "resnet101"}),
    "mobilenet_v3_small": BackboneFacts("mobilenet_v3", {"name": "mobilenet_v3_small"}),
    "mobilenet_v3_large": BackboneFacts("mobilenet_v3", {"name": "mobilenet_v3_large"}),
    "nano": BackboneFacts("nano", {"width": 1}, imagenet=False),
    "nano2x": BackboneFacts("nano", {"width": 2}, imagenet=False),
}
