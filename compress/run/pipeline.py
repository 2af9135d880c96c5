"""A run from recipe to report: teacher, baseline and student, export, proof, latency, report.

`distill` trains the arms; `run` does that and everything after. Every stage is a row of the run's manifest.json
and is skipped when its inputs are unchanged and its outputs intact. With several processes all of them train;
process 0 does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console

from compress.config.recipe import Recipe, dump_recipe
from compress.config.train import Train
from compress.console import open_console
from compress.detectors.base import Detector
from compress.detectors.build import build_detector, detector_class
from compress.detectors.checkpoints import ModelRecord, load_detector
from compress.detectors.weights import state_sha256
from compress.distill.teacher import freeze
from compress.manifest import Manifest
from compress.run.data import Datasets, open_data
from compress.run.pseudo_labels import (
    FIRST_STAGE,
    PseudoLabelled,
    check_labelled,
    fine_tuning,
    label_images,
    only_labels,
)
from compress.run.pseudo_labels import is_unfinished as pseudo_labels_unfinished
from compress.run.teacher import for_methods
from compress.run.trainings import check_methods, evaluate_arm, train_arm
from compress.teachers.check import check_teacher, seen_images
from compress.teachers.load import open_teacher
from compress.training.distributed import is_first_process, launch, on_first_process
from compress.versions import versions
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_text
from deploy.validate.coco import read_annotations

NOT_THE_RESULT = {"devices", "accelerator", "kernels"}
"""Settings of training that say where it runs, not what comes out."""


def run(recipe: Recipe, *, resume: bool = False, dry_run: bool = False) -> Path:
    """The whole path. Returns the run folder, which then holds report.json and report.html.

    Raises UserError for bad input; a failed accuracy gate is no error here, it is in report.json.
    """
    run_dir = distill(recipe, resume=resume, dry_run=dry_run)
    if not dry_run and is_first_process():
        reason = detector_class(recipe.student.detector, "student.detector").exportable
        if reason is not None:
            open_console().print(
                f"not exported, validated or benchmarked: a {recipe.student.detector} cannot be exported: {reason}; "
                f"its weights are {run_dir / 'student.safetensors'}, its figures stand above"
            )
            return run_dir
        from compress.run.evidence import gather_evidence  # export, validation, latency, report

        gather_evidence(recipe, run_dir)
    return run_dir


def _check_student(recipe: Recipe) -> None:
    """Ask the class of the student, which may be a user's own, whether it can do what the recipe wants of it."""
    problem = recipe.student_problem(detector_class(recipe.student.detector, "student.detector"))
    if problem is not None:
        raise UserError(": ".join(problem))


def distill(recipe: Recipe, *, resume: bool = False, dry_run: bool = False, distillation: bool = True) -> Path:
    """Train teacher (if the recipe says so), baseline (if asked for) and student, and the student once more on the
    grids of its int8 file (if asked for). Returns the run folder.

    With pseudo labels, teachers first label images, and the student trains on those and is fine-tuned on the others.
    With `distillation` False only the student is trained, alone, from the labels.

    Raises:
        UserError: bad data, a teacher that does not fit or is too weak, a loss that is not finite, or an
            unfinished run in the folder while `resume` is False.
    """
    from compress.run.dry_run import dry_run as rehearse

    fabric = _launch(recipe)
    _check_student(recipe)
    if dry_run:
        rehearse(recipe, fabric, distillation=distillation)
        return recipe.run_dir
    console = open_console(quiet=not fabric.is_global_zero)
    run_dir = recipe.run_dir
    _open_run(run_dir, recipe, fabric, resume)
    manifest = Manifest(run_dir, versions())
    data = open_data(recipe, fabric)
    if not data.has_labels and not distillation:
        raise UserError("labels.fraction is 0: without teachers there is nothing to train on")
    if distillation:
        check_labelled(recipe, data)
    console.print(
        f"{recipe.name}: {len(data.train) if data.has_labels else 0} training and {len(data.val)} validation images, "
        f"{len(data.train.categories)} classes, {fabric.world_size} process(es) on {fabric.device.type}",
    )
    for split, images in ((data.train_split, data.train), (data.val_split, data.val)):
        if images.dropped:
            counts = ", ".join(f"{count} {reason}" for reason, count in images.dropped.items())
            console.print(f"{split.annotations}: annotations left out: {counts} (see compress data check)")
    if data.unlabelled is not None:
        assert recipe.labels is not None
        rest = len(read_annotations(data.unlabelled.annotations)["images"])
        unseen = [name for name, n in zip(data.train.categories, data.train.boxes_by_class, strict=True) if n == 0]
        console.print(
            f"labels.fraction {recipe.labels.fraction:g}: {rest} more images have no labels"
            + (f"; no label is left of {', '.join(unseen)}" if unseen and data.has_labels else "")
        )
    common = {"data": data.identity, "seed": recipe.seed, "world_size": fabric.world_size}

    teacher = None
    if distillation and recipe.teacher is not None and (recipe.teacher.train is not None or not only_labels(recipe)):
        teacher = _teacher(recipe, data, fabric, manifest, common, resume, console)
    pseudo = None
    if distillation and recipe.pseudo_labels is not None:
        pseudo = label_images(fabric, recipe, data, manifest, console, resume=resume)
    taught = (
        {}
        if teacher is None
        else {
            "methods": recipe.methods.model_dump(mode="json"),
            "inherit": recipe.teacher is not None and recipe.teacher.inherit,
            "teacher": state_sha256(teacher),
        }
    )
    for arm in _arms(recipe, teacher, pseudo, distillation=distillation):
        inputs = {
            **common,
            "model": recipe.student.model_dump(mode="json", exclude_none=True),
            "train": arm.settings.model_dump(mode="json", exclude=NOT_THE_RESULT),
            **(taught if arm.teacher is not None else {}),
            **(arm.pseudo.identity if arm.pseudo is not None else {}),
            **({"start": sha256_of(arm.start)} if arm.start is not None else {}),
        }

        def work(arm: _Arm = arm, inputs: dict[str, Any] = inputs) -> dict[str, Any]:
            return train_arm(
                fabric, recipe, arm.name, recipe.student, arm.settings, data,
                teacher=arm.teacher, images=None if arm.pseudo is None else arm.pseudo.images, start=arm.start,
                identity=inputs, resume=resume,
            )  # fmt: skip

        outputs = [run_dir / f"{arm.name}.safetensors"]
        result = manifest.stage(arm.name, inputs, outputs, work, write=fabric.is_global_zero)
        console.print(
            f"{arm.name}: mAP {result['metrics']['map']:.2f} ({result['seconds']:.0f} s of training)",
        )
    if distillation and recipe.deploy.int8.qad is not None:
        from compress.run.qad import NAME, distill_quantized

        result = distill_quantized(fabric, recipe, data, manifest, teacher=teacher, taught=taught, resume=resume)
        console.print(
            f"{NAME}: mAP {result['metrics']['map']:.2f} on the grids of its int8 file ({result['seconds']:.0f} s of "
            "training)",
        )
    return run_dir


@dataclass(frozen=True)
class _Arm:
    """A training of the student. pseudo: what it trains on, None for the labelled images. start: see `train_arm`."""

    name: str
    settings: Train
    teacher: Detector | None = None
    pseudo: PseudoLabelled | None = None
    start: Path | None = None


def _arms(recipe: Recipe, teacher: Detector | None, pseudo: PseudoLabelled | None, *, distillation: bool) -> list[_Arm]:
    """The student's trainings in their order; the last one makes the student."""
    arms = [_Arm("baseline", recipe.train)] if distillation and recipe.baseline else []
    fine_tune = None if pseudo is None or recipe.pseudo_labels is None else recipe.pseudo_labels.fine_tune
    if fine_tune is None:
        return [*arms, _Arm("student", recipe.train, teacher, pseudo)]
    first = _Arm(FIRST_STAGE, recipe.train, teacher, pseudo)
    start = recipe.run_dir / f"{FIRST_STAGE}.safetensors"
    return [*arms, first, _Arm("student", fine_tuning(recipe.train, fine_tune), start=start)]


def _launch(recipe: Recipe) -> Fabric:
    train = recipe.train
    taught = recipe.teacher.train if recipe.teacher is not None else None
    if taught is not None:
        for key in ("devices", "accelerator", "precision"):
            if getattr(taught, key) != getattr(train, key):
                raise UserError(
                    f"teacher.train.{key} is {getattr(taught, key)!r}, train.{key} is {getattr(train, key)!r}: one run "
                    "trains all its arms alike; give both the same value"
                )
    # The adapters of a method that ends before the training get no gradient from then on.
    ends = any(term.stop_epoch is not None for term in recipe.methods.enabled().values())
    return launch(train, unused_parameters=ends)


def _open_run(run_dir: Path, recipe: Recipe, fabric: Fabric, resume: bool) -> None:
    """Create the folder with its resolved recipe. An unfinished run is only continued when asked to."""
    unfinished = [
        name
        for name in ("teacher", "baseline", FIRST_STAGE, "student", "student.qad")
        if (run_dir / name / "checkpoints" / "last.ckpt").is_file() and not (run_dir / f"{name}.safetensors").is_file()
    ]
    if pseudo_labels_unfinished(recipe):
        unfinished.append("the labelling")
    if unfinished and not resume:
        raise UserError(
            f"{run_dir} holds an interrupted run ({unfinished[0]} is unfinished); add --resume to continue it, or "
            "remove the folder to start again"
        )

    def create() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "recipe.yaml", dump_recipe(recipe))

    on_first_process(fabric, create)


def _teacher(
    recipe: Recipe,
    data: Datasets,
    fabric: Fabric,
    manifest: Manifest,
    common: dict[str, Any],
    resume: bool,
    console: Console,
) -> Detector:
    """Load or train the teacher, and measure it on the validation images before anybody learns from it."""
    settings = recipe.teacher
    assert settings is not None
    if settings.given:
        return _given_teacher(recipe, data, fabric, manifest, console)
    assert settings.model is not None and settings.train is not None, "the recipe was validated"
    first = fabric.is_global_zero
    classes = len(data.train.categories)
    check_methods(recipe, classes, build_detector(settings.model.model_copy(update={"weights": "none"}), classes, 0))
    path = recipe.run_dir / "teacher.safetensors"
    inputs = {
        **common,
        "model": settings.model.model_dump(mode="json", exclude_none=True),
        "train": settings.train.model_dump(mode="json", exclude=NOT_THE_RESULT),
    }

    def train() -> dict[str, Any]:
        assert settings.model is not None and settings.train is not None
        return train_arm(
            fabric,
            recipe,
            "teacher",
            settings.model,
            settings.train,
            data,
            identity=inputs,
            resume=resume,
        )

    manifest.stage("teacher", inputs, [path], train, write=first)
    teacher, record = load_detector(path)
    freeze(teacher)
    teacher.to(fabric.device)

    def check() -> dict[str, Any]:
        return {"metrics": evaluate_arm(teacher, data, fabric, recipe.data.workers).to_dict()}

    weights = state_sha256(teacher)
    measured = manifest.stage("teacher_check", {"data": data.identity, "weights": weights}, [], check, write=first)
    found = measured["metrics"]["map"]
    console.print(f"teacher: {_describe(record)}, mAP {found:.2f} on the validation images")
    if found < settings.min_map:
        raise UserError(
            f"the teacher reaches {found:.2f} mAP on {data.val_split.annotations}, teacher.min_map asks for "
            f"{settings.min_map:g}: train it longer, or check that its classes and images are these"
        )
    return teacher


def _given_teacher(recipe: Recipe, data: Datasets, fabric: Fabric, manifest: Manifest, console: Console) -> Detector:
    """One that is there already, checked."""
    assert recipe.teacher is not None
    names = dict(zip(data.train.category_ids, data.train.categories, strict=True))
    teacher = open_teacher(recipe.teacher, fabric.device, categories=names)
    named = teacher.class_names is not None
    detector, labels = for_methods(recipe, teacher, data.train.categories)
    if labels and not named:
        console.print(f"teacher {teacher.file}: does not name its classes; they are taken for the data's")
    check_teacher(
        teacher,
        labels,
        data.val,
        manifest,
        stage="teacher_check",
        identity=data.identity,
        seen=seen_images(recipe.data.eval_short, recipe.data.long),
        least=recipe.teacher.min_map,
        say=console.print,
        write=fabric.is_global_zero,
    )
    return detector


def _describe(record: ModelRecord) -> str:
    return " ".join(filter(None, (record.model.detector, record.model.backbone)))
