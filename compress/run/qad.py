"""Quantization-aware distillation (QAD): the trained student goes on learning, with the same teacher and methods, while
its weights and activations are rounded as in its int8 file.

    start = calibrated_grids(...)                       # post-training quantization
    train_quantized(fabric, recipe, data, start, ...)   # student.qad.safetensors and student.qad.json
    export_quantized(...)                               # student.qad.onnx, proven against the network that was trained
    quantize_trained(...)                               # the same from a float file that is there already

`student.qad.safetensors` is a checkpoint like any other: float weights that are good to round. `student.qad.json` has
the trained grids of the activations, which become the scales and zero points of the ONNX file, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from pydantic import ValidationError
from torch import nn

from compress.config.deploy import Deploy, Int8, Qad
from compress.config.recipe import Recipe, recipe_sha256
from compress.config.train import Optimizer, Schedule, Train
from compress.data.loader import train_loader
from compress.detectors.base import Detector
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.detectors.gfl import GFL
from compress.distill.build import build_methods
from compress.export.deployable import Deployable
from compress.manifest import Manifest, RunFolder, fingerprint
from compress.run.data import Datasets, canvas
from compress.run.export import calibration_of, export_checkpoint
from compress.run.pseudo_labels import FIRST_STAGE
from compress.run.trainings import evaluate_arm
from compress.training.distributed import on_first_process
from compress.training.loop import Training, fit
from compress.training.qad.fake_quant import FakeQuantized, fold_batch_norms
from deploy.core.card import ModelCard, card_from_file
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json
from deploy.graph.export import ExportMismatchError
from deploy.quantize.calibrate import CalibrationImages
from deploy.quantize.file import Quantizer, QuantizeReport, dense_outputs, output_error
from deploy.quantize.grids import Grids

NAME = "student.qad"
TOLERANCE = 0.05
"""Of `output_error` between the file and the network that was trained: kernels add in another order, so that now and
then a value falls on the other side of a rounding edge. Where rounding as a whole does more than twice that (output
layers in int8), half of what it does is allowed."""


def calibrated_grids(
    checkpoint: Path,
    recipe: Recipe,
    images: CalibrationImages,
    *,
    input_size: tuple[int, int],
    limits: tuple[int, int],
    keep_float: Sequence[str] | None = None,
) -> Grids:
    """The grids of the checkpoint's int8 file after calibration; `keep_float`: see `Quantizer.graph`.

    Raises UserError for a checkpoint or images that cannot be used.
    """
    settings = recipe.deploy.int8
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        _export(checkpoint, file, recipe, input_size, limits, images.files)
        return _quantizer(file, images, settings).grids(keep_float)


def distill_quantized(
    fabric: Fabric,
    recipe: Recipe,
    data: Datasets,
    manifest: Manifest,
    *,
    teacher: Detector | None,
    taught: Mapping[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Calibrate and train the run's student, as two stages of its manifest. Returns the figures of the training.

    taught: what teaches, as JSON. Raises UserError.
    """
    settings, student = recipe.deploy.int8, recipe.run_dir / "student.safetensors"
    start_file = recipe.run_dir / f"{NAME}.start.json"
    limits = (recipe.data.eval_short, recipe.data.long)
    inputs: dict[str, Any] = {
        "data": data.identity,
        "student": sha256_of(student),
        "int8": settings.model_dump(mode="json", exclude={"qad", "guided", "deciding_images"}),
        "input_size": list(recipe.deploy.input_size or canvas(data.val, recipe)),
    }

    def calibrate() -> None:
        images = calibration_of(recipe, settings)
        size = recipe.deploy.input_size or canvas(data.val, recipe)
        grids = calibrated_grids(student, recipe, images, input_size=size, limits=limits)
        write_json(start_file, grids.model_dump(mode="json"))

    on_first_process(fabric, lambda: manifest.stage("qad calibration", inputs, [start_file], calibrate))
    start = load_grids(start_file)
    inputs |= {
        "start": start.model_dump(mode="json"),
        "train": _schedule(recipe.train, _qad(recipe)).model_dump(mode="json", exclude={"devices", "accelerator"}),
        "taught": dict(taught),
        "seed": recipe.seed,
        "world_size": fabric.world_size,
    }

    def train() -> dict[str, Any]:
        return train_quantized(fabric, recipe, data, start, teacher=teacher, identity=inputs, resume=resume)

    outputs = [recipe.run_dir / f"{NAME}.{ending}" for ending in ("safetensors", "json")]
    result: dict[str, Any] = manifest.stage("qad", inputs, outputs, train, write=fabric.is_global_zero)
    return result


def train_quantized(
    fabric: Fabric,
    recipe: Recipe,
    data: Datasets,
    start: Grids,
    *,
    teacher: Detector | None,
    identity: Mapping[str, Any],
    resume: bool,
    student: Path | None = None,
    folder: Path | None = None,
    name: str = NAME,
    quantized: bool = True,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train the student on the grids `start` by the recipe's methods, and save `<name>.safetensors` and `<name>.json`
    in `folder`. Returns its figures (JSON-able); the metrics are those of the rounded network.

    Args:
        teacher: as in the student's training; None: from the labels alone.
        identity: of everything that shapes the result, `start` included; an unfinished training of another identity is
            not continued.
        student: the checkpoint to start from, with the folder of its training beside it; None: the run's.
        folder: where the results go; None: the run's folder.
        quantized: False trains the float student by the same schedule, to tell what rounding adds.

    Raises:
        UserError: as `compress.training.loop.fit` does, and when the grids are not the student's.
    """
    folder = recipe.run_dir if folder is None else folder
    output = folder / f"{name}.safetensors"
    if fabric.is_global_zero:
        output.unlink(missing_ok=True)  # from now on it is unfinished
    fabric.seed_everything(recipe.seed + 1, verbose=False)  # not the images in the order that the student knows
    checkpoint = recipe.run_dir / "student.safetensors" if student is None else student
    detector, record = _gfl(checkpoint)
    detector.to(memory_format=torch.channels_last)
    fold_batch_norms(detector)
    network = FakeQuantized(detector, start) if quantized else detector
    methods = {}
    if teacher is not None:
        methods = build_methods(recipe.methods, network, teacher, seed=recipe.seed)
        learned = checkpoint.with_suffix("")
        if student is None and recipe.pseudo_labels is not None and recipe.pseudo_labels.fine_tune is not None:
            learned = recipe.run_dir / FIRST_STAGE  # fine-tuning has no methods
        _restore_adapters(nn.ModuleDict(methods), learned / "checkpoints" / "last.ckpt")
    train = _schedule(recipe.train, _qad(recipe))
    loader = train_loader(
        data.train,
        batch_size=train.batch_size // train.accumulate,
        seed=recipe.seed + 1,
        workers=recipe.data.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    training = Training(
        name=name,
        folder=RunFolder(folder).training(name),
        settings=train,
        loader=loader,
        evaluate=lambda d: evaluate_arm(d, data, fabric, recipe.data.workers),
        identity=fingerprint(identity),
        teacher=teacher,
        methods=methods,
    )
    result = fit(fabric, network, training, resume=resume, max_steps=max_steps)
    if fabric.is_global_zero and result.metrics is not None:
        if isinstance(network, FakeQuantized):
            write_json(folder / f"{name}.json", network.grids().model_dump(mode="json"))
        trained = record.model_copy(update={"val_map": result.metrics.map, "recipe_sha256": recipe_sha256(recipe)})
        save_detector(output, detector.to("cpu"), metadata=trained)
    fabric.barrier()
    return result.to_dict()


def export_quantized(
    checkpoint: Path,
    out: Path,
    recipe: Recipe,
    images: CalibrationImages,
    *,
    input_size: tuple[int, int],
    limits: tuple[int, int],
) -> QuantizeReport:
    """Export a checkpoint and write the int8 file of it, as `quantize_trained` does."""
    load_grids(grids_file(checkpoint))  # before the export, which takes long
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        _export(checkpoint, file, recipe, input_size, limits, images.files)
        return quantize_trained(checkpoint, file, out, recipe.deploy, images)


def quantize_trained(
    checkpoint: Path, source: Path, out: Path, settings: Deploy, images: CalibrationImages
) -> QuantizeReport:
    """Write the int8 file of `source`, the float file of a checkpoint, on the grids beside the checkpoint.

    Before the file gets its name, its scores and boxes on `images` are compared with those of the network that was
    trained. Raises UserError for files that cannot be used, ExportMismatchError when the comparison fails.
    """
    grids = load_grids(grids_file(checkpoint))
    quantizer = _quantizer(source, images, settings.int8)
    card = card_from_file(source)
    detector = _gfl(checkpoint)[0]
    samples = quantizer.canvases[:8]
    found = dense_outputs(quantizer.graph(trained=grids), samples)
    error, rounding = (
        output_error(_dense(model, card, samples), found) for model in (FakeQuantized(detector, grids).eval(), detector)
    )
    if any(e > TOLERANCE and e > 0.5 * r for e, r in zip(error, rounding, strict=True)):
        raise ExportMismatchError(
            f"{out.name}: off the trained network by {error[0]:.2g} of the score and {error[1]:.2g} of the boxes "
            f"(allowed {TOLERANCE:g}, or half of what rounding does: {rounding[0]:.2g}, {rounding[1]:.2g}); not "
            "written"
        )
    return quantizer.save(out, trained=grids, max_batch=settings.max_batch)


def grids_file(checkpoint: Path) -> Path:
    """`student.qad.safetensors` → `student.qad.json`."""
    return checkpoint.with_suffix(".json")


def load_grids(path: Path) -> Grids:
    """Read `student.qad.json`. Raises UserError."""
    try:
        return Grids.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it is written beside the checkpoint by a run with int8.qad") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: not the grids of a run with int8.qad ({type(error).__name__})") from error


# ----------------------------------------------------------------------------------------------------


def _gfl(checkpoint: Path) -> tuple[GFL, ModelRecord]:
    detector, record = load_detector(checkpoint)
    if not detector.quantizable:
        raise UserError(
            f"{checkpoint}: quantization-aware distillation is for gfl students, this is {record.model.detector}"
        )
    return cast(GFL, detector), record


def _dense(detector: GFL, card: ModelCard, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and boxes at every location, as `dense_outputs` gives them."""
    module = Deployable.from_card(detector, card)
    with torch.inference_mode():
        pairs = [module.dense(torch.from_numpy(image[None])) for image in images]
    scores, boxes = (np.concatenate([pair[i].numpy() for pair in pairs]) for i in range(2))
    return scores, boxes


def _qad(recipe: Recipe) -> Qad:
    assert recipe.deploy.int8.qad is not None, "the caller looks"
    return recipe.deploy.int8.qad


def _schedule(train: Train, qad: Qad) -> Train:
    """The student's training with QAD's length, optimizer and rate."""
    return train.model_copy(
        update={
            "epochs": None,
            "steps": qad.steps,
            "optimizer": Optimizer(name="adamw", lr=qad.lr, weight_decay=0.0),
            "schedule": Schedule(name="cosine", warmup_steps=qad.steps // 10, warmup_factor=0.01),
            "ema": None,
            "eval_every": None,
            "select": "last",
        }
    )


def _restore_adapters(methods: nn.ModuleDict, path: Path) -> None:
    """The methods' own weights as the student's training left them; without that file they start anew."""
    if not path.is_file():
        return
    try:
        methods.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["modules"]["methods"])
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the adapters of the student's methods cannot be read: {reason}") from error


def _quantizer(file: Path, images: CalibrationImages, settings: Int8) -> Quantizer:
    return Quantizer(file, images, settings.target, method=settings.method, reduce_range=settings.reduce_range)


def _export(
    checkpoint: Path,
    file: Path,
    recipe: Recipe,
    input_size: tuple[int, int],
    limits: tuple[int, int],
    images: Sequence[Path],
) -> None:
    export_checkpoint(checkpoint, file, recipe.deploy, input_size=input_size, images=images, limits=limits)
