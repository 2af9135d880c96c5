"""The trainings of a run: teacher, baseline and student, each built from the recipe, trained and saved.

Everything here works the same in one process and in several; process 0 writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from compress.config.model import Model
from compress.config.recipe import Recipe, recipe_sha256
from compress.config.train import Train
from compress.console import open_console
from compress.data.concat import TrainingImages
from compress.data.loader import eval_loader, train_loader
from compress.detectors.base import Capability, Detector
from compress.detectors.build import build_detector, inherit, model_of
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.distill.build import build_methods
from compress.distill.level_matching import describe
from compress.distill.weighting import Balanced
from compress.manifest import RunFolder, fingerprint
from compress.run.data import Datasets
from compress.training.evaluate import evaluate
from compress.training.loop import Training, fit
from deploy.core.errors import UserError
from deploy.validate.coco import CocoMetrics

EVAL_BATCH = 8


def check_methods(recipe: Recipe, num_classes: int, teacher: Detector) -> dict[str, Balanced]:
    """Build the methods as the student's training will build them. Raises UserError where teacher, student and methods
    do not fit each other."""
    student = build_detector(recipe.student.model_copy(update={"weights": "none"}), num_classes, recipe.seed)
    methods = build_methods(recipe.methods, student, teacher)
    if recipe.teacher is not None and recipe.teacher.inherit and not inherit(student, teacher):
        raise UserError(
            f"teacher.inherit: no layer of the teacher's neck and head (width {teacher.feature_channels}) fits the "
            f"student's (width {student.feature_channels}); give both the same neck_channels"
        )
    return methods


def train_arm(
    fabric: Fabric,
    recipe: Recipe,
    name: str,
    model: Model,
    settings: Train,
    data: Datasets,
    *,
    teacher: Detector | None = None,
    images: TrainingImages | None = None,
    start: Path | None = None,
    identity: Mapping[str, Any],
    resume: bool,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train one arm and save it as `<run>/<name>.safetensors`. Returns its figures (JSON-able).

    With a teacher it learns by the recipe's methods, and inherits if the recipe says so.

    Args:
        images: to train on, with the classes of `data.train`; None: `data.train`.
        start: checkpoint with the weights to begin with, of the same model; None: fresh ones.
    """
    output = recipe.run_dir / f"{name}.safetensors"
    if fabric.is_global_zero:
        output.unlink(missing_ok=True)  # from now on this arm is unfinished
    fabric.seed_everything(recipe.seed, verbose=False)
    detector = build_detector(model, len(data.train.categories), recipe.seed, compiled=settings.compile)
    if start is not None:
        detector.load_state_dict(load_detector(start)[0].state_dict())
    methods = {}
    if teacher is not None:
        methods = build_methods(recipe.methods, detector, teacher, seed=recipe.seed, compiled=settings.compile)
        if any(Capability.DENSE not in built.method.needs for built in methods.values()):
            note = describe(detector.strides, teacher.strides)
            if note is not None and fabric.is_global_zero:
                open_console().print(f"{name}: {note}")
        if recipe.teacher is not None and recipe.teacher.inherit:
            inherit(detector, teacher)
    loader = train_loader(
        data.train if images is None else images,
        batch_size=settings.batch_size // settings.accumulate,
        seed=recipe.seed,
        workers=recipe.data.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    training = Training(
        name=name,
        folder=RunFolder(recipe.run_dir).training(name),
        settings=settings,
        loader=loader,
        evaluate=lambda d: evaluate_arm(d, data, fabric, recipe.data.workers),
        identity=fingerprint(identity),
        teacher=teacher,
        methods=methods,
    )
    result = fit(fabric, detector, training, resume=resume, max_steps=max_steps)
    if fabric.is_global_zero and result.metrics is not None:
        record = ModelRecord(
            model=model_of(detector),
            num_classes=detector.num_classes,
            class_names=data.train.categories,
            category_ids=data.train.category_ids,
            val_map=result.metrics.map,
            recipe_sha256=recipe_sha256(recipe),
        )
        save_detector(output, detector, metadata=record)
    fabric.barrier()
    return result.to_dict()


def evaluate_arm(detector: Detector, data: Datasets, fabric: Fabric, workers: int) -> CocoMetrics:
    """COCO metrics (percent) on the validation images, shared out among the processes."""
    loader = eval_loader(
        data.val,
        batch_size=EVAL_BATCH,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    return evaluate(detector, loader, data.val, fabric.device)
