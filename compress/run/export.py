"""Checkpoint → deployable ONNX files: rebuild the detector, wrap it, export it, prove it (`deploy.graph.export`)."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.config.data import Split
from compress.config.deploy import Deploy, Int8
from compress.config.recipe import Recipe
from compress.detectors.base import Capability
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.export.deployable import Deployable, TorchRunner, half_precision
from compress.run.data import splits
from compress.versions import versions
from deploy.core.card import PAD_COLOR, PROCESSING, ModelCard, card_from_file
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json, write_text
from deploy.core.image import fit_canvas, load_image
from deploy.core.progress import Progress
from deploy.graph.export import ExportReport, export_onnx
from deploy.quantize.calibrate import CalibrationImages, check_apart, choose_images, list_images
from deploy.quantize.file import Quantizer, QuantizeReport
from deploy.quantize.guided import GuidedResult, search
from deploy.quantize.picture import trade_off_svg
from deploy.validate.coco import load_annotations

SAMPLES = 16  # images that an export is checked on
SOURCES = {"fp32": "fp32", "fp16": "fp16", "int8": "fp32", "mixed": "fp16"}
"""Precision → the float file that it is, or is quantized from."""
HALF_SCORE_TOLERANCE = 0.01
HALF_BOX_TOLERANCE = 0.005  # of the canvas; everywhere, also where the distances of an empty place are a coin toss


@dataclass(frozen=True)
class Quantizing:
    """Everything that an int8 file needs besides the float one."""

    settings: Int8
    images: CalibrationImages
    split: tuple[Path, Path] | None = None
    """Annotations and image folder that a guided search decides on; None: all layers but the last in int8."""
    max_map_drop: float = 0.5
    """The search's budget in mAP points."""


class BudgetError(RuntimeError):
    """No choice of float layers holds the loss of mAP within the budget: no file was written. `result`: the search."""

    def __init__(self, message: str, result: GuidedResult) -> None:
        super().__init__(message)
        self.result = result


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    settings: Deploy,
    *,
    input_size: tuple[int, int],
    images: Sequence[Path],
    limits: tuple[int, int] | None = None,
    half: bool = False,
) -> ExportReport:
    """Export a native checkpoint to `out`.

    Args:
        settings: thresholds and limits; its `input_size` is not looked at.
        input_size: (height, width) of the canvas in pixels, multiples of 32.
        limits: (short, long) in pixels that an image is not enlarged beyond, as in training; None: the canvas alone.
        images: files that the result is compared with torch on; the first 16 are used.
        half: the network in float16; it is compared with the float32 module, with wider tolerances.

    Raises:
        UserError: the checkpoint or an image cannot be used. `ExportMismatchError`: the graph is wrong.
    """
    runner = torch_runner(str(checkpoint), settings, input_size, limits=limits)
    samples = sample_canvases(images, runner.card)
    if not half:
        return export_onnx(runner.module, runner.card, out, samples=samples, max_batch=settings.max_batch)
    return export_onnx(
        half_precision(runner.module),
        runner.card,
        out,
        samples=samples,
        reference=runner.module,
        max_batch=settings.max_batch,
        score_tolerance=HALF_SCORE_TOLERANCE,
        box_tolerance_px=HALF_BOX_TOLERANCE * max(input_size),
    )


def file_for(out: Path, precision: str) -> Path:
    """Where a precision goes: `student.onnx` for fp32, `student.int8.onnx` for int8."""
    return out if precision == "fp32" else out.with_suffix(f".{precision}.onnx")


def calibration_of(recipe: Recipe | None, settings: Int8) -> CalibrationImages:
    """The calibration images: `settings.calibration`, or the recipe's training images.

    Raises UserError when there are none, and when one of them is among the recipe's validation images.
    """
    if recipe is None:
        assert settings.calibration is not None, "without a recipe there is nothing else"
        return choose_images(list_images(settings.calibration), settings.images)
    train, val = splits(recipe.data, recipe.runs)
    source = settings.calibration
    files = split_files(train.annotations, train.images) if source is None else list_images(source)
    chosen = choose_images(files, settings.images)
    check_apart(chosen, split_files(val.annotations, val.images))
    return chosen


def quantize_export(
    source: Path, out: Path, how: Quantizing, *, max_batch: int, progress: Progress | None = None
) -> tuple[QuantizeReport, GuidedResult | None]:
    """Quantize the exported file `source` (fp32; fp16 for a mixed one, which is always in TensorRT's format) to `out`.

    A guided search leaves its measurements, `<out>.guided.json`, and a picture, `<out>.guided.svg`, beside `out`.

    Raises UserError for images that cannot be used, BudgetError when the search fails.
    """
    mixed = "fp16" in set(card_from_file(source).precision.values())
    quantizer = Quantizer(
        source,
        how.images,
        "tensorrt" if mixed else how.settings.target,
        method=how.settings.method,
        reduce_range=how.settings.reduce_range,
    )
    if how.split is None:
        return quantizer.save(out, max_batch=max_batch), None
    check_deciding(*how.split, how.images)
    beside = out.with_suffix(".guided.json")
    result = search(quantizer, *how.split, beside, max_map_drop=how.max_map_drop, progress=progress)
    write_text(beside.with_suffix(".svg"), trade_off_svg(result))
    if result.chosen is None:
        best = min((trial.map_drop for trial in result.trials), default=float("nan"))
        raise BudgetError(
            f"{out.name}: no choice of layers loses at most {how.max_map_drop:g} mAP points (the best of "
            f"{len(result.trials)} lost {best:.2f}); not written",
            result,
        )
    chosen = result.chosen
    report = quantizer.save(out, chosen.float_layers, guided_map_drop=round(chosen.map_drop, 4), max_batch=max_batch)
    return report, result


def split_files(annotations: Path, folder: Path) -> list[Path]:
    """The image files of a COCO JSON."""
    return [folder / row["file_name"] for row in load_annotations(annotations)["images"]]


def check_deciding(annotations: Path, folder: Path, calibration: CalibrationImages) -> None:
    """Find out before long work that a search can decide on a labelled split. Raises UserError."""
    if not load_annotations(annotations)["annotations"]:
        raise UserError(f"{annotations}: no boxes to decide on")
    check_apart(calibration, split_files(annotations, folder), "the images that the search decides on")


def deciding_split(split: Split, calibration: CalibrationImages, count: int, out: Path) -> tuple[Path, Path]:
    """Write to `out` the part of a labelled set that a search decides on: `count` images spread evenly over those with
    boxes that are not for calibration. Returns (annotations, image folder). Raises UserError when none is left."""
    content = load_annotations(split.annotations)
    taken = set(calibration.hashes)
    labelled = {row["image_id"] for row in content["annotations"]}
    rows = [row for row in content["images"] if row["id"] in labelled]
    spread = [rows[index * len(rows) // (2 * count)] for index in range(2 * count)] if len(rows) > 2 * count else rows
    free = [row for row in spread if sha256_of(split.images / row["file_name"]) not in taken]
    chosen = free[:: max(1, len(free) // count)][:count]
    if not chosen:
        raise UserError(
            f"{split.annotations}: every labelled image is for calibration, and none is left to decide on: calibrate "
            "on fewer, or give another labelled set"
        )
    ids = {row["id"] for row in chosen}
    annotations = [row for row in content["annotations"] if row["image_id"] in ids]
    write_json(out, {"images": chosen, "annotations": annotations, "categories": content["categories"]})
    return out, split.images


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
    if Capability.DENSE not in detector.capabilities:
        raise UserError(
            f"{checkpoint}: {detector.family} cannot be exported: its second stage works on as many proposals as it "
            "finds, which a fixed graph cannot; it trains and teaches. Ship a gfl, fcos or retinanet student"
        )
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
        precision={"model": "fp32", PROCESSING: "fp32"},
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
