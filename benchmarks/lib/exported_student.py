"""A student of random weights with its exported files, float and int8: for measurements of speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.lib.photographs import CLASSES
from compress.detectors.backbones import build_backbone
from compress.detectors.gfl import GFL
from compress.detectors.level_norm import LevelNorm
from compress.export.deployable import Deployable, TorchRunner
from deploy.core.canvas import fit_canvas, to_original
from deploy.core.card import ModelCard
from deploy.core.image import decode_image
from deploy.core.precisions import file_for
from deploy.graph.export import export_onnx
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer
from deploy.runtimes.base import Runner


def exported_student(
    backbone: str, size: int, folder: Path, photographs: list[bytes]
) -> tuple[dict[str, Path], TorchRunner]:
    """Exported files by precision, made unless they are in `folder`, and the torch module with the same weights.

    photographs: bytes of the pictures in `folder`/photographs, on which files are checked and calibrated.
    """
    out = folder / f"{backbone}_{size}.onnx"
    module, card, samples = student(backbone, size, photographs)
    if not out.is_file():
        export_onnx(module, card, out, samples=samples, max_batch=2)
    files = {"fp32": out, "int8 cpu": file_for(out, "int8"), "int8 cpu, outputs too": out.with_suffix(".all.int8.onnx")}
    for name, kept in (("int8 cpu", None), ("int8 cpu, outputs too", ())):
        if not files[name].is_file():
            photos = sorted((folder / "photographs").glob("*.jpg"))
            Quantizer(out, choose_images(photos, len(photos)), "cpu").save(files[name], kept, max_batch=2)
    return files, TorchRunner(module, card)


def student(
    backbone: str, size: int, photographs: list[bytes], *, head_norm: str = "group", passing: int = 1000
) -> tuple[Deployable, ModelCard, np.ndarray]:
    """The module that is exported, its card, and the photographs on its canvas.

    Args:
        head_norm: `batch` has the statistics of the photographs.
        passing: how many (location, class) pairs of the first one pass the score threshold.
    """
    torch.manual_seed(0)
    detector = GFL(CLASSES, build_backbone(backbone, weights="none"), head_norm=head_norm).eval()
    names = [f"class {i}" for i in range(CLASSES)]
    card = ModelCard(name=backbone, class_names=names, category_ids=list(range(CLASSES)), input_size=(size, size))
    samples = np.stack([fit_canvas(decode_image(data), card)[0] for data in photographs])
    norms = [module for module in detector.modules() if isinstance(module, LevelNorm)]
    for norm in norms:
        norm.train()
    for layer in (layer for norm in norms for layer in norm.modules() if isinstance(layer, nn.BatchNorm2d)):
        layer.momentum = None  # the mean of what it sees
    if norms:
        with torch.no_grad():
            detector(torch.from_numpy(samples))
    _spread(detector.eval(), torch.from_numpy(samples[:1]), passing)
    return Deployable.from_card(detector, card), card, samples


def end_to_end(runner: Runner, data: bytes) -> None:
    """Bytes of an image file to boxes in its pixels."""
    pixels = decode_image(data)
    canvas, scale = fit_canvas(pixels, runner.card)
    found = runner(canvas[None])
    to_original(found.boxes[0, : int(found.count[0])], scale, pixels.shape[:2])


# --- details --------------------------------------------------------------------------------------------


@torch.no_grad()
def _spread(detector: GFL, image: torch.Tensor, passing: int) -> None:
    """Make so many (location, class) pairs pass the score threshold, so that suppression has work to do."""
    head = detector.head.gfl_cls
    assert head.bias is not None

    def logits() -> torch.Tensor:
        return torch.cat([level.flatten() for level in detector(image).logits])

    head.weight.mul_(1.5 / logits().std())
    head.bias.zero_()
    head.bias.fill_(float(np.log(0.05 / 0.95) - logits().topk(passing).values[-1]))
