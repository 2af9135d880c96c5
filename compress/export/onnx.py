"""A checkpoint as an ONNX file: rebuild the detector, wrap it, export it, compare it with torch."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from compress.config.deploy import Deploy
from compress.data.batch import pad_images
from compress.data.coco import Transform, load_tensor
from compress.data.transforms import eval_transform
from compress.detectors.build import exportable_families
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.export.deployable import Deployable, TorchRunner, marked_for_half
from compress.export.folded import folded
from compress.versions import versions
from deploy.core.canvas import fit_canvas
from deploy.core.card import PAD_COLOR, PROCESSING, ModelCard
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.image import load_image
from deploy.core.precisions import PRECISIONS
from deploy.graph.export import ExportReport, export_onnx

SAMPLES = 16  # images that an export is checked on
MEASURED = 32  # images that the numbers of half precision are measured on


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    settings: Deploy,
    *,
    input_size: tuple[int, int],
    images: Sequence[Path],
    resize_short_long: tuple[int, int] | None = None,
    precision: str = "fp32",
    measured: Sequence[Path] | None = None,
) -> ExportReport:
    """Export a native checkpoint to `out`.

    Args:
        settings: thresholds and limits; its `input_size` is not looked at.
        input_size: (height, width) of the canvas in pixels, multiples of 32.
        resize_short_long: (short, long) in pixels that an image is not enlarged beyond, as in training; None: what the
            checkpoint says; where it does not, the canvas alone.
        images: files that the result is compared with torch on; the first 16 are used.
        precision: a float one of `PRECISIONS`. A network in float16 is compared with the float32 module.
        measured: files that the numbers of a network in float16 are measured on; None: `images`. The first 32 are used.

    Raises:
        UserError: the checkpoint or an image cannot be used. `ExportMismatchError`: the graph is wrong.
    """
    kind = PRECISIONS[precision]
    runner = torch_runner(str(checkpoint), settings, input_size, resize_short_long=resize_short_long)
    module = cast(Deployable, folded(runner.module))
    return export_onnx(
        marked_for_half(module) if kind.half else module,
        runner.card,
        out,
        samples=canvases(images, runner.card, SAMPLES),
        reference=runner.module,
        measured_on=canvases(measured or images, runner.card, MEASURED) if kind.half else None,
        max_batch=settings.max_batch,
        score_tolerance=kind.score_tolerance,
        box_tolerance_px=kind.box_tolerance_on(input_size),
    )


def torch_runner(
    checkpoint: str,
    settings: Deploy,
    input_size: tuple[int, int],
    *,
    resize_short_long: tuple[int, int] | None = None,
    categories: Mapping[int, str] | None = None,
    device: str = "cpu",
) -> TorchRunner:
    """A checkpoint (a file or `zoo:<name>`) in PyTorch, with the post-processing of an exported file.

    resize_short_long: see `export_checkpoint`. categories: id → name in label order, for a checkpoint that does not say
    which classes it knows.
    """
    detector, record = load_teacher_checkpoint(checkpoint)
    if detector.exportable is not None:
        raise UserError(
            f"{checkpoint}: {detector.family} cannot be exported: {detector.exportable}; it trains and teaches. Ship a "
            f"{exportable_families()} student"
        )
    if record.class_names is not None and record.category_ids is not None:
        categories = dict(zip(record.category_ids, record.class_names, strict=True))
    if categories is None:
        raise UserError(f"{checkpoint}: does not say which classes it was trained on; a shipped file must")
    short, long = resize_short_long or record.resize_short_long or (None, None)
    card = ModelCard(
        name=Path(checkpoint).stem,
        class_names=list(categories.values()),
        category_ids=list(categories),
        input_size=input_size,
        short=short,
        long=long,
        pad_color=PAD_COLOR,
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
        max_detections=settings.max_detections,
        candidates=settings.candidates,
        precision={"model": "fp32", PROCESSING: "fp32"},
        checkpoint_sha256=sha256_of(checkpoint_file(checkpoint)),
        recipe_sha256=record.recipe_sha256 or "",
        operating_point=record.operating_point,
        val_map=record.val_map,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return TorchRunner(Deployable.from_card(detector, card), card, device)


def canvases(images: Sequence[Path], card: ModelCard, most: int) -> np.ndarray:
    """The first images, at most so many, as uint8 [N, 3, H, W] canvases of `card`. Where the card has the limits of a
    training, it must lay them as training's evaluation does. Raises UserError."""
    if not images:
        raise UserError("no images to check the export on; give a folder with --images")
    found = []
    for path in images[:most]:
        found.append(fit_canvas(load_image(path), card)[0])
        if card.short is not None and card.long is not None:
            _check_canvas(found[-1], path, eval_transform(card.short, card.long, card.input_size), card)
    return np.stack(found)


def _check_canvas(canvas: np.ndarray, path: Path, transform: Transform, card: ModelCard) -> None:
    image = transform(load_tensor(path), torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))[0]
    if not np.array_equal(canvas, pad_images([image], card.input_size)[0].numpy()):
        raise UserError(
            f"{path}: the file's reader lays it on another canvas than training's evaluation, to the bit; nothing was "
            "exported, since other detections would ship than those that were measured"
        )
