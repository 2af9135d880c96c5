"""The detectors that can be built and trained here, by the name that recipes and checkpoints have for them."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from compress.config.model import Model
from compress.detectors.backbones import Backbone, build_backbone
from compress.detectors.base import Capability, Detector, ImageSize
from compress.detectors.gfl import GFL

Family = Literal["gfl", "fcos", "retinanet", "faster_rcnn"]


def build_family(
    family: Family,
    num_classes: int,
    backbone: Backbone,
    *,
    neck_channels: int,
    head_depth: int,
    anchor_scale: float | None = None,
    roi_samples: int | None = None,
    compiled: bool = False,
) -> Detector:
    """A detector with fresh neck and head.

    Args:
        neck_channels: width of the pyramid and the heads.
        head_depth: convolutions of a tower, see the families.
        anchor_scale: of families with anchors, in strides; None: the family's own.
        roi_samples: of Faster R-CNN; None: torchvision's.
        compiled: run GFL's dense loss passes through torch.compile.
    """
    shape = {"neck_channels": neck_channels, "head_depth": head_depth}
    if family == "gfl":
        return GFL(num_classes, backbone, **shape, compiled=compiled)
    # Here: torchvision's detectors take a second to import.
    from compress.detectors.torchvision import dense as torchvision_dense
    from compress.detectors.torchvision import two_stage as torchvision_two_stage

    if family == "fcos":
        return torchvision_dense.FCOS.build(num_classes, backbone, **shape)
    if family == "retinanet":
        scale = torchvision_dense.ANCHOR_SCALE if anchor_scale is None else anchor_scale
        return torchvision_dense.RetinaNet.build(num_classes, backbone, **shape, anchor_scale=scale)
    scale = torchvision_two_stage.ANCHOR_SCALE if anchor_scale is None else anchor_scale
    samples = torchvision_two_stage.ROI_SAMPLES if roi_samples is None else roi_samples
    return torchvision_two_stage.FasterRCNN.build(
        num_classes, backbone, **shape, anchor_scale=scale, roi_samples=samples
    )


def build_detector(model: Model, num_classes: int, seed: int, *, compiled: bool = False) -> Detector:
    """A fresh detector; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        assert model.backbone is not None
        backbone = build_backbone(
            model.backbone,
            weights=model.weights,
            frozen_stages=model.frozen_stages,
            norm_eval=model.norm_eval,
        )
        detector = build_family(
            cast(Family, model.detector),
            num_classes,
            backbone,
            neck_channels=model.neck_channels,
            head_depth=model.head_depth,
            anchor_scale=model.anchor_scale,
            roi_samples=model.roi_samples,
            compiled=compiled,
        )
    return detector.to(memory_format=torch.channels_last)


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy the layers of the teacher's neck and head whose weights have the student's shapes. Returns the keys; empty
    when no convolution fits, and then nothing is copied."""
    own, theirs = student.state_dict(), teacher.state_dict()

    def fits(key: str) -> bool:
        return key in own and own[key].shape == theirs[key].shape

    def weight_of(key: str) -> str:
        layer = key.rpartition(".")[0]
        return f"{layer}.weight" if f"{layer}.weight" in theirs else key

    keys = [key for key in theirs if not key.startswith("backbone.") and fits(key) and fits(weight_of(key))]
    if not any(key.endswith("weight") and theirs[key].dim() == 4 for key in keys):
        return []
    student.load_state_dict({key: theirs[key] for key in keys}, strict=False)
    return keys


def model_size(detector: Detector, size: tuple[int, int]) -> dict[str, float]:
    """`params_m` (millions) and `gflops` of one image of `size` (height, width). A multiply-add is two FLOPs. Of a
    detector in two stages with the proposals of an empty image."""
    was_training = detector.training
    detector.eval()
    images = torch.zeros(1, 3, *size, dtype=torch.uint8, device=next(detector.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prediction = detector(images)
        if Capability.DENSE not in detector.capabilities:  # the rest of its network comes with the boxes
            detector.decode(prediction, [ImageSize(size, size)])
    detector.train(was_training)
    params = sum(p.numel() for p in detector.parameters())
    return {"params_m": round(params / 1e6, 4), "gflops": round(counter.get_total_flops() / 1e9, 4)}
