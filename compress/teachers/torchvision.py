"""Detectors of torchvision as teachers: RetinaNet, FCOS, Faster R-CNN, SSD.

Boxes are those of torchvision's own model, with its own resize and selection. Features and dense predictions, for
methods, come from the same weights as a `Detector` that sees the student's images (`detector`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision.models.detection as zoo
from torch import nn
from torchvision.models import get_model_weights

from compress.config.teacher import Torchvision, is_class
from compress.detectors.base import Capability, Detector, ImageDetections
from compress.detectors.checkpoints import COCO_CATEGORIES
from compress.detectors.torchvision.dense import FCOS, FCOSMaps, RetinaNet, RetinaNetMaps
from compress.detectors.torchvision.parts import Body, Pyramid
from compress.detectors.torchvision.two_stage import STRIDES as TWO_STAGE_STRIDES
from compress.detectors.torchvision.two_stage import FasterRCNN
from compress.detectors.weights import load_exactly, read_tensors, state_sha256
from compress.teachers.base import Preprocessing, Sample, View, final, original
from deploy.core.errors import UserError, first_line
from deploy.core.files import sha256_of


class TorchvisionTeacher:
    """Teacher in a model of torchvision. Raises UserError for weights that cannot be had or do not fit."""

    view = View.ORIGINAL

    def __init__(self, source: Torchvision, device: torch.device) -> None:
        model, labels, names = build_torchvision(source)
        self.file = source.weights.name if not isinstance(source.weights, str) else f"torchvision {source.model}"
        self.sha256 = state_sha256(model) if isinstance(source.weights, str) else sha256_of(source.weights)
        self.settings: Mapping[str, Any] = source.model_dump(
            mode="json", exclude_defaults=True, exclude=set() if isinstance(source.weights, str) else {"weights"}
        )
        self.class_names: tuple[str, ...] | None = names
        if source.short is not None:
            model.transform.min_size = (source.short,)
        if source.long is not None:
            model.transform.max_size = source.long
        self._model = model.requires_grad_(False).eval().to(device)
        found = detector_of(self._model, labels)
        self.detector: Detector | None = None if found is None else found.requires_grad_(False).eval().to(device)
        self.capabilities = frozenset({Capability.BOXES}) if found is None else found.capabilities
        self._ours = torch.full((max(labels) + 1,), -1, dtype=torch.int64, device=device)
        self._ours[labels] = torch.arange(len(labels), device=device)
        self._device = device
        self.preprocessing: Preprocessing | None = _described(model.transform)

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        return None

    @torch.inference_mode()
    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        """Images of one size share a batch, so that none is padded for another."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(sample.size.original, []).append(index)
        _set_threshold(self._model, score_threshold * (1 - 1e-6))  # it keeps scores above, ours are at or above
        found: dict[int, ImageDetections] = {}
        for size, group in groups.items():
            images = [original(samples[index]).to(self._device).float() / 255 for index in group]
            for index, result in zip(group, self._model(images), strict=True):
                inside = result["labels"] < len(self._ours)
                labels = torch.where(inside, self._ours[result["labels"].clamp(max=len(self._ours) - 1)], -1)
                known = labels >= 0
                found[index] = final(
                    result["boxes"][known], result["scores"][known], labels[known],
                    size=size, score_threshold=score_threshold,
                )  # fmt: skip
        return [found[index] for index in range(len(samples))]


def build_torchvision(source: Torchvision) -> tuple[Any, list[int], tuple[str, ...]]:
    """torchvision's model on the CPU in eval mode, the label that it has for each of our classes, and their names.

    Label 0 is torchvision's background; so a model of K classes has K + 1 outputs. COCO's has gaps besides.
    """
    build = getattr(zoo, source.model)
    if source.weights == "coco":
        named = tuple(name for name in source.class_names or () if is_class(name))
        if source.class_names is not None and named != tuple(COCO_CATEGORIES.values()):
            raise UserError(
                "teacher.torchvision.class_names: weights: coco has COCO's 80 classes already; leave it out"
            )
        try:
            model = build(weights=get_model_weights(source.model).DEFAULT, progress=False)
        except (OSError, RuntimeError) as error:  # no network; a damaged download
            raise UserError(
                f"teacher.torchvision: COCO weights of {source.model} could not be downloaded "
                f"({first_line(error)}); give weights: FILE"
            ) from error
        return model.eval(), list(COCO_CATEGORIES), tuple(COCO_CATEGORIES.values())
    names = source.class_names
    # Without names a file must be of COCO's shape: 91 outputs, of which 80 have a name.
    outputs = max(COCO_CATEGORIES) + 1 if names is None else len(names) + 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # every process and every run gets the same random teacher
        model = build(weights=None, weights_backbone=None, num_classes=outputs)
    if not isinstance(source.weights, str):
        load_exactly(model, read_tensors(source.weights), source=str(source.weights))
    if names is None:
        return model.eval(), list(COCO_CATEGORIES), tuple(COCO_CATEGORIES.values())
    labels = [label for label, name in enumerate(names, start=1) if is_class(name)]
    return model.eval(), labels, tuple(str(names[label - 1]) for label in labels)


def detector_of(model: Any, labels: Sequence[int]) -> Detector | None:
    """Make a detector of this project with the same weights, with the classes `labels` (of torchvision's) alone.

    None where there is nothing to learn from but boxes: SSD's maps have a width each, and the pyramid on MobileNet two
    levels, where the contract of detectors has one width and four or five levels.
    """
    mean, std = model.transform.image_mean, model.transform.image_std
    normalisation = [255 * value for value in mean], [255 * value for value in std]
    if isinstance(model, zoo.RetinaNet | zoo.FCOS):
        body, neck = Body(model.backbone.body), Pyramid(model.backbone.fpn)
        head = copy.deepcopy(model.head)
        anchors = model.anchor_generator.cell_anchors
        branch = head.classification_head
        cells = 1 if isinstance(model, zoo.FCOS) else len(anchors[0])
        rows = [n * branch.num_classes + label for n in range(cells) for label in labels]
        branch.cls_logits = _rows(branch.cls_logits, rows)
        branch.num_classes = len(labels)
        if isinstance(model, zoo.FCOS):
            return FCOS(len(labels), body, neck, FCOSMaps(head), anchors, normalisation)
        return RetinaNet(len(labels), body, neck, RetinaNetMaps(head), anchors, normalisation)
    if isinstance(model, zoo.FasterRCNN) and len(model.backbone.fpn.layer_blocks) == len(TWO_STAGE_STRIDES):
        fpn, roi_heads = copy.deepcopy(model.backbone.fpn), copy.deepcopy(model.roi_heads)
        fpn.extra_blocks = None  # the detector makes the fifth map, which only proposals come from
        predictor, kept = roi_heads.box_predictor, [0, *labels]
        predictor.cls_score = _rows(predictor.cls_score, kept)
        predictor.bbox_pred = _rows(predictor.bbox_pred, [4 * label + side for label in kept for side in range(4)])
        return FasterRCNN(len(labels), Body(model.backbone.body), Pyramid(fpn), model.rpn, roi_heads, normalisation)
    return None


# --- details --------------------------------------------------------------------------------------------


def _rows(layer: Any, rows: Sequence[int]) -> Any:
    """A convolution or linear layer with some of the outputs of another."""
    chosen = copy.deepcopy(layer)
    chosen.weight = nn.Parameter(layer.weight.detach()[list(rows)].clone())
    chosen.bias = nn.Parameter(layer.bias.detach()[list(rows)].clone())
    if isinstance(layer, nn.Conv2d):
        chosen.out_channels = len(rows)
    else:
        chosen.out_features = len(rows)
    return chosen


def _set_threshold(model: nn.Module, score_threshold: float) -> None:
    holder: Any = model.roi_heads if isinstance(model, zoo.FasterRCNN) else model
    assert isinstance(holder.score_thresh, float), "torchvision keeps its threshold here"
    holder.score_thresh = score_threshold


def _described(transform: Any) -> Preprocessing:
    mean, std = (tuple(255 * value for value in values) for values in (transform.image_mean, transform.image_std))
    if transform.fixed_size is not None:
        size = f"stretched to {transform.fixed_size[0]} x {transform.fixed_size[1]}"
    else:
        size = f"short side {max(transform.min_size)}, long side {transform.max_size}"
    return Preprocessing(size, "RGB", mean, std)
