"""The pruned student of a run: which detector it is cut from, and the cut as a stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from compress.config.base import ZOO_PREFIX
from compress.config.data import Data
from compress.config.deploy import Deploy
from compress.config.model import Model, Student
from compress.config.prune import Prune
from compress.config.teacher import Teacher
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import (
    COCO_CATEGORIES,
    ZOO,
    ModelRecord,
    checkpoint_file,
    load_detector,
    load_teacher_checkpoint,
    save_detector,
    zoo_model,
)
from compress.detectors.weights import state_sha256
from compress.manifest import PRUNE, PRUNED, STUDENT, TEACHER, Manifest, RunFolder
from compress.prune.cut import cut
from compress.prune.graph import pruning_graph
from compress.prune.importance import importances
from compress.prune.order import blocks, leaving
from compress.prune.search import Means, check_whole
from compress.prune.search import prune as prune_to
from compress.run.data import Datasets
from compress.run.evaluation import machine
from compress.run.latency_search import timed_settings
from compress.run.parts import named_identity
from compress.run.prune import PruningPlan, prune_detector
from compress.run.teacher import class_difference
from compress.run.trainings import evaluate_on
from compress.training.distributed import on_first_process
from compress.training.qad.export import grids_file, load_grids
from deploy.core.errors import UserError
from deploy.core.files import sha256_of

NOT_TRAINED: dict[str, Any] = {"val_map": None, "operating_point": None, "recipe_sha256": None}
"""What the record of a detector says that was just cut."""


@dataclass(frozen=True)
class PrunedStudent:
    """What a training of the pruned student begins with. model: its architecture. file: its weights."""

    model: Model
    file: Path

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identify the weights, as JSON."""
        return {"start": sha256_of(self.file)}


@dataclass(frozen=True)
class CutPlan:
    """Plan of a run's cut.

    prune: the recipe's section. checkpoint: of the whole detector. data, deploy: the recipe's sections.
    """

    prune: Prune
    checkpoint: str
    folder: RunFolder
    data: Data
    deploy: Deploy
    seed: int


def whole_student(student: Student, teacher: Teacher | None) -> Student:
    """The student before anything is cut off it; another than that of the recipe where it is pruned.

    Raises UserError for a checkpoint that cannot be read.
    """
    prune = student.prune
    if prune is None:
        return student
    if _is_trained_first(prune, teacher):
        assert teacher is not None and teacher.model is not None, "the recipe was validated"
        model = teacher.model.bare()
    else:
        model = _record_of(source_of(prune, teacher, None)).model
    return student.model_copy(update={key: getattr(model, key) for key in Model.model_fields})


def source_of(prune: Prune, teacher: Teacher | None, folder: RunFolder | None) -> str:
    """The checkpoint that a student is cut from. folder: of the run that trains the teacher, if one does."""
    if prune.of != "teacher":
        return prune.of
    if teacher is None or not (teacher.checkpoint or teacher.train):
        raise UserError("student.prune.of: there is no teacher with a checkpoint; name one")
    if teacher.checkpoint is not None:
        return teacher.checkpoint
    assert folder is not None, "a teacher that the run trains"
    return str(folder.weights(TEACHER))


def check_source(prune: Prune, teacher: Teacher | None, categories: Sequence[str], *, distillation: bool) -> None:
    """Raise UserError, before anything long begins, for a checkpoint to cut that has other classes than the data, or
    that there will not be because no teacher is trained. Nothing is downloaded."""
    if not _is_trained_first(prune, teacher):
        checkpoint = source_of(prune, teacher, None)
        _check_classes(checkpoint, _record_of(checkpoint), categories)
    elif not distillation:
        raise UserError("student.prune.of: the run trains the teacher first; use compress distill")


def rehearse_cut(student: Student, num_classes: int, size: tuple[int, int], seed: int) -> Model:
    """The architecture of a cut, or one like it, found before there are weights: channels leave at random, and of a
    budget that only measuring tells, half of what can leave does.

    Args:
        student: of `whole_student`.
        size: (height, width) of the image whose operations count.

    Raises UserError for names to keep that the detector does not have, one that cannot be cut, and a share of GFLOPs or
    parameters that it does not reach with the fewest channels: how many these are is no matter of the weights.
    """
    prune = student.prune
    assert prune is not None, "the caller looks"
    model = student.built().model_copy(update={"weights": "none"})
    whole = build_detector(model, num_classes, seed, key="student").eval()
    with _naming_the_recipe():
        if prune.budget in ("gflops", "params"):
            at_random = {"importance": "random", "shares": "uniform", "schedule": "once"}
            smaller = prune_to(whole, prune.model_copy(update=at_random), Means(size), seed=seed).detector
        else:
            check_whole(whole)
            graph = pruning_graph(whole, prune.keep)
            order = blocks(graph, importances(graph, "random", seed=seed), round_to=prune.round_to)
            smaller = cut(whole, graph, leaving(order, len(order) // 2))
    assert smaller.model is not None, "what is built has one"
    return smaller.model


def pruned_from(checkpoint: str) -> str:
    """Say where the weights of a detector come from that was cut from this checkpoint."""
    return f"pruned from {checkpoint if checkpoint.startswith(ZOO_PREFIX) else Path(checkpoint).name}"


def load_whole(checkpoint: str, key: str | None = "student.prune.of") -> tuple[Detector, ModelRecord]:
    """The detector to cut, and its record. `key` names it in messages; None: the checkpoint does. Raises UserError for
    one that cannot be cut: of quantization-aware training, or pruned before."""
    where = "" if key is None else f"{key}: "
    try:
        detector, record = load_teacher_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    path = checkpoint_file(checkpoint)
    if _has_grids(path):
        raise UserError(
            f"{where}{checkpoint}: was trained on the grids of its int8 file, which belong to its layers; prune "
            f"{path.with_stem(STUDENT).name} and train the pruned one on grids of its own"
        )
    if record.model.widths:
        raise UserError(f"{where}{checkpoint}: was pruned before; prune the whole detector, with a smaller budget")
    return detector, record


def cut_student(
    fabric: Fabric, plan: CutPlan, data: Datasets, manifest: Manifest, workers: int, say: Callable[[str], None]
) -> PrunedStudent:
    """Cut the student, unless it is done, and measure it on the validation images before any training.

    Raises UserError for a detector of other classes, or that cannot be cut as asked.
    """
    detector, record = load_whole(plan.checkpoint)
    _check_classes(plan.checkpoint, record, data.train.categories)
    output = plan.folder.weights(PRUNED)

    def work() -> dict[str, Any]:
        record_of_data = _with_classes(record, data, plan.checkpoint)

        def make() -> dict[str, Any]:
            with _naming_the_recipe():
                smaller, found = prune_detector(detector.to(fabric.device), record, _pruning(plan, data, fabric), say)
            save_detector(output, smaller, metadata=record_of_data.model_copy(update={"model": smaller.model}))
            return found

        found: dict[str, Any] = on_first_process(fabric, make)
        smaller, saved = load_detector(output)
        metrics = evaluate_on(smaller.to(fabric.device), data, fabric, workers, plan.deploy.max_detections)
        measured = saved.model_copy(update={"val_map": metrics.map, "operating_point": metrics.operating_point})
        on_first_process(fabric, lambda: save_detector(output, smaller, metadata=measured))
        return {**found, "metrics": metrics.to_dict(), "canvas": list(data.canvas)}

    result = manifest.stage(PRUNE, _inputs(plan, detector, record, data), [output], work, write=fabric.is_global_zero)
    say(f"{PRUNED}: {summary(result)}")
    return PrunedStudent(load_detector(output)[1].model, output)


def summary(found: dict[str, Any]) -> str:
    """Say in a line what a cut left."""
    unit = {"gflops": "GFLOPs", "params": "M parameters", "latency_ms": "ms", "max_map_drop": "mAP on training images"}
    what = f"{found['found']:.4g} of {found['whole']:.4g} {unit[found['budget']]}"
    return f"{what}, mAP {found['metrics']['map']:.2f} before any training"


# --- details --------------------------------------------------------------------------------------------


def _is_trained_first(prune: Prune, teacher: Teacher | None) -> bool:
    """Whether the detector to cut is a teacher that the run trains."""
    return prune.of == "teacher" and teacher is not None and teacher.train is not None


def _record_of(checkpoint: str) -> ModelRecord:
    """The record of a checkpoint to cut. mmdet's need not be here: they are known."""
    name = checkpoint.removeprefix(ZOO_PREFIX)
    if name not in ZOO:
        return load_whole(checkpoint)[1]
    names = tuple(COCO_CATEGORIES.values())
    return ModelRecord(model=zoo_model(name), num_classes=len(names), class_names=names)


@contextmanager
def _naming_the_recipe() -> Iterator[None]:
    """Name the recipe's key in errors about a setting: `prune.keep: …` is about student.prune.keep."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^prune\b", "student.prune", str(error), flags=re.MULTILINE)) from error


def _has_grids(path: Path) -> bool:
    """Whether a checkpoint is one of quantization-aware training."""
    try:
        load_grids(grids_file(path))
    except UserError:  # no such file, or somebody's own JSON
        return False
    return True


def _pruning(plan: CutPlan, data: Datasets, fabric: Fabric) -> PruningPlan:
    return PruningPlan(
        settings=plan.prune,
        size=data.canvas,
        resize_short_long=(plan.data.eval_short, plan.data.long),
        images=data.train if data.has_labels else None,
        deploy=plan.deploy,
        sensitivities=plan.folder.sensitivities,
        seed=plan.seed,
        device=fabric.device.type,
    )


def _inputs(plan: CutPlan, detector: Detector, record: ModelRecord, data: Datasets) -> dict[str, Any]:
    """Everything that the cut depends on, as JSON."""
    prune = plan.prune
    inputs: dict[str, Any] = {
        "of": state_sha256(detector),
        "prune": prune.model_dump(mode="json", exclude={"of"}),
        "canvas": list(data.canvas),
        "validation": data.val_identity,
        "max_detections": plan.deploy.max_detections,
        **named_identity("named_model", record.model.own_parts()),
    }
    if prune.importance != "group_norm":  # random numbers, or losses that draw samples
        inputs["seed"] = plan.seed
    if prune.needs_images is not None or prune.latency_ms is not None:
        inputs["data"] = data.identity
    if prune.latency_ms is not None:
        inputs |= {"machine": machine(), "file": timed_settings(plan.deploy, prune.precision)}
    return inputs


def _check_classes(checkpoint: str, record: ModelRecord, categories: Sequence[str]) -> None:
    if record.class_names is None and record.num_classes == len(categories):
        return
    names = list(record.class_names or [""] * record.num_classes)
    if names != list(categories):
        different = class_difference(names, categories, "the checkpoint")
        raise UserError(
            f"student.prune.of: {checkpoint}: {different}; a pruned student keeps its classes, so they must be those "
            "of the data in the same order"
        )


def _with_classes(record: ModelRecord, data: Datasets, checkpoint: str) -> ModelRecord:
    """The record of a detector of the data's classes, not measured yet."""
    return record.model_copy(
        update={
            "class_names": data.train.categories,
            "category_ids": data.train.category_ids,
            "resize_short_long": data.resize_short_long,
            "source": pruned_from(checkpoint),
            **NOT_TRAINED,
        }
    )
