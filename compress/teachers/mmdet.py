"""Detectors of mmdet 3.x as teachers, from its config and checkpoint: `open_mmdet`.

The network, its normalisation and its selection of detections are mmdet's own; images are those that the student sees
(the config's pipeline is not run, so choose `data.short` and `data.long` near its image size). What a model gives:

    boxes     every detector that finds boxes in plain images, by mmdet's `predict` with the config's thresholds
    features  those whose backbone and neck give maps of one width
    dense     GFL and LD (of 17 bins), ATSS, RetinaNet and FCOS heads with sigmoid scores; distributions, GFL and LD

mmdet is imported when a teacher is opened, and by nothing else. A config is a Python program and is run; the
checkpoint's code is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.config.teacher import Mmdet
from compress.data.batch import ImageSize
from compress.detectors.base import REG_MAX, Capability, DensePrediction, Detector, ImageDetections
from compress.teachers.base import DetectorTeacher, Preprocessing
from compress.teachers.mmdet_files import (
    build,
    class_names,
    gets_rgb,
    load_weights,
    need_mmdet,
    number_of_classes,
    read_checkpoint,
    read_config,
    what_failed,
)
from deploy.core.errors import UserError
from deploy.core.files import sha256_of

PROBE = 256  # side in pixels of the image that shows what a model gives; every usual stride divides it


def open_mmdet(source: Mmdet, device: torch.device) -> DetectorTeacher:
    """The detector of a config and a checkpoint, frozen on `device`.

    Raises UserError: mmdet is not installed or does not work; a file cannot be read; the weights do not fit the config;
    the model does not find boxes in plain images.
    """
    detector, names, config_sha256 = load_mmdet(source.config, source.checkpoint)
    teacher = DetectorTeacher(
        detector,
        file=source.checkpoint.name,
        sha256=sha256_of(source.checkpoint),
        class_names=names,
        device=device,
        settings={"mmdet_model": config_sha256},
    )
    if detector.capabilities == {Capability.BOXES}:
        teacher.detector = None
    teacher.preprocessing = Preprocessing(
        "as the student's images",
        "RGB" if detector.rgb else "BGR",
        tuple(detector.network_mean.flatten().tolist()),
        tuple(detector.network_std.flatten().tolist()),
    )
    return teacher


def load_mmdet(config: Path, checkpoint: Path) -> tuple[MmdetDetector, tuple[str, ...] | None, str]:
    """The detector on the CPU in eval mode, its class names in label order (None where neither file says them), and the
    SHA-256 of the model section of the config with all it inherits. Raises UserError as `open_mmdet` does."""
    need_mmdet()
    settings = read_config(config)
    content = read_checkpoint(checkpoint)
    model = build(config, settings)
    load_weights(model, content, f"teacher.mmdet: {checkpoint} does not fit {config}")
    K = number_of_classes(model)
    names = class_names(settings, content, K)
    try:
        detector = MmdetDetector(model.eval(), K or len(names or ()), rgb=gets_rgb(settings))
    except Exception as error:  # whatever a foreign model raises on an image without text, points, masks …
        raise UserError(
            f"teacher.mmdet.config: {config}: its {type(model).__name__} cannot detect in a plain image "
            f"({what_failed(error)}); only detectors of boxes in single images can teach"
        ) from error
    text = settings.model.to_dict() if hasattr(settings.model, "to_dict") else settings.model
    return detector, names, hashlib.sha256(repr(text).encode()).hexdigest()


@dataclass
class Seen:
    """Images on their way to `decode` where the head is not dense: float [B, 3, H, W], normalised."""

    images: Tensor


@dataclass
class Maps:
    """Output of a head that is not dense: nothing that a method could use but the strides."""

    maps: list[Tensor]
    strides: tuple[int, ...]


class MmdetDetector(Detector):
    """A detector of mmdet.

    Args:
        model: an mmdet `BaseDetector` in eval mode.
        num_classes: K; 0 where nothing says.
        rgb: whether its network gets channels in the order RGB, else BGR.

    Raises what the model raises when it is asked to detect in a plain image.
    """

    def __init__(self, model: nn.Module, num_classes: int, *, rgb: bool) -> None:
        super().__init__()
        preprocessor: Any = model.data_preprocessor
        self.model: Any = model
        self.rgb = rgb
        self.family = f"mmdet's {type(model).__name__}"
        self.num_classes = num_classes
        self.pad_multiple, self.pad_value = int(preprocessor.pad_size_divisor), float(preprocessor.pad_value)
        mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
        if getattr(preprocessor, "_enable_normalize", True):
            mean, std = preprocessor.mean.view(1, -1, 1, 1), preprocessor.std.view(1, -1, 1, 1)
        self.network_mean: Tensor
        self.network_std: Tensor
        self.register_buffer("network_mean", mean.float().clone(), persistent=False)
        self.register_buffer("network_std", std.float().clone(), persistent=False)
        self.register_buffer("mean", mean.float() if rgb else mean.float().flip(1), persistent=False)
        self.register_buffer("std", std.float() if rgb else std.float().flip(1), persistent=False)
        self._dense = _dense_head(model)
        self.capabilities = frozenset({Capability.BOXES}) | self._probe()
        if Capability.FEATURES not in self.capabilities:
            self._dense = None

    @torch.no_grad()
    def _probe(self) -> frozenset[Capability]:
        """Run the model once; sets strides, feature_channels and cells. Raises what the model raises in detection."""
        image = torch.zeros(1, 3, PROBE, PROBE, dtype=torch.uint8)
        side = (PROBE, PROBE)
        self._detect(self._normalised(image), [ImageSize(side, side)])
        self.strides, self.feature_channels, self.cells = (), 0, None
        try:
            maps = self.features(image)
        except Exception:  # a model need not have maps; boxes it gave
            return frozenset()
        pyramid = all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == x.shape[3] for x in maps)
        if not maps or not pyramid or len({x.shape[1] for x in maps}) > 1:
            return frozenset()
        self.strides = tuple(round(PROBE / x.shape[2]) for x in maps)
        self.feature_channels = int(maps[0].shape[1])
        if self._dense is None:
            return frozenset({Capability.FEATURES})
        if self._dense.anchors > 1:
            bases = self.model.bbox_head.prior_generator.base_anchors
            self.cells = tuple(tuple((x2 - x1, y2 - y1) for x1, y1, x2, y2 in base.tolist()) for base in bases)
        dense = {Capability.FEATURES, Capability.DENSE}
        return frozenset(dense | {Capability.DISTRIBUTIONS} if self._dense.distribution else dense)

    def _normalised(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] → what the network gets."""
        x = images if self.rgb else images.flip(1)
        x = (x.to(self.network_mean.dtype) - self.network_mean) / self.network_std
        below, right = (-x.shape[2] % self.pad_multiple, -x.shape[3] % self.pad_multiple)
        return F.pad(x, (0, right, 0, below), value=self.pad_value) if below or right else x

    def features(self, images: Tensor) -> list[Tensor]:
        """uint8 RGB images [B, 3, H, W] → the maps of backbone and neck, each [B, C, h, w]."""
        return list(self.model.extract_feat(self._normalised(images)))

    def predict(self, features: list[Tensor]) -> DensePrediction | Maps:
        """Run a dense head on the maps. `sides` are as the head's box coder takes them: distances in pixels in
        FCOS, deltas of anchors in ATSS and RetinaNet. FCOS's locations lie half a stride right of and below those that
        `DensePrediction` speaks of; `decode_boxes` has them right."""
        if self._dense is None:
            return Maps(features, self.strides)
        logits, sides, *centerness = self.model.bbox_head(tuple(features))
        if self._dense.distribution:
            return DensePrediction(list(logits), list(sides), self.strides)
        return DensePrediction(
            list(logits),
            [],
            self.strides,
            box_deltas=list(sides),
            centerness=list(centerness[0]) if centerness else [],
            anchors=self._dense.anchors,
        )

    def forward(self, images: Tensor) -> Any:
        """A `DensePrediction` or `Seen`, for `decode`."""
        return Seen(self._normalised(images)) if self._dense is None else self.predict(self.features(images))

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        if self._dense is None:
            raise self._lacks(Capability.DENSE)
        head = self.model.bbox_head
        device = prediction.logits[0].device
        raw = prediction.distribution or prediction.box_deltas
        levels = zip(raw, head.prior_generator.grid_priors(prediction.level_sizes, device=device), strict=True)
        boxes = []
        for (x, priors), stride in zip(levels, prediction.strides, strict=True):
            B = x.shape[0]
            x = x.permute(0, 2, 3, 1)  # [B, h, w, N * 4] or [B, h, w, 4 * bins]
            if self._dense.distribution:
                priors, x = head.anchor_center(priors), head.integral(x) * stride
            decoded = head.bbox_coder.decode(priors.repeat(B, 1), x.reshape(-1, 4))
            boxes.append(decoded.view(B, -1, 4))
        return torch.cat(boxes, 1)

    @torch.no_grad()
    def decode(
        self,
        prediction: Any,
        sizes: Sequence[ImageSize],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[ImageDetections]:
        """Detections in pixels of each image file, best first: those that mmdet selects by the thresholds
        of the config, of which scores above `score_threshold` are kept. The other two settings are the config's.
        """
        if nms_threshold is not None or max_detections is not None:
            raise ValueError("NMS and the number of detections are settings of the mmdet config")
        if isinstance(prediction, Seen):
            return self._detect(prediction.images, sizes, score_threshold)
        prediction = prediction.float()
        height, width = (side * prediction.strides[0] for side in prediction.level_sizes[0])
        outputs = [prediction.logits, prediction.distribution or prediction.box_deltas]
        if prediction.centerness:
            outputs.append(prediction.centerness)
        metas = [_meta(size, (height, width)) for size in sizes]
        found = self.model.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=True)
        return [_detections(instances, score_threshold) for instances in found]

    def _detect(
        self, images: Tensor, sizes: Sequence[ImageSize], score_threshold: float = 0.0
    ) -> list[ImageDetections]:
        """mmdet's `predict` on normalised images."""
        from mmdet.structures import DetDataSample

        shape = (int(images.shape[2]), int(images.shape[3]))
        samples = [DetDataSample(metainfo=_meta(size, shape)) for size in sizes]
        found = self.model.predict(images, samples, rescale=True)
        return [_detections(sample.pred_instances, score_threshold) for sample in found]


# --- outputs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dense:
    """A dense head whose outputs we know. distribution: boxes are distributions over our bins; anchors: predictions a
    location."""

    distribution: bool
    anchors: int


def _dense_head(model: Any) -> _Dense | None:
    """None for heads that differ, also for those derived from these: they give the same names another meaning."""
    head: Any = getattr(model, "bbox_head", None)
    kind = type(head).__name__
    known = ("GFLHead", "LDHead", "ATSSHead", "RetinaHead", "FCOSHead")
    if head is None or kind not in known or not type(head).__module__.startswith("mmdet.") or not head.use_sigmoid_cls:
        return None
    distribution = kind in ("GFLHead", "LDHead")
    if distribution and (head.reg_max != REG_MAX or head.prior_generator.center_offset != 0):
        return None
    return _Dense(distribution, int(head.prior_generator.num_base_priors[0]))


def _meta(size: ImageSize, shape: tuple[int, int]) -> dict[str, Any]:
    """Describe an image in a batch of `shape` as mmdet's pipeline would."""
    (height, width), (file_height, file_width) = size.network, size.original
    return {
        "img_shape": (height, width),
        "ori_shape": (file_height, file_width),
        "pad_shape": shape,
        "batch_input_shape": shape,
        "scale_factor": (width / file_width, height / file_height),
    }


def _detections(instances: Any, score_threshold: float) -> ImageDetections:
    scores, order = instances.scores.float().sort(descending=True, stable=True)
    order = order[scores > score_threshold]
    return ImageDetections(
        instances.bboxes.float()[order], instances.scores.float()[order], instances.labels[order].to(torch.int64)
    )
