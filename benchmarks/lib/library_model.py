"""Real-time DETRs of random weights, and the library's own model around the same weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.lib.photographs import CLASSES
from compress.config.model import Model
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from deploy.core.card import ModelCard
from deploy.runtimes.base import DetectionBatch

SPREAD = 10.0


def random_detr(family: str, size: str, canvases: np.ndarray) -> Detector:
    """A detector with the BatchNorm statistics of pictures and scores that spread: where all places score alike,
    rounding chooses other queries. canvases: uint8 [n, 3, height, width]."""
    detector = build_detector(Model(detector=family, size=size), CLASSES, 0).train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of what it sees
    network: Any = detector.network
    with torch.no_grad():
        detector(torch.from_numpy(canvases))
        network.enc_score_head.weight.mul_(SPREAD)
    return detector.eval()


def library_model(detector: Any) -> nn.Module:
    """The library's whole model with a copy of the detector's weights, in the library's memory layout."""
    import transformers

    network = copy.deepcopy(detector.network)
    model = getattr(transformers, detector.library)(network.config)
    model.model = network
    model.class_embed, model.bbox_embed = network.decoder.class_embed, network.decoder.bbox_embed
    whole: nn.Module = model.train(detector.training).to(memory_format=torch.contiguous_format)
    return whole


class LibraryRunner:
    """The library's model and its `post_process_object_detection`, as a Runner on the CPU."""

    backend, on_cpu = "transformers cpu", True

    def __init__(self, detector: Detector, card: ModelCard) -> None:
        import transformers

        self.card = card
        self._model = library_model(detector).eval()
        self._processor = transformers.RTDetrImageProcessor()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> DetectionBatch:
        outputs = self._model(torch.from_numpy(images) / 255)
        threshold, most = self.card.score_threshold, self.card.max_detections
        sizes = [self.card.input_size] * len(images)
        found = self._processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        batch = DetectionBatch(
            np.zeros((len(images), most, 4), np.float32),
            np.zeros((len(images), most), np.float32),
            np.zeros((len(images), most), np.int64),
            np.array([min(most, len(rows["scores"])) for rows in found], np.int32),
        )
        for index, (rows, count) in enumerate(zip(found, batch.count, strict=True)):
            for name in ("boxes", "scores", "labels"):
                getattr(batch, name)[index, :count] = rows[name][:count].numpy()
        return batch
