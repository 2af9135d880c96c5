"""The contract of a detector: what it gives and takes, between models, methods, the trainer and deployment.

Shape letters of this package: B images, K classes, L levels, h × w the grid of a level, N predictions at a location
(1, or the anchors of a RetinaNet), M = h·w·N, A = all predictions of an image (levels concatenated, row-major, the N of
a location beside each other), G ground-truth boxes, P positives.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.config.model import Model
from compress.data.batch import ImageSize as ImageSize
from compress.data.batch import Target
from compress.detectors.assign import Assignment, atss, unknown_classes
from compress.detectors.queries import Queries, QueryPrediction
from compress.detectors.select import select
from deploy.core.card import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError
from kernels.common.distribution import distances_to_boxes, integral

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, RGB, 0..255
STD = (58.395, 57.12, 57.375)
STRIDES = (8, 16, 32, 64, 128)  # of a pyramid P3..P7
GROUP_WIDTH = 8  # channels of a GroupNorm group in a head
REG_MAX = 16  # largest distance that a distribution over bins can say, in strides; it has REG_MAX + 1 bins
NO_PROBABILITY = -1e4  # a logit whose sigmoid is 0 in float32

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity in a single one."""


class Capability(enum.Enum):
    """Kinds of output that a model can give to a distillation method."""

    FEATURES = "features"  # feature pyramid maps
    DENSE = "dense"  # class and box predictions at every location
    DISTRIBUTIONS = "box distributions"  # dense, with every side of a box as a distribution over bins
    BOXES = "boxes"  # final detections
    LOCATIONS = "scores and boxes at every location"  # of any head, as constants; whoever has DENSE has it
    QUERIES = "queries"  # of a decoder, one box each
    QUERY_DISTRIBUTIONS = "box distributions of queries"  # with every edge of a query's box as a distribution


@dataclass
class DensePrediction:
    """Raw output of a dense head, one entry a level.

    logits: float [B, N * K, h, w], before the sigmoid; channel = n * K + class.
    distribution: float [B, 4 * bins, h, w], before the softmax; channel = side * bins + bin, sides in the
        order left, top, right, bottom; bins count in units of the level's stride. Empty for heads without.
    strides: pixels between neighbouring locations; location (x, y) lies at (x * stride, y * stride).
    box_deltas: float [B, N * 4, h, w], boxes of heads without distributions, as their box coder takes them.
    centerness: float [B, 1, h, w], before the sigmoid (FCOS). Empty for heads without.
    anchors: N.
    """

    logits: list[Tensor]
    distribution: list[Tensor]
    strides: tuple[int, ...]
    box_deltas: list[Tensor] = field(default_factory=list)
    centerness: list[Tensor] = field(default_factory=list)
    anchors: int = 1

    def float(self) -> DensePrediction:
        """Convert all tensors to float32: losses are never computed in half precision."""
        return self._map(Tensor.float)

    def detach(self) -> DensePrediction:
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> DensePrediction:
        names = ("logits", "distribution", "box_deltas", "centerness")
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

    def level_scores(self, level: int) -> Tensor:
        """Scores of one level, [B, M, K]; see `scores`."""
        scores = self.class_logits(level).transpose(1, 2).sigmoid()
        if not self.centerness:
            return scores
        return (scores * self.centerness[level].flatten(2).transpose(1, 2).sigmoid()).sqrt()

    def scores_by_level(self) -> list[Tensor]:
        """Scores of each level, [B, M, K]; see `scores`."""
        return [self.level_scores(level) for level in range(len(self.logits))]

    def scores(self) -> Tensor:
        """Scores that rank detections, [B, A, K] in 0..1: sigmoid(logits), in FCOS its geometric mean with the
        centerness."""
        logits = torch.cat([self.class_logits(level) for level in range(len(self.logits))], 2).transpose(1, 2)
        if not self.centerness:
            return logits.sigmoid()
        centerness = torch.cat([x.flatten(2) for x in self.centerness], 2).transpose(1, 2)  # [B, A, 1]
        return (logits.sigmoid() * centerness.sigmoid()).sqrt()


@dataclass
class Targets:
    """Ground truth of a batch as padded tensors, and where it was assigned.

    boxes: float32 [B, G, 4] xyxy pixels; labels: int64 [B, G]; assignment: see `assign`.
    avg_factor: float32 scalar, number of positives (at least one an image), mean over processes.
    level_positives: float32 [L], positives of each level in all processes.
    world_size: processes that share the global batch.
    unknown: bool [B, K, A], where a class has no loss because the labels say nothing about it; None: nowhere.
    scores: float32 [B, G], how sure a teacher was of each box, 1 for an annotated one; None when all are annotated.
    """

    boxes: Tensor
    labels: Tensor
    assignment: Assignment
    avg_factor: Tensor
    level_positives: Tensor
    world_size: int
    unknown: Tensor | None
    scores: Tensor | None


@dataclass
class ImageDetections:
    """Final detections of one image: boxes [n, 4] xyxy pixels, scores [n] in 0..1, labels [n] int64; best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def to_table(self, image_id: int, category_ids: Sequence[int]) -> DetectionTable:
        """COCO results as columns, boxes as x, y, width and height; `category_ids` in label order."""
        boxes = self.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        sides, scores = (values.detach().cpu().double().numpy() for values in (boxes, self.scores))
        categories = np.asarray(category_ids, np.int64)[self.labels.cpu().numpy()]
        return DetectionTable(np.full(len(categories), image_id, np.int64), categories, sides, scores)


def gather(tables: Iterable[DetectionTable]) -> DetectionTable:
    """One table of all processes, which every process gets. tables: those of this one."""
    own = DetectionTable.join(tables)
    if not (dist.is_available() and dist.is_initialized()):
        return own
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return DetectionTable.join(shares)


class Detector(nn.Module):
    """A detector: the base class of the families of this project and of a user's own.

    What to implement. Every detector: `features`, `predict` and `decode_boxes`, or what its `capabilities` say. One
    that trains: `loss`, and `assign` unless its targets are those of ATSS, as here. One that is exported: nothing more,
    if `predict` gives a `DensePrediction`; another type of prediction needs the methods `float`, `detach` and `scores`
    of that class, and a `decode` of its own. One in two stages: `decode`, and the reason against `exportable`.

    The constructor sets the attributes below and calls `set_normalisation`. A recipe builds `MyDetector(num_classes,
    **options)`, or with the key `backbone` `MyDetector(num_classes, backbone=module, **options)`.

    num_classes: K.
    strides: of the maps that `features` gives, in pixels; feature_channels: their width C.
    anchor_sizes: where a dense head predicts at a location: None for points (one prediction each), else the widths
        and heights of its N anchors in pixels, a level. Two heads are comparable location by location if strides and
        anchor sizes agree.
    mean, std: of RGB pixels 0..255, [1, 3, 1, 1]; what the detector normalises its images with.
    compiled: run what the detector can of its loss through torch.compile; the trainer sets it.
    model: what it was built from; None for one that was not built from settings.

    Of the class:

    family: its name in messages; a recipe's import path for a user's own.
    capabilities: what methods may ask of it.
    exportable: why no file can be made of it, as in "cannot be exported: ..."; None: it can.
    prunable: why no channels can be cut from it, as in "cannot be pruned: ..."; None: they can.
    quantizable: it can be trained on the grids of its int8 file (deploy.int8.qad).
    has_nms: boxes of one class suppress each other; False: the head gives one box an object.
    weights_labels: its loss weighs pseudo labels by their scores.
    ignores_regions: its loss leaves out uncertain regions and classes that no teacher looked for.
    crossable: its head is a `compress.detectors.gfl.GFLHead`, whose layers CrossKD runs on another model's maps.
    """

    family: str = "a detector of your own"
    capabilities: frozenset[Capability] = frozenset({Capability.FEATURES, Capability.DENSE, Capability.BOXES})
    exportable: ClassVar[str | None] = None
    prunable: ClassVar[str | None] = None
    quantizable: ClassVar[bool] = False
    has_nms: ClassVar[bool] = True
    weights_labels: ClassVar[bool] = False
    ignores_regions: ClassVar[bool] = False
    crossable: ClassVar[bool] = False

    num_classes: int
    strides: tuple[int, ...]
    feature_channels: int
    anchor_sizes: tuple[tuple[tuple[float, float], ...], ...] | None = None
    mean: Tensor
    std: Tensor
    compiled: bool = False
    model: Model | None = None

    def set_normalisation(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        """Set `mean` and `std`, of RGB pixels 0..255. They are not part of the weights."""
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB images [B, 3, H, W] → float, (images - mean) / std."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if not torch.compiler.is_exporting():  # on CPUs and GPUs alike convolutions are faster with channels last
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 images [B, 3, H, W] (RGB), H and W multiples of 32 → pyramid maps [B, C, h, w], one a stride."""
        raise self._lacks(Capability.FEATURES)

    def predict(self, features: list[Tensor]) -> Any:
        """Run the head on the maps: a `DensePrediction` if the detector has Capability.DENSE."""
        raise self._lacks(Capability.DENSE)

    def predict_in_training(self, features: list[Tensor], targets: list[Target]) -> Any:
        """As `predict`, where the labels of the batch are known: a decoder that also learns from noisy copies of them
        needs them here."""
        return self.predict(features)

    def predict_at(self, features: list[Tensor], queries: Queries) -> list[QueryPrediction]:
        """Run the decoder on queries that begin where another model's do: what each layer says, the last one last."""
        raise self._lacks(Capability.QUERIES)

    def match_queries(self, prediction: QueryPrediction, targets: list[Target]) -> list[tuple[Tensor, Tensor]]:
        """Queries int64 [n] and objects int64 [n] of each image that belong together; objects count those of
        `Target` that are not to be ignored."""
        raise self._lacks(Capability.QUERIES)

    def at_locations(self, features: list[Tensor], prediction: Any) -> DensePrediction:
        """What is said of every location of the maps, for methods that only choose by it (Capability.LOCATIONS)."""
        if Capability.DENSE not in self.capabilities:
            raise self._lacks(Capability.LOCATIONS)
        found: DensePrediction = prediction
        return found

    def forward(self, images: Tensor) -> Any:
        return self.predict(self.features(images))

    def prepare_export(self, size: tuple[int, int]) -> None:
        """Compute beforehand what depends on the size of the network image (height, width) alone, for a file of that
        size. Called before the detector is traced."""

    def in_half(self) -> dict[str, nn.Module]:
        """The parts, by name, that a float16 file computes in float16; what the detector itself does stays in
        float32."""
        return dict(self.named_children())

    def traced(self, images: Tensor) -> Any:
        """Everything that the network computes for images [B, 3, H, W]: tensors, or dataclasses, lists and mappings of
        them, which depend on every layer. Pruning follows the gradient back from here. A detector whose second stage is
        not in `forward` adds it."""
        return self(images)

    def counted(self, images: Tensor) -> None:
        """Compute what one inference of images [B, 3, H, W] computes, in eval mode, for its operations to be counted.

        A second stage is counted with the proposals that it finds, whose number depends on the weights. A detector
        with one overrides this with a fixed number, so that equal architectures count the same; then it is also
        counted without its weights, on the device `meta`.
        """
        prediction = self(images)
        if Capability.DENSE not in self.capabilities:  # the rest of the network comes with the boxes
            size = (int(images.shape[2]), int(images.shape[3]))
            self.decode(prediction, [ImageSize(size, size)] * len(images))

    @torch.no_grad()
    def set_feature_channels(self) -> None:
        """Set `feature_channels` to what the maps are, after layers lost channels.

        Raises UserError where the maps of the levels now differ.
        """
        was_training = self.training
        self.eval()  # so that no statistics move
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=next(self.parameters()).device)
        found = [int(x.shape[1]) for x in self.features(images)]
        self.train(was_training)
        if len(set(found)) > 1:
            raise UserError(
                f"prune: the maps of {self.family} would have {', '.join(map(str, found))} channels, and must have "
                "equally many; add maps to prune.keep"
            )
        self.feature_channels = found[0]

    @torch.no_grad()
    def assign(self, prediction: Any, targets: list[Target], reduce: Reduce | None = None) -> Targets:
        """Ground truth of a batch, where it belongs, and the normalisers that all losses share. Here by ATSS, for heads
        with one prediction a location.

        `reduce` sums over processes; with it the losses of n processes average to the loss of one process that holds
        the whole batch.
        """
        boxes, labels, mask = pad_targets(targets, prediction.logits[0].device)
        sizes = torch.tensor([t.size for t in targets], device=boxes.device)
        assignment = atss(boxes, mask, sizes, prediction.level_sizes, prediction.strides)
        per_level = torch.stack([(x >= 0).sum() for x in assignment.gt_index.split(prediction.counts, dim=1)])
        at_least_one = assignment.num_positives.clamp(min=1).sum().to(boxes.dtype)
        totals = torch.cat((at_least_one[None], per_level.to(boxes.dtype)))
        world_size = 1
        if reduce is not None:
            totals, world_size = reduce(totals), dist.get_world_size()

        def match(regions: Tensor, images: Tensor) -> Tensor:
            alone = regions[:, None]
            there = torch.ones(alone.shape[:2], dtype=torch.bool, device=regions.device)
            return atss(alone, there, sizes[images], prediction.level_sizes, prediction.strides).gt_index

        return Targets(
            boxes,
            labels,
            assignment,
            totals[0] / world_size,
            totals[1:],
            world_size,
            unknown_classes(targets, self.num_classes, assignment.gt_index >= 0, match),
            pad_scores(targets, mask),
        )

    def loss(self, prediction: Any, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """Weighted scalars, float32."""
        raise TypeError(f"{self.family} cannot be trained here")

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        """Boxes [B, A, 4] xyxy in pixels of the network image, not clipped."""
        raise self._lacks(Capability.DENSE)

    @torch.no_grad()
    def decode(
        self,
        prediction: Any,
        sizes: Sequence[ImageSize],
        *,
        score_threshold: float = SCORE_THRESHOLD,
        nms_threshold: float = NMS_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
    ) -> list[ImageDetections]:
        """Final detections of each image in pixels of its file, best first.

        Args:
            prediction: of a batch of B images, as `forward` gives it.
            sizes: of the B images.
            score_threshold: detections score more than this.
            nms_threshold: boxes of one class that overlap more than this IoU suppress each other, if `has_nms`.
            max_detections: kept of an image.
        """
        if not self.capabilities & {Capability.DENSE, Capability.QUERIES}:
            raise self._lacks(Capability.BOXES)
        prediction = prediction.float()
        scores = prediction.scores_by_level()
        boxes = self.decode_boxes(prediction).split([x.shape[1] for x in scores], 1)
        found = []
        for index, size in enumerate(sizes):
            selected = select(
                [(s[index], b[index]) for s, b in zip(scores, boxes, strict=True)],
                size,
                score_threshold=score_threshold,
                nms_threshold=nms_threshold if self.has_nms else None,
                max_detections=max_detections,
            )
            found.append(ImageDetections(*selected))
        return found

    def _lacks(self, capability: Capability) -> TypeError:
        return TypeError(f"{self.family} gives no {capability.value}")


def decode_level(distribution: Tensor) -> Tensor:
    """distribution [B, 4 * R, h, w] of one level → boxes [B, M, 4] xyxy in units of the stride."""
    B, _, h, w = distribution.shape
    distances = integral(distribution.view(B, 4, REG_MAX + 1, h * w), dim=2).transpose(1, 2)  # [B, M, 4]
    y, x = torch.meshgrid(
        torch.arange(h, device=distribution.device, dtype=distances.dtype),
        torch.arange(w, device=distribution.device, dtype=distances.dtype),
        indexing="ij",
    )
    points = torch.stack((x.flatten(), y.flatten()), -1).expand(B, -1, -1)
    return distances_to_boxes(points, distances)


def pad_targets(targets: list[Target], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """boxes [B, G, 4], labels [B, G] and mask [B, G] (False for crowd boxes and padding)."""
    boxes = nn.utils.rnn.pad_sequence([t.boxes for t in targets], batch_first=True).to(device)
    labels = nn.utils.rnn.pad_sequence([t.labels for t in targets], batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([~t.ignore for t in targets], batch_first=True).to(device)
    return boxes, labels, mask


def pad_scores(targets: list[Target], mask: Tensor) -> Tensor | None:
    """float32 [B, G], 1 where a target has none; None when no target has any."""
    if all(target.scores is None for target in targets):
        return None
    scores = torch.ones(mask.shape, device=mask.device)
    for row, target in zip(scores, targets, strict=True):
        if target.scores is not None:
            row[: len(target.scores)] = target.scores.to(mask.device)
    return scores


def refuse_pseudo_labels(family: str, targets: list[Target]) -> None:
    """Raise UserError where pseudo labels say what the losses of `family` cannot use."""
    for what, found in (
        ("weights", any(t.scores is not None for t in targets)),
        ("regions to ignore", any(t.uncertain is not None and bool(t.uncertain.any()) for t in targets)),
        ("classes that no teacher looked for", any(t.unlabeled_classes is not None for t in targets)),
    ):
        if found:
            raise UserError(
                f"pseudo_labels: a {family} student cannot learn from labels with {what}; take a gfl, fcos or "
                "retinanet student"
            )


def in_backbone(name: str) -> bool:
    """Whether a parameter of this name is one of the backbone. The projector that LW-DETR keeps there is a neck."""
    parts = name.split(".")
    return "backbone" in parts and "projector" not in parts


def freeze(detector: Detector) -> Detector:
    """Turn `detector` into a teacher: in eval mode, without gradients."""
    return detector.requires_grad_(False).eval()
