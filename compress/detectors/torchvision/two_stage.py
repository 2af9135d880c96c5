"""Faster R-CNN (Ren et al., NeurIPS 2015) of torchvision's modules, as our detector: pyramid maps and boxes.

What it predicts hangs on proposals, so there is nothing dense to compare and no fixed graph to export: methods on
features can teach and learn here, the others cannot. Everything behind the maps runs in `loss` and `decode`, in
float32, and is torchvision's; padding is the mean colour in uint8, see `gfl`.

`features` are P2 to P5. The sixth map, which the proposals also see, is every other pixel of P5 and no map of its own.
The samples of both stages are random, and their losses are normalised by the samples of a process, as in torchvision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as WholeFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RPNHead

from compress.data.batch import Target
from compress.detectors.assign import Assignment
from compress.detectors.backbones import Backbone
from compress.detectors.base import (
    Capability,
    ImageDetections,
    ImageSize,
    Reduce,
    Targets,
    refuse_pseudo_labels,
)
from compress.detectors.torchvision.parts import (
    IMAGENET,
    Pyramid,
    TorchvisionDetector,
    group_norm,
    in_original_pixels,
    pad_labelled,
    per_image,
)
from deploy.core.card import MAX_DETECTIONS, SCORE_THRESHOLD
from deploy.core.errors import UserError

STRIDES = (4, 8, 16, 32)
ROI_SIDE = 7  # locations of a proposal
WIDENING = 4  # neurons of the fully connected layers for each channel of the pyramid: 1024 at 256


@dataclass
class TwoStagePrediction:
    """The maps that both stages start from, [B, C, h, w] a level."""

    maps: list[Tensor]
    strides: tuple[int, ...] = STRIDES

    def float(self) -> TwoStagePrediction:
        return TwoStagePrediction([x.float() for x in self.maps], self.strides)

    def detach(self) -> TwoStagePrediction:
        return TwoStagePrediction([x.detach() for x in self.maps], self.strides)


@dataclass
class TwoStageTargets(Targets):
    """Ground truth with (height, width) of the images; its assignment is empty, A is 0."""

    sizes: list[tuple[int, int]]


class FasterRCNN(TorchvisionDetector):
    """Region proposals, then a class and a box for each.

    Args:
        num_classes: K, without background.
        backbone: `all_maps` gives C2 to C5 of normalised images.
        neck: C2 to C5 → P2 to P5.
        rpn, roi_heads: torchvision's; `roi_heads` tells K + 1 classes apart, 0 is background.
        normalisation: see `TorchvisionDetector`.
    """

    family = "faster_rcnn"
    capabilities = frozenset({Capability.FEATURES, Capability.BOXES})
    exportable = "its second stage works on as many proposals as it finds, which a fixed graph cannot"
    strides = STRIDES

    def __init__(
        self,
        num_classes: int,
        backbone: nn.Module,
        neck: Pyramid,
        rpn: nn.Module,
        roi_heads: nn.Module,
        normalisation: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    ) -> None:
        super().__init__(num_classes, backbone, neck, normalisation)
        self.rpn: Any = rpn
        self.roi_heads: Any = roi_heads

    @classmethod
    def build(
        cls,
        num_classes: int,
        backbone: Backbone,
        *,
        neck_channels: int,
        head_depth: int,
        anchor_scale: float,
        roi_samples: int,
    ) -> FasterRCNN:
        """Make one with fresh pyramid and heads.

        Args:
            head_depth: 3 × 3 convolutions before the fully connected layer of the second stage, 4 in
                fasterrcnn_resnet50_fpn_v2; 0: two fully connected layers, as in fasterrcnn_resnet50_fpn.
            anchor_scale: side of a square anchor in strides.
            roi_samples: proposals of an image that train the second stage; drawn from four times as many, at most
                2000; as many, at most 1000, are looked at in evaluation.
        """
        if not hasattr(backbone, "all_maps"):
            raise UserError(
                f"backbone: {type(backbone).__name__} has no method all_maps(images) -> [C2, C3, C4, C5], and "
                "faster_rcnn needs C2; add it, or take another family"
            )
        C, wide = neck_channels, WIDENING * neck_channels
        sizes = tuple((int(anchor_scale * stride),) for stride in (*STRIDES, 2 * STRIDES[-1]))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        box_head: nn.Module = TwoMLPHead(C * ROI_SIDE**2, wide)
        if head_depth:
            box_head = FastRCNNConvFCHead((C, ROI_SIDE, ROI_SIDE), [C] * head_depth, [wide], norm_layer=group_norm)
        stand_in = nn.Identity()
        stand_in.out_channels = C  # type: ignore[assignment]
        whole = WholeFasterRCNN(
            stand_in,
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(C, anchors.num_anchors_per_location()[0], conv_depth=2 if head_depth else 1),
            rpn_pre_nms_top_n_train=min(2000, 4 * roi_samples),
            rpn_post_nms_top_n_train=min(2000, 4 * roi_samples),
            rpn_pre_nms_top_n_test=min(1000, 4 * roi_samples),
            rpn_post_nms_top_n_test=min(1000, 4 * roi_samples),
            box_batch_size_per_image=roi_samples,
            box_head=box_head,
            box_predictor=FastRCNNPredictor(wide, num_classes + 1),
        )
        neck = Pyramid.build(_widths(backbone), C, None)
        return cls(num_classes, backbone, neck, whole.rpn, whole.roi_heads)

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 RGB images [B, 3, H, W] → P2..P5, each float [B, C, h, w]."""
        backbone: Any = self.backbone
        maps: list[Tensor] = self.neck(backbone.all_maps(self.normalise(images)))
        return maps

    def predict(self, features: list[Tensor]) -> TwoStagePrediction:
        return TwoStagePrediction(features)

    def traced(self, images: Tensor) -> list[Tensor]:
        """Both stages; the second looks at the finest map as a whole, which has the channels of all."""
        size = (int(images.shape[2]), int(images.shape[3]))
        _, maps = _stage_inputs(self(images), [size] * len(images))
        objectness, deltas = self.rpn.head(list(maps.values()))
        pooled = F.adaptive_avg_pool2d(maps["0"], ROI_SIDE)
        return [*objectness, *deltas, *self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))]

    def counted(self, images: Tensor) -> None:
        """Both stages; the second with as many proposals as it looks at most in evaluation. Pooling them is no
        operation that counts."""
        size = (int(images.shape[2]), int(images.shape[3]))
        _, maps = _stage_inputs(self(images), [size] * len(images))
        self.rpn.head(list(maps.values()))
        finest, proposals = maps["0"], len(images) * self.rpn.post_nms_top_n()
        pooled = finest.new_zeros(proposals, finest.shape[1], ROI_SIDE, ROI_SIDE)
        self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))

    def assign(
        self, prediction: TwoStagePrediction, targets: list[Target], reduce: Reduce | None = None
    ) -> TwoStageTargets:
        """Ground truth alone: what it is assigned to, the losses draw.

        Raises UserError for pseudo labels with weights, uncertain regions or unlabeled classes.
        """
        refuse_pseudo_labels(self.family, targets)
        device = prediction.maps[0].device
        boxes, labels, mask = pad_labelled(targets, device)
        B, L = len(targets), len(prediction.strides)
        nothing = torch.zeros(B, 0, dtype=torch.bool, device=device)
        zeros = torch.zeros(B, dtype=torch.int64, device=device)
        assignment = Assignment(nothing.long(), nothing, torch.where(mask, 0.0, torch.nan), zeros)
        one, none = torch.ones((), device=device), torch.zeros(L, device=device)
        sizes = [target.size for target in targets]
        return TwoStageTargets(boxes, labels, assignment, one, none, 1, None, None, sizes)

    def loss(self, prediction: TwoStagePrediction, targets: Targets, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """torchvision's four losses, each of weight 1. Only in training mode; draws random numbers."""
        assert isinstance(targets, TwoStageTargets) and self.training, "as `assign` gives them, in training"
        images, maps = _stage_inputs(prediction.float(), targets.sizes)
        truth = per_image(targets.boxes, targets.labels + 1, targets.assignment.is_box)
        proposals, first = self.rpn(images, maps, truth)
        _, second = self.roi_heads(maps, proposals, targets.sizes, truth)
        return {
            "loss_rpn_cls": first["loss_objectness"],
            "loss_rpn_bbox": first["loss_rpn_box_reg"],
            "loss_cls": second["loss_classifier"],
            "loss_bbox": second["loss_box_reg"],
        }

    @torch.no_grad()
    def decode(
        self,
        prediction: TwoStagePrediction,
        sizes: Sequence[ImageSize],
        *,
        score_threshold: float = SCORE_THRESHOLD,
        nms_threshold: float = 0.5,
        max_detections: int = MAX_DETECTIONS,
    ) -> list[ImageDetections]:
        """torchvision's selection: detections in pixels of each image file, best first. Only in eval
        mode."""
        assert not self.training, "in training other proposals are kept"
        inside = [size.network for size in sizes]
        images, maps = _stage_inputs(prediction.float(), inside)
        proposals, _ = self.rpn(images, maps)
        heads = self.roi_heads
        logits, sides = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, inside)))
        settings = SimpleNamespace(
            box_coder=heads.box_coder,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
        )
        boxes, scores, labels = RoIHeads.postprocess_detections(settings, logits, sides, proposals, inside)
        found = [{"boxes": b, "scores": s, "labels": c - 1} for b, s, c in zip(boxes, scores, labels, strict=True)]
        return in_original_pixels(found, sizes)


def _stage_inputs(
    prediction: TwoStagePrediction, sizes: list[tuple[int, int]]
) -> tuple[ImageList, OrderedDict[str, Tensor]]:
    """Inputs of torchvision's stages: the sizes of images and batch, and the maps by name."""
    finest, coarsest = prediction.maps[0], prediction.maps[-1]
    height, width = (side * prediction.strides[0] for side in finest.shape[2:])
    images = ImageList(finest.new_empty(len(sizes), 0, height, width), sizes)
    maps = OrderedDict((str(level), x) for level, x in enumerate(prediction.maps))
    maps["pool"] = F.max_pool2d(coarsest, kernel_size=1, stride=2)
    return images, maps


def _widths(backbone: Backbone) -> list[int]:
    """Channels of C2 to C5."""
    was_training = backbone.training
    backbone.eval()  # so that no statistics move
    with torch.no_grad():
        maps = backbone.all_maps(torch.zeros(1, 3, 64, 64, device=next(backbone.parameters()).device))
    backbone.train(was_training)
    return [x.shape[1] for x in maps]
