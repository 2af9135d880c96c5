"""A tiny dense detector with the contract of the real ones, and files made with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from compress.detectors.base import DensePrediction, Detector
from compress.export.deployable import Deployable
from deploy.core.card import ModelCard
from deploy.graph.export import ExportReport, export_onnx
from deploy.runtimes.onnx import OnnxRunner

BINS = 5
SIZE = (64, 96)
CARD = ModelCard(
    name="tiny",
    class_names=["a", "b", "c"],
    category_ids=[2, 4, 9],
    input_size=SIZE,
    score_threshold=0.05,
    max_detections=20,
    candidates=60,
)


class TinyDetector(nn.Module):
    """Two levels of random convolutions; its scores spread over 0..1, so thresholds and suppression have
    work."""

    num_classes = 3
    strides = (8, 16)
    has_nms = True
    capabilities = Detector.capabilities
    in_half = Detector.in_half
    prepare_export = Detector.prepare_export

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 12, 8, stride=8)
            self.down = nn.Conv2d(12, 12, 3, stride=2, padding=1)
            self.cls = nn.Conv2d(12, 3, 3, padding=1)
            self.reg = nn.Conv2d(12, 4 * BINS, 3, padding=1)
        with torch.no_grad():
            self.cls.weight.mul_(6)
            self.cls.bias.fill_(-2.0)

    def features(self, images: Tensor) -> list[Tensor]:
        x = (images.float() - 116.0) / 58.0
        first = F.relu(self.stem(x))
        return [first, F.relu(self.down(first))]

    def predict(self, features: list[Tensor]) -> DensePrediction:
        return DensePrediction([self.cls(f) for f in features], [self.reg(f) for f in features], self.strides)

    def decode_boxes(self, prediction: DensePrediction) -> Tensor:
        levels = []
        for logits, stride in zip(prediction.distribution, prediction.strides, strict=True):
            batch, _, height, width = logits.shape
            bins = torch.arange(BINS, dtype=logits.dtype, device=logits.device)
            spread = logits.reshape(batch, 4, BINS, height * width).softmax(2)
            left, top, right, bottom = ((spread * bins[:, None]).sum(2) * stride).unbind(1)
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            x, y = x.flatten().to(logits) * stride, y.flatten().to(logits) * stride
            levels.append(torch.stack([x - left, y - top, x + right, y + bottom], -1))
        return torch.cat(levels, 1)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 3, 64, 96]: noise at several scales."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (count, 3, 8, 12)).repeat(8, 2).repeat(8, 3)
    return (coarse + rng.integers(0, 56, (count, 3, *SIZE))).astype(np.uint8)


def labelled_pictures(model: Path, folder: Path, *, seed: int, boxes: int) -> tuple[Path, Path]:
    """Six pictures in `folder` whose objects are what `model` finds best in each, so that its mAP is near 100 and every
    error costs. Returns the COCO file and the folder."""
    shown = pictures(6, seed=seed)
    found = OnnxRunner(model)(shown)
    images, objects = [], []
    for i, pixels in enumerate(shown):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE[1], "height": SIZE[0]})
        for k in range(boxes):
            x1, y1, x2, y2 = found.boxes[i, k].tolist()
            category = CARD.category_ids[found.labels[i, k]]
            box = {"image_id": i, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            objects.append({**box, "id": len(objects) + 1, "area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
    categories = [{"id": i, "name": n} for i, n in zip(CARD.category_ids, CARD.class_names, strict=True)]
    file = folder / "labels.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return file, folder


def deployable(seed: int = 0, card: ModelCard = CARD) -> Deployable:
    return Deployable.from_card(TinyDetector(seed), card)  # type: ignore[arg-type]


def export_tiny(path: Path, seed: int = 0, card: ModelCard = CARD) -> ExportReport:
    return export_onnx(deployable(seed, card), card, path, samples=pictures(8), max_batch=8)
