"""The detectors that can be built and trained here, by the name that recipes and checkpoints have for them."""

from __future__ import annotations

from typing import Literal

from compress.detectors.backbones import Backbone
from compress.detectors.base import Detector
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
