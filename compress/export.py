"""Checkpoint → deployable ONNX file: rebuild the detector, wrap it, export it, prove it (`deploy.export`)."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compress.data.batch import PAD_COLOR
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.detectors.deployable import Deployable, TorchRunner
from compress.recipe import Deploy
from compress.versions import versions
from deploy.card import ModelCard
from deploy.errors import UserError
from deploy.export import ExportReport, export_onnx
from deploy.files import sha256_of
from deploy.preprocess import fit_canvas, load_image

SAMPLES = 16  # images that an export is checked on


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    settings: Deploy,
    *,
    input_size: tuple[int, int],
    images: Sequence[Path],
    limits: tuple[int, int] | None = None,
) -> ExportReport:
    """Export a native checkpoint to `out`.

    Args:
        settings: thresholds and limits; its `input_size` is not looked at.
        input_size: (height, width) of the canvas in pixels, multiples of 32.
        limits: (short, long) in pixels that an image is not enlarged beyond, as in training; None: the canvas alone.
        images: files that the result is compared with torch on; the first 16 are used.

    Raises:
        UserError: the checkpoint or an image cannot be used. `deploy.export.ExportMismatchError`: the graph is wrong.
    """
    runner = torch_runner(str(checkpoint), settings, input_size, limits=limits)
    samples = sample_canvases(images, runner.card)
    return export_onnx(runner.module, runner.card, out, samples=samples, max_batch=settings.max_batch)


def torch_runner(
    checkpoint: str,
    settings: Deploy,
    input_size: tuple[int, int],
    *,
    limits: tuple[int, int] | None = None,
    categories: Mapping[int, str] | None = None,
    device: str = "cpu",
) -> TorchRunner:
    """A checkpoint (a file or `zoo:<name>`) in PyTorch, with the post-processing of an exported file.

    limits: see `export_checkpoint`. categories: id → name in label order, for a checkpoint that does not say which
    classes it knows.
    """
    detector, record = load_teacher_checkpoint(checkpoint)
    if record.class_names is not None and record.category_ids is not None:
        categories = dict(zip(record.category_ids, record.class_names, strict=True))
    if categories is None:
        raise UserError(f"{checkpoint}: does not say which classes it was trained on; a shipped file must")
    card = ModelCard(
        name=Path(checkpoint).stem,
        class_names=list(categories.values()),
        category_ids=list(categories),
        input_size=input_size,
        short=limits[0] if limits else None,
        long=limits[1] if limits else None,
        pad_color=PAD_COLOR,
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
        max_detections=settings.max_detections,
        candidates=settings.candidates,
        precision={"model": "fp32", "pre- and post-processing": "fp32"},
        checkpoint_sha256=sha256_of(checkpoint_file(checkpoint)),
        recipe_sha256=record.recipe_sha256 or "",
        val_map=record.val_map,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return TorchRunner(Deployable.from_card(detector, card), card, device)


def sample_canvases(images: Sequence[Path], card: ModelCard) -> np.ndarray:
    """The first images as uint8 [N, 3, H, W] canvases of `card`."""
    if not images:
        raise UserError("no images to check the export on; give a folder with --images")
    canvases = [fit_canvas(load_image(path), card)[0] for path in images[:SAMPLES]]
    return np.stack(canvases)
