"""What detectors of the library transformers have in common whose decoder turns queries into boxes: how they are made,
their ground truth, losses and boxes."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import box_convert

from compress.data.batch import Target
from compress.detectors.assign import Assignment, valid_locations
from compress.detectors.base import (
    Capability,
    DensePrediction,
    Detector,
    Reduce,
    Targets,
    pad_targets,
    refuse_pseudo_labels,
)
from compress.detectors.queries import QueryPrediction
from compress.detectors.transformers.load import fresh, loaded, options_of
from deploy.core.errors import UserError
from deploy.core.import_path import import_object


@dataclass
class QueryTargets(Targets):
    """Ground truth as the library's losses take it: `class_labels` and `boxes` (centre, width and height in shares of
    the network image) of each image. Its assignment has no positives: the losses match. `factor` makes their normaliser
    that of all processes."""

    truth: list[dict[str, Tensor]]
    factor: Tensor


class QueryDetector(Detector, ABC):
    """A model of the library whose maps a decoder looks at.

    options: the library's configuration, as far as it is not its default, without what num_classes says.
    renewed: class layers that began anew, because what was loaded has other classes.
    """

    capabilities = frozenset({Capability.FEATURES, Capability.BOXES, Capability.LOCATIONS, Capability.QUERIES})
    has_nms = False
    prunable = (
        "its layers are a library's, with attention, whose channels hang together in ways that were not looked at"
    )
    library: ClassVar[str]
    """Name of the library's class with the loss."""
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Published configurations, by name."""
    criterion: ClassVar[str]
    """Import path of the library's loss."""
    matcher: ClassVar[str]
    """Import path of the matching that it uses."""
    reduces: ClassVar[bool] = False
    """The library's loss is normalised by the boxes of all processes; else by those of one, which is corrected here."""
    block: int = 1
    """The maps are those of an image padded to a multiple of so many pixels."""

    network: Any
    options: dict[str, Any]
    renewed: tuple[str, ...]

    @classmethod
    def build(cls, num_classes: int, *, size: str | None, options: Mapping[str, Any], init: str | None) -> Self:
        """Make one.

        Args:
            size: one of `sizes`; None: the library's default configuration.
            options: values of the library's configuration in the place of these.
            init: a folder or Hub name, whose configuration and weights are taken in the place of `size`'s; class
                layers of another number of classes begin anew.

        Raises UserError for an option that is unknown or does not fit, and for weights that do not.
        """
        if init is not None:
            return cls(num_classes, loaded(cls.library, init, num_classes, options))
        given = {**({} if size is None else cls.sizes[size]), **options}
        return cls(num_classes, fresh(cls.library, num_classes, given))

    def predict(self, features: list[Tensor]) -> QueryPrediction:
        return self._predict(features, None)

    def predict_in_training(self, features: list[Tensor], targets: list[Target]) -> QueryPrediction:
        """Also gives what the library's loss takes besides."""
        return self._predict(features, _truth(targets, self._canvas(features), features[0].device))

    @torch.no_grad()
    def match_queries(self, prediction: QueryPrediction, targets: list[Target]) -> list[tuple[Tensor, Tensor]]:
        """The library's matching: of each image the queries int64 [n] and the objects int64 [n] of `truth`."""
        truth = self.truth(prediction, targets)
        return self._matched({"logits": prediction.logits, "pred_boxes": prediction.boxes.clamp(0, 1)}, truth)

    def truth(self, prediction: QueryPrediction, targets: list[Target]) -> list[dict[str, Tensor]]:
        """Ground truth as `QueryTargets.truth`, on the prediction's device."""
        return _truth(targets, prediction.canvas, prediction.logits.device)

    @torch.no_grad()
    def assign(self, prediction: QueryPrediction, targets: list[Target], reduce: Reduce | None = None) -> QueryTargets:
        """Ground truth alone: what it is matched to, the losses find.

        Raises UserError for pseudo labels with weights, uncertain regions or unlabeled classes.
        """
        refuse_pseudo_labels(self.family, targets)
        device = prediction.logits.device
        boxes, labels, mask = pad_targets(targets, device)
        truth = self.truth(prediction, targets)
        own = torch.tensor(float(sum(len(t["boxes"]) for t in truth)), device=device)
        world, factor = 1, torch.ones((), device=device)
        if reduce is not None:
            world = dist.get_world_size()
        if reduce is not None and not self.reduces:
            factor = own.clamp(min=1) * world / reduce(own.clone()).clamp(min=1)
        B, L = len(targets), len(self.strides)
        sizes = torch.tensor([target.size for target in targets], device=device)
        levels = [(prediction.canvas[0] // stride, prediction.canvas[1] // stride) for stride in self.strides]
        valid = valid_locations(sizes, levels, self.strides)
        nowhere, none = torch.full_like(valid, -1, dtype=torch.int64), torch.zeros(B, dtype=torch.int64, device=device)
        assignment = Assignment(nowhere, valid, torch.where(mask, 0.0, torch.nan), none)
        one, of_levels = torch.ones((), device=device), torch.zeros(L, device=device)
        return QueryTargets(boxes, labels, assignment, one, of_levels, world, None, None, truth, factor)

    def loss(self, prediction: QueryPrediction, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """The library's terms, each summed over the layers. Only of `predict_in_training`."""
        assert isinstance(targets, QueryTargets) and prediction.learned, "as they are in training"
        learned = dict(prediction.learned)
        logits, boxes = learned.pop("logits"), learned.pop("boxes")
        _, terms, _ = import_object(self.criterion, "criterion")(
            logits, targets.truth, logits.device, boxes, self.network.config, **learned
        )
        found: dict[str, Tensor] = {}
        for name, value in terms.items():
            kind = re.sub(r"(_aux|_dn)?_\d+$|_enc$", "", name)
            weight = self._weight(kind)
            if weight is not None:
                found[kind] = found.get(kind, 0) + weight * (value if kind == "loss_ddf" else value * targets.factor)
        return found

    @torch.no_grad()
    def at_locations(self, features: list[Tensor], prediction: QueryPrediction) -> DensePrediction:
        """The scores and boxes by which the decoder chooses where it begins; `box_deltas` are boxes as those of a
        `QueryPrediction`."""
        said, shapes = self._said_of_locations([x.float() for x in features])
        counts = [h * w for h, w in shapes]
        logits, boxes = (
            [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(y.split(counts, 1), shapes, strict=True)]
            for y in said
        )
        return DensePrediction(logits, [], self.strides, box_deltas=boxes)

    def decode_boxes(self, prediction: Any) -> Tensor:
        """Boxes [B, Q, 4] xyxy in pixels of the network image, not clipped; of `at_locations` [B, A, 4]."""
        if isinstance(prediction, DensePrediction):
            height, width = (side * prediction.strides[0] for side in prediction.level_sizes[0])
            boxes = torch.cat([x.flatten(2) for x in prediction.box_deltas], 2).transpose(1, 2)
        else:
            (height, width), boxes = prediction.canvas, prediction.boxes
        x, y, w, h = boxes.unbind(-1)
        return torch.stack(((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), -1)

    def _setup(self, num_classes: int, network: Any, must: Mapping[str, Any]) -> None:
        """Take the network, whose configuration `must` say something."""
        for key, wanted in must.items():
            if getattr(network.config, key) != wanted:
                raise UserError(f"options.{key}: must be {wanted} here, is {getattr(network.config, key)}")
        self.num_classes = num_classes
        self.network = network
        self.options = options_of(network.config)
        self.renewed = getattr(network, "renewed", ())

    @abstractmethod
    def _predict(self, features: list[Tensor], truth: list[dict[str, Tensor]] | None) -> QueryPrediction:
        """`truth` is that of a batch in training."""

    @abstractmethod
    def _said_of_locations(self, features: list[Tensor]) -> tuple[tuple[Tensor, Tensor], list[tuple[int, int]]]:
        """Logits [B, A, K] and boxes [B, A, 4] of all locations, and (h, w) of the levels."""

    @abstractmethod
    def _matched(self, outputs: dict[str, Tensor], truth: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Run the library's matcher."""

    def _weight(self, kind: str) -> float | None:
        """Weight of a term of the library's loss as it comes; None: it is no loss."""
        return 1.0

    @torch.no_grad()
    def _try(self) -> None:
        """Raise UserError where the parts do not go together, or the maps have other strides than the configuration
        says."""
        side = math.lcm(2 * self.strides[-1], self.block)
        was_training = self.training
        self.eval()  # so that no statistics move
        device = next(self.parameters()).device
        try:
            maps = self.features(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
            found = [side // int(x.shape[2]) for x in maps]
            self.predict(maps)
        except Exception as error:  # whatever a layer says of numbers that do not go together
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"options: the layers do not fit together ({reason})") from error
        finally:
            self.train(was_training)
        if found != list(self.strides):
            raise UserError(f"options.feat_strides: are {list(self.strides)}, and the maps have strides {found}")

    def _canvas(self, features: list[Tensor]) -> tuple[int, int]:
        height, width = features[0].shape[2:]
        return int(height) * self.strides[0], int(width) * self.strides[0]


@dataclass(frozen=True)
class Memory:
    """What the decoder looks at: rows [B, S, d] of all locations, level behind level, and (h, w) of each level."""

    rows: Tensor
    shapes: list[tuple[int, int]]


# --- details --------------------------------------------------------------------------------------------


def _truth(targets: list[Target], canvas: tuple[int, int], device: torch.device) -> list[dict[str, Tensor]]:
    height, width = canvas
    found = []
    for target in targets:
        there = ~target.ignore
        boxes = box_convert(target.boxes[there].to(device).float(), "xyxy", "cxcywh")
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        found.append({"class_labels": target.labels[there].to(device), "boxes": boxes})
    return found
