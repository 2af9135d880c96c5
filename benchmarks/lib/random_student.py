"""A GFL student with a ResNet-18 of random weights, for measurements of speed alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.lib.photographs import CLASSES, write_photographs
from compress.detectors.backbones import build_backbone
from compress.detectors.gfl import GFL
from compress.export.deployable import Deployable
from deploy.core.canvas import fit_canvas
from deploy.core.card import ModelCard
from deploy.core.image import decode_image, read_image_bytes
from deploy.graph.export import export_onnx

SPREAD = 2.0
NAME = "GFL-R18, random weights"


def random_student() -> GFL:
    """Class logits are spread a little, so that suppression has boxes to work on, as in a trained detector."""
    torch.manual_seed(0)
    detector = GFL(CLASSES, build_backbone("resnet18", weights="none", frozen_stages=-1, norm_eval=False))
    with torch.no_grad():
        detector.head.gfl_cls.weight.mul_(SPREAD)
    return detector.eval()


def card_of(classes: int, size: tuple[int, int]) -> ModelCard:
    """The card of a benchmarked file. size: height and width of its input."""
    return ModelCard(
        name="benchmark",
        class_names=[f"class {k}" for k in range(classes)],
        category_ids=list(range(1, classes + 1)),
        input_size=size,
    )


def canvases(images: Sequence[Path], card: ModelCard) -> np.ndarray:
    """Image files as the file's input: uint8 [n, 3, height, width]."""
    return np.stack([fit_canvas(decode_image(read_image_bytes(path), str(path)), card)[0] for path in images])


def export_random_student(path: str, height: int, width: int) -> None:
    """Write its ONNX file; photographs to check it with are made beside it."""
    out, card = Path(path), card_of(CLASSES, (height, width))
    write_photographs(out.parent, 2)
    samples = canvases(sorted(out.parent.glob("*.jpg")), card)
    export_onnx(Deployable.from_card(random_student(), card), card, out, samples=samples, max_batch=2)
