"""FCOS (Tian et al., ICCV 2019) and RetinaNet (Lin et al., ICCV 2017) of torchvision's modules, as our detectors.

Pyramid, heads, anchors, box coders, assignment, losses and selection are torchvision's code; only the order in which
they run is ours, because methods want to see the maps and the raw predictions. So weights of torchvision's models fit,
and the numbers are those of its models, but for two things. Padding is the mean colour in uint8, see `gfl`. And
detections are selected with our settings unless others are given: score above 0.05, IoU 0.6, 100 an image, as in the
exported file.

Built for training here, heads are those of torchvision's newer models: GroupNorm in both (FCOS: or BatchNorm, see
`level_norm`), and RetinaNet's box loss is
GIoU, as in retinanet_resnet50_fpn_v2. torchvision normalises FCOS's losses by the positives of a process; here by those
of all processes, so that the loss does not depend on their number. RetinaNet's are normalised image by image.

Pseudo labels: uncertain regions and unlabeled classes have no class loss, as in GFL. Labels cannot be weighted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS as WholeFCOS
from torchvision.models.detection import RetinaNet as WholeRetinaNet
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from compress.data.batch import Target
from compress.detectors.assign import PAD_MULTIPLE, Assignment, unknown_classes
from compress.detectors.backbones import Backbone
from compress.detectors.base import (
    NO_PROBABILITY,
    STRIDES,
    DensePrediction,
    ImageDetections,
    ImageSize,
    Reduce,
    Targets,
)
from compress.detectors.level_norm import LevelNorm, at_level
from compress.detectors.select import PRE_NMS
from compress.detectors.torchvision.parts import (
    IMAGENET,
    Pyramid,
    TorchvisionDetector,
    anchor_sizes,
    grid_anchors,
    group_norm,
    in_original_pixels,
    pad_labelled,
    per_image,
    summed,
)
from deploy.core.card import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD
from deploy.core.errors import UserError

BETWEEN = Matcher.BETWEEN_THRESHOLDS  # in `Assignment.gt_index`: neither positive nor negative


class TorchvisionDense(TorchvisionDetector, ABC):
    """Base of FCOS and RetinaNet.

    Args:
        num_classes: K.
        backbone: gives C3, C4, C5 of normalised images.
        neck: C3, C4, C5 → P3..P7.
        head: `FCOSMaps` or `RetinaNetMaps`.
        around_zero: anchors at the location (0, 0), float32 [N, 4] xyxy in pixels, a level.
        normalisation: see `TorchvisionDetector`.
    """

    ignores_regions = True
    strides = STRIDES
    head: Any
    whole: Any
    """torchvision's class, whose methods read their settings from `self`: they get a namespace for it."""
    box_coder: Any

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module,
        neck: Pyramid,
        head: nn.Module,
        around_zero: Sequence[Tensor],
        normalisation: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    ) -> None:
        super().__init__(num_classes, backbone, neck, normalisation)
        self.head = head
        for level, anchors in enumerate(around_zero):
            self.register_buffer(f"anchors{level}", anchors.clone(), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.neck(self.backbone(self.normalise(images)))
        return maps

    def anchors(self, prediction: DensePrediction) -> list[Tensor]:
        """float32 [M, 4] xyxy in pixels of the network image, a level."""
        around_zero = [self.get_buffer(f"anchors{level}") for level in range(len(self.strides))]
        return grid_anchors(around_zero, prediction.level_sizes, self.strides[0])

    @torch.no_grad()
    def assign(self, prediction: DensePrediction, targets: list[Target], reduce: Reduce | None = None) -> Targets:
        """torchvision's assignment. It has no threshold of a box to tell: 0 for all. `gt_index` is `BETWEEN` between
        RetinaNet's thresholds. Padding is background, as there; for methods it is not valid.

        Raises UserError for pseudo labels that are to be weighted by their scores.
        """
        if any(target.scores is not None for target in targets):
            raise UserError(
                f"pseudo_labels.weighting: a {self.family} student cannot weight labels by their scores; set it to "
                "hard, or take a gfl student"
            )
        anchors = torch.cat(self.anchors(prediction))
        boxes, labels, mask = pad_labelled(targets, anchors.device)
        truth = per_image(boxes, labels, mask)
        gt_index = torch.stack(self.match([anchors] * len(targets), truth, prediction.counts))
        positive = gt_index >= 0
        each = positive.sum(1)
        per_level = torch.stack([x.sum() for x in positive.split(prediction.counts, 1)])
        totals, processes = summed(torch.cat((each.clamp(min=1).sum()[None], per_level)).to(boxes.dtype), reduce)

        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        sizes = torch.tensor([target.size[::-1] for target in targets], device=anchors.device)  # (width, height)
        padded = (sizes + PAD_MULTIPLE - 1) // PAD_MULTIPLE * PAD_MULTIPLE
        valid = (centers < padded[:, None]).all(-1) & (gt_index != BETWEEN)

        def match(regions: Tensor, images: Tensor) -> Tensor:
            alone = [{"boxes": box[None], "labels": images.new_zeros(1)} for box in regions]
            if not alone:
                return gt_index.new_empty(0, len(anchors))
            return torch.stack(self.match([anchors] * len(alone), alone, prediction.counts))

        return Targets(
            boxes,
            labels,
            Assignment(gt_index, valid, torch.where(mask, 0.0, torch.nan), each),
            totals[0] / processes,
            totals[1:],
            processes,
            unknown=unknown_classes(targets, self.num_classes, positive, match),
            scores=None,
        )

    def loss(self, prediction: DensePrediction, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """torchvision's losses, each of weight 1: `loss_cls`, `loss_bbox` and, of FCOS, `loss_centerness`."""
        prediction = prediction.float()
        logits = torch.cat([prediction.class_logits(level) for level in range(len(prediction.logits))], 2)
        if targets.unknown is not None:  # a probability of 0 where it should be 0: no loss, no gradient
            logits = logits.masked_fill(targets.unknown, NO_PROBABILITY)
        outputs = {
            "cls_logits": logits.transpose(1, 2),
            "bbox_regression": _rows(prediction.box_deltas, prediction.anchors),
        }
        if prediction.centerness:
            outputs["bbox_ctrness"] = _rows(prediction.centerness, 1)
        anchors = torch.cat(self.anchors(prediction))
        truth = per_image(targets.boxes, targets.labels, targets.assignment.is_box)
        matched = targets.assignment.gt_index
        losses = self.head.compute_loss(truth, outputs, [anchors] * len(truth), list(matched))
        share = self.share(targets)
        names = {"classification": "loss_cls", "bbox_regression": "loss_bbox", "bbox_ctrness": "loss_centerness"}
        return {names[name]: value * share if targets.world_size > 1 else value for name, value in losses.items()}

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        """Boxes [B, A, 4] xyxy in pixels of the network image, not clipped."""
        return self.boxes(_rows(prediction.box_deltas, prediction.anchors), torch.cat(self.anchors(prediction)))

    @torch.no_grad()
    def decode(
        self,
        prediction: DensePrediction,
        sizes: Sequence[ImageSize],
        *,
        score_threshold: float = SCORE_THRESHOLD,
        nms_threshold: float = NMS_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
    ) -> list[ImageDetections]:
        """torchvision's selection: detections in pixels of each image file, best first."""
        prediction = prediction.float()
        levels = range(len(prediction.logits))
        outputs = {
            "cls_logits": [prediction.class_logits(level).transpose(1, 2) for level in levels],
            "bbox_regression": [_rows([x], prediction.anchors) for x in prediction.box_deltas],
            "bbox_ctrness": [_rows([x], 1) for x in prediction.centerness],
        }
        settings = SimpleNamespace(
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            topk_candidates=PRE_NMS,
            box_coder=self.box_coder,
        )
        anchors = [self.anchors(prediction)] * len(sizes)
        found = self.whole.postprocess_detections(settings, outputs, anchors, [size.network for size in sizes])
        return in_original_pixels(found, sizes)

    @abstractmethod
    def match(self, anchors: list[Tensor], truth: list[dict[str, Tensor]], counts: list[int]) -> list[Tensor]:
        """torchvision's index of the ground truth of every anchor, int64 [A], for each image."""

    @abstractmethod
    def boxes(self, sides: Tensor, anchors: Tensor) -> Tensor:
        """sides [B, A, 4] at anchors [A, 4] → boxes [B, A, 4]."""

    def share(self, targets: Targets) -> Tensor:
        """Factor on the loss of this process, so that the mean over processes is the loss of the whole batch."""
        return torch.ones((), device=targets.boxes.device)


class FCOSMaps(FCOSHead):
    """torchvision's head of FCOS, with one map a level instead of one row a location."""

    def __init__(self, head: FCOSHead) -> None:
        nn.Module.__init__(self)
        self.box_coder = head.box_coder
        self.classification_head, self.regression_head = head.classification_head, head.regression_head

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits [B, K, h, w], sides [B, 4, h, w] (in strides) and centerness [B, 1, h, w] of each level."""
        classes, boxes = self.classification_head, self.regression_head
        towers = [at_level(boxes.conv, x, level) for level, x in enumerate(features)]
        return (
            [classes.cls_logits(at_level(classes.conv, x, level)) for level, x in enumerate(features)],
            [F.relu(boxes.bbox_reg(x)) for x in towers],
            [boxes.bbox_ctrness(x) for x in towers],
        )


class FCOS(TorchvisionDense):
    """Anchor-free: one prediction a location, with a centerness beside its classes. Args: see `TorchvisionDense`."""

    family = "fcos"
    whole = WholeFCOS
    box_coder = BoxLinearCoder(normalize_by_size=True)
    radius = 1.5  # of the centre of a box, in strides: where locations may be positive

    @classmethod
    def build(
        cls, num_classes: int, backbone: Backbone, *, neck_channels: int, head_depth: int, head_norm: str = "group"
    ) -> FCOS:
        """Make one with fresh neck and head. neck_channels: a multiple of 32. head_depth: convolutions of a tower.
        head_norm: behind each of them, `group` or `batch`."""
        norm = LevelNorm if head_norm == "batch" else group_norm
        head = FCOSHead(neck_channels, 1, num_classes, 0)
        head.classification_head = FCOSClassificationHead(neck_channels, 1, num_classes, head_depth, norm_layer=norm)
        head.regression_head = FCOSRegressionHead(neck_channels, 1, head_depth, norm_layer=norm)
        neck = Pyramid.build(backbone.out_channels, neck_channels, LastLevelP6P7(neck_channels, neck_channels))
        around_zero = AnchorGenerator(tuple((stride,) for stride in STRIDES), ((1.0,),) * len(STRIDES)).cell_anchors
        return cls(num_classes, backbone, neck, FCOSMaps(head), around_zero)

    def predict(self, features: list[Tensor]) -> DensePrediction:
        logits, sides, centerness = self.head(features)
        return DensePrediction(logits, [], self.strides, sides, centerness)

    def match(self, anchors: list[Tensor], truth: list[dict[str, Tensor]], counts: list[int]) -> list[Tensor]:
        settings = SimpleNamespace(head=_Matches, center_sampling_radius=self.radius)
        matches: list[Tensor] = self.whole.compute_loss(settings, truth, None, anchors, counts)
        return matches

    def boxes(self, sides: Tensor, anchors: Tensor) -> Tensor:
        decoded: Tensor = self.box_coder.decode(sides, anchors)
        return decoded

    def share(self, targets: Targets) -> Tensor:
        positives = targets.assignment.num_positives.sum().clamp(min=1)
        return positives * targets.world_size / targets.level_positives.sum().clamp(min=1)


class RetinaNetMaps(RetinaNetHead):
    """torchvision's head of RetinaNet, with one map a level instead of one row an anchor."""

    def __init__(self, head: RetinaNetHead) -> None:
        nn.Module.__init__(self)
        self.classification_head, self.regression_head = head.classification_head, head.regression_head

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [B, N * K, h, w] and box deltas [B, N * 4, h, w] of each level."""
        classes, boxes = self.classification_head, self.regression_head
        return (
            [classes.cls_logits(classes.conv(x)) for x in features],
            [boxes.bbox_reg(boxes.conv(x)) for x in features],
        )


class RetinaNet(TorchvisionDense):
    """Nine anchors a location: three sizes by three ratios.

    Args:
        thresholds: an anchor is positive from the first IoU on, and negative below the second; the best anchors of a
            box are positive in any case.
        others: see `TorchvisionDense`.
    """

    family = "retinanet"
    whole = WholeRetinaNet
    box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module,
        neck: Pyramid,
        head: RetinaNetMaps,
        around_zero: Sequence[Tensor],
        normalisation: tuple[Sequence[float], Sequence[float]] = IMAGENET,
        *,
        thresholds: tuple[float, float] = (0.5, 0.4),
    ) -> None:
        super().__init__(num_classes, backbone, neck, head, around_zero, normalisation)
        self.matcher = Matcher(*thresholds, allow_low_quality_matches=True)
        self.anchor_sizes = anchor_sizes(around_zero)

    @classmethod
    def build(
        cls,
        num_classes: int,
        backbone: Backbone,
        *,
        neck_channels: int,
        head_depth: int,
        anchor_scale: float,
    ) -> RetinaNet:
        """Make one with fresh neck and head. neck_channels: a multiple of 32. head_depth: convolutions of a tower, at
        most 4. anchor_scale: side of the smallest anchor in strides."""
        octaves = [2 ** (n / 3) for n in range(3)]
        sizes = tuple(tuple(int(int(anchor_scale * s) * octave) for octave in octaves) for s in STRIDES)
        around_zero = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)).cell_anchors
        head = RetinaNetHead(neck_channels, len(around_zero[0]), num_classes, norm_layer=group_norm)
        for branch in (head.classification_head, head.regression_head):
            branch.conv = branch.conv[:head_depth]
        head.regression_head._loss_type = "giou"
        neck = Pyramid.build(backbone.out_channels, neck_channels, LastLevelP6P7(neck_channels, neck_channels))
        return cls(num_classes, backbone, neck, RetinaNetMaps(head), around_zero)

    def predict(self, features: list[Tensor]) -> DensePrediction:
        logits, sides = self.head(features)
        assert self.anchor_sizes is not None
        return DensePrediction(logits, [], self.strides, sides, anchors=len(self.anchor_sizes[0]))

    def match(self, anchors: list[Tensor], truth: list[dict[str, Tensor]], counts: list[int]) -> list[Tensor]:
        settings = SimpleNamespace(head=_Matches, proposal_matcher=self.matcher)
        matches: list[Tensor] = self.whole.compute_loss(settings, truth, None, anchors)
        return matches

    def boxes(self, sides: Tensor, anchors: Tensor) -> Tensor:
        every = anchors.expand(sides.shape[0], -1, -1).flatten(0, 1)
        decoded: Tensor = self.box_coder.decode_single(sides.flatten(0, 1), every)
        return decoded.view(sides.shape)


class _Matches:
    """Stand-in for a head: `compute_loss` of torchvision's detectors matches, then hands the matches to its head."""

    @staticmethod
    def compute_loss(
        targets: list[dict[str, Tensor]], outputs: Any, anchors: list[Tensor], matches: list[Tensor]
    ) -> list[Tensor]:
        return matches


def _rows(maps: Sequence[Tensor], anchors: int) -> Tensor:
    """[B, N * D, h, w] a level → [B, A, D]."""
    return torch.cat([x.flatten(2).unflatten(1, (anchors, -1)).permute(0, 3, 1, 2).flatten(1, 2) for x in maps], 1)
