"""The module that ships: uint8 images in, final detections out.

`Deployable` is what gets exported; `TorchRunner` runs it in PyTorch with the same interface as the runtimes
of the `deploy` package, so that validation and benchmarks treat a checkpoint and an exported file alike.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.detectors.base import Capability, Detector
from compress.export.nms import select_detections
from deploy.core.card import CANDIDATES, MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD, ModelCard
from deploy.core.errors import UserError
from deploy.runtimes.base import DetectionBatch, check_images


class Deployable(nn.Module):
    """A dense detector with its post-processing, for one input size. Put it in eval mode before use.

    forward: images uint8 [B, 3, H, W] RGB → boxes float32 [B, D, 4] xyxy in pixels of the input canvas and
    clipped to it, scores float32 [B, D], labels int64 [B, D], count int32 [B]; zeros past `count`. `dense`
    and `select` are its two halves: everything continuous, then everything that decides. An export compares
    them one by one.

    Any detector whose class says that it is `exportable`, a user's own too: `features`, `predict` and `decode_boxes`
    go into the graph, and the prediction's `float` and `scores`, which a `DensePrediction` has. `detector` normalises
    the images itself; without `has_nms` nothing is suppressed. `candidates` is explained in `select_detections`.
    """

    def __init__(
        self,
        detector: Detector,
        input_size: tuple[int, int],
        *,
        score_threshold: float = SCORE_THRESHOLD,
        nms_threshold: float = NMS_THRESHOLD,
        max_detections: int = MAX_DETECTIONS,
        candidates: int = CANDIDATES,
    ) -> None:
        super().__init__()
        if any(side < 1 or side % 32 for side in input_size):
            raise UserError(f"deploy.input_size: {list(input_size)}: height and width must be multiples of 32")
        self.detector = detector
        self.input_size = input_size
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.candidates = candidates
        self.chooses_rows = Capability.DENSE not in detector.capabilities

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.select(*self.dense(images))

    def dense(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images uint8 [B, 3, H, W] → scores float32 [B, A, K] in 0..1, boxes float32 [B, A, 4] on the
        canvas."""
        height, width = self.input_size
        prediction = self.detector.predict(self.detector.features(images)).float()
        scores = prediction.scores()
        x1, y1, x2, y2 = self.detector.decode_boxes(prediction).float().unbind(-1)
        boxes = (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height))
        return scores, torch.stack(boxes, -1)

    def select(self, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Threshold, non-maximum suppression and padding of what `dense` gives."""
        return select_detections(
            scores,
            boxes,
            score_threshold=self.score_threshold,
            iou_threshold=self.nms_threshold if self.detector.has_nms else None,
            max_detections=self.max_detections,
            candidates=self.candidates,
        )

    @classmethod
    def from_card(cls, detector: Detector, card: ModelCard) -> Deployable:
        """Wrap `detector` with the input size and the thresholds of `card`, in eval mode."""
        module = cls(
            detector,
            card.input_size,
            score_threshold=card.score_threshold,
            nms_threshold=card.nms_threshold,
            max_detections=card.max_detections,
            candidates=card.candidates,
        )
        detector.prepare_export(card.input_size)
        return module.eval()


def marked_for_half(module: Deployable) -> Deployable:
    """A copy whose network is in float64: the mark of what the file shall compute in float16, see `deploy.graph.half`.

    What the detector names (`in_half`: backbone, neck, head) is marked and takes its inputs in float64. In float32
    remain: what the detector itself holds and does (it normalises the pixels), everything after its predictions
    (scores, boxes, suppression), and norms that average over a map. A strongly typed TensorRT network computes in the
    types that are written, and the sum of squares over a map of 100 × 168 does not fit into float16.
    """
    module = copy.deepcopy(module)
    for child in module.detector.in_half().values():
        child.double()
        child.register_forward_pre_hook(lambda _, inputs: _to(torch.float64, inputs))
        for norm in child.modules():
            if isinstance(norm, (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
                norm.float()
                norm.register_forward_pre_hook(lambda _, inputs: _to(torch.float32, inputs))
                norm.register_forward_hook(lambda _, inputs, output: _to(torch.float64, output))
    return module.eval()


def _to(dtype: torch.dtype, value: Any) -> Any:
    """Floating-point tensors in `dtype`, in tuples and lists too; other values as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_to(dtype, item) for item in value) if isinstance(value, (tuple, list)) else value


class TorchRunner:
    """A `Deployable` as a Runner: NumPy in, NumPy out, on one device, in float32."""

    def __init__(self, module: Deployable, card: ModelCard, device: str | torch.device = "cpu") -> None:
        if card.input_size != tuple(module.input_size):
            raise ValueError(f"the card says {card.input_size}, the module {module.input_size}")
        self.card = card
        self.device = torch.device(device)
        self.backend = f"torch {self.device.type}"
        self.on_cpu = self.device.type == "cpu"
        self.module = module.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> DetectionBatch:
        """images uint8 [B, 3, H, W] of the card's size → a DetectionBatch. Waits for the device."""
        check_images(images, self.card)
        outputs = self.module(torch.from_numpy(images).to(self.device))
        return DetectionBatch(*(value.cpu().numpy() for value in outputs))
