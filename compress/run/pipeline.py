"""A run from recipe to report: teacher, baseline and student, export, validation, latency, report.

`distill` trains; `run` does that and everything after. Every stage is a row of the run's manifest.json and is skipped
when its inputs are unchanged and its outputs intact. With several processes all of them train; process 0 does the rest.

This file and the dry run are the only ones that hold a whole recipe: everything else gets a section of it, or a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from compress.config.recipe import Recipe, dump_recipe
from compress.config.teacher import Teacher
from compress.console import open_console
from compress.detectors.base import Detector, freeze
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_detector
from compress.detectors.weights import state_sha256
from compress.distill.build import identity as method_identity
from compress.manifest import (
    BASELINE,
    FINE_TUNED,
    REPORT,
    STUDENT_ON_INT8_GRIDS,
    STUDENT_ON_PSEUDO_LABELS,
    TEACHER,
    TEACHER_CHECK,
    Manifest,
    RunFolder,
)
from compress.run.data import Datasets, labelled_split, open_data, splits
from compress.run.data_notes import canvas_notes, notes_about
from compress.run.folder import about_what_is_left, need_whole, working_in, write_recipe
from compress.run.loggers import files_of, final_table, logging_run
from compress.run.parts import Parts, named_identity
from compress.run.plans import (
    checks_on,
    cut_plan,
    data_plan,
    distillation_plan,
    labelling_of,
    logging_plan,
    outlook,
    qad_plan,
    quantizing,
    student_plan,
    teacher_plan,
    training_plans,
    with_whole_student,
)
from compress.run.pruned import PrunedStudent, check_source, cut_student, rehearse_cut, source_of
from compress.run.pseudo_labels import (
    PseudoLabelled,
    check_labelled,
    fine_tuning,
    label_images,
)
from compress.run.teacher import (
    checkpoint_to_show,
    has_a_teacher,
    key_of,
    match_teacher,
    open_given,
    untrained_teacher,
)
from compress.run.trainings import TrainingPlan, check, evaluate_on, need_room, start_identity, train
from compress.teachers.check import check_teacher, limit_input, map_text, resized_images
from compress.training.distributed import is_first_process, launch, need_common_folder, on_first_process
from compress.training.loggers.opened import OpenLoggers, need_packages
from compress.training.time_left import NOTHING_LATER, Later
from compress.versions import versions
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.import_path import import_object
from deploy.core.on_ray import need_ray
from deploy.core.shown import counted
from deploy.validate.coco import CocoMetrics

NOT_THE_RESULT = {"devices", "accelerator", "kernels"}
"""Settings of training that say where it runs, not what comes out."""


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    dry_run: bool = False,
    without_data: bool = False,
    parts: Parts | None = None,
) -> Path:
    """The whole path. Returns the run folder, which then holds report.json and report.html.

    dry_run: only rehearse it; with `without_data` also where the images are not there.

    Raises UserError for bad input; a failed accuracy gate is no error here, it is in report.json.
    """
    own = Parts() if parts is None else parts
    return _do(recipe, own, resume=resume, dry_run=dry_run, without_data=without_data, ships=True)


def distill(
    recipe: Recipe,
    *,
    resume: bool = False,
    dry_run: bool = False,
    without_data: bool = False,
    distillation: bool = True,
    parts: Parts | None = None,
) -> Path:
    """Train teacher (if the recipe says so), baseline (if asked for) and student, and the student once more on the
    grids of its int8 file (if asked for). Returns the run folder.

    With pseudo labels, teachers first label images, and the student trains on those and is fine-tuned on the others.
    With `distillation` False only the student is trained, alone, from the labels.

    parts: objects in the place of, or beside, what the recipe names.

    Raises:
        UserError: bad data, a teacher that does not fit or is too weak, a loss that is not finite, an unfinished run in
            the folder while `resume` is False, or another process that works there.
    """
    own = Parts() if parts is None else parts
    return _do(recipe, own, resume=resume, dry_run=dry_run, without_data=without_data, distillation=distillation)


def _do(
    recipe: Recipe,
    parts: Parts,
    *,
    resume: bool,
    dry_run: bool,
    without_data: bool,
    distillation: bool = True,
    ships: bool = False,
) -> Path:
    from compress.run.dry_run import dry_run as rehearse

    if parts.student is not None and recipe.student.prune is not None:
        raise UserError("student: one is given as an object, and student.prune asks for another; remove one of the two")
    need_packages(recipe.loggers)
    if recipe.ray is not None:
        need_ray(recipe.ray.cluster())
    recipe = with_whole_student(recipe)
    fabric = launch(recipe.train, unused_parameters=recipe.methods.end_early)
    kind = parts.student_class(recipe.student.detector)
    problem = recipe.student_problem(kind)
    if problem is not None:
        raise UserError(": ".join(problem))
    for path in recipe.deploy.runners or ():
        import_object(path, "deploy.runners")  # before the training, which takes long
    if dry_run:
        rehearse(recipe, parts, fabric, distillation=distillation, without_data=without_data, ships=ships)
        return recipe.run_dir
    folder, console = RunFolder(recipe.run_dir), open_console(quiet=not fabric.is_global_zero)
    with working_in(folder, fabric), ExitStack() as stack:
        need_common_folder(fabric, folder.path)
        if not resume:
            need_whole(folder, labelling_of(recipe))
        elif not folder.recipe.exists():
            console.print(f"{folder.path}: there is nothing to resume; this run begins anew", markup=False)
        on_first_process(fabric, lambda: write_recipe(folder, dump_recipe(recipe), whole=False))
        manifest = Manifest(folder.path, versions())
        data = open_data(data_plan(recipe), fabric)
        loggers = stack.enter_context(logging_run(fabric, logging_plan(recipe), folder, console, resume=resume))
        later = outlook(recipe, parts, len(data.train), distillation=distillation, ships=ships)
        work = _Run(recipe, parts, fabric, data, folder, manifest, console, resume, loggers, later)
        _train(work, distillation=distillation)
        if ships and is_first_process():
            if kind.exportable is None:
                _ship(recipe, parts, data, manifest)
            else:
                name = recipe.student.detector if parts.student is None else kind.__name__
                console.print(
                    f"not exported, validated or benchmarked: a {name} cannot be exported: {kind.exportable}; "
                    f"its weights are {folder.weights()}, its figures stand above"
                )
        if manifest.worked and is_first_process():
            loggers.table(final_table(folder, reported=ships and kind.exportable is None), files_of(folder))
        if not manifest.worked:
            console.print(
                f"{folder.path}: everything was done already and its inputs are the same; nothing was repeated"
            )
        for line in about_what_is_left(folder):
            console.print(line, markup=False, soft_wrap=True)
    return folder.path


def _train(work: _Run, *, distillation: bool) -> None:
    recipe, data = work.recipe, work.data
    if not data.has_labels and not distillation:
        raise UserError("labels.fraction is 0: without teachers there is nothing to train on")
    labelling = labelling_of(recipe)
    if distillation:
        fine_tune = None if labelling is None else labelling.settings.fine_tune
        check_labelled(len(data.train), recipe.train, baseline=recipe.baseline, fine_tune=fine_tune)
    work.describe_data()
    work.check_lengths(distillation=distillation)
    work.check_cut(distillation=distillation)
    teacher = pseudo = None
    if distillation and has_a_teacher(recipe.teacher, recipe.methods, recipe.pseudo_labels, work.parts):
        teacher = work.teacher()
        work.check_room_of_cache(teacher)
    elif distillation:
        work.check_methods(None)
    if distillation and labelling is not None:
        pseudo = label_images(work.fabric, labelling, data, work.manifest, work.console, resume=work.resume)
    if recipe.student.prune is not None:
        work = replace(work, pruned=work.cut())
        if distillation:
            work.check_methods(teacher)
    for plan in work.student_trainings(teacher, pseudo, distillation=distillation):
        work.train(plan)
    on_first_process(work.fabric, lambda: write_recipe(work.folder, dump_recipe(recipe), whole=True))
    if distillation and recipe.deploy.int8.qad is not None:
        work.train_on_int8_grids(teacher)


@dataclass(frozen=True)
class _Run:
    """The trainings of a run, while they are done."""

    recipe: Recipe
    parts: Parts
    fabric: Fabric
    data: Datasets
    folder: RunFolder
    manifest: Manifest
    console: Console
    resume: bool
    loggers: OpenLoggers
    later: Mapping[str, Later]
    pruned: PrunedStudent | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Identify what all trainings depend on."""
        return {"data": self.data.identity, "seed": self.recipe.seed, "world_size": self.fabric.world_size}

    def describe_data(self) -> None:
        data, fabric = self.data, self.fabric
        self.console.print(
            f"{self.recipe.name}: {len(data.train) if data.has_labels else 0} training and {len(data.val)} validation "
            f"images, {counted(len(data.train.categories), 'class')}, {counted(fabric.world_size, 'process')} on "
            f"{fabric.device.type}",
        )
        sets = (data.train_split, data.train), (data.val_split, data.val)
        notes = notes_about(*sets, data.has_labels) if fabric.is_global_zero else []
        for line in (*notes, *canvas_notes(data.canvas, data.padding), *data.about_missing_labels(self.recipe.labels)):
            self.console.print(line, markup=False, soft_wrap=True)  # with commands that may be copied

    def check_lengths(self, *, distillation: bool) -> None:
        """Refuse a training that cannot work before another one takes hours."""
        for plan in training_plans(self.recipe, self.parts, distillation=distillation):
            for line in check(plan, len(self.data.train)):
                self.console.print(line)

    def check_cut(self, *, distillation: bool) -> None:
        """Refuse a cut that cannot be made before a teacher trains or labels for hours."""
        recipe, data = self.recipe, self.data
        if recipe.student.prune is None:
            return
        check_source(recipe.student.prune, recipe.teacher, data.train.categories, distillation=distillation)
        rehearse_cut(recipe.student, len(data.train.categories), data.canvas, recipe.seed)

    def teacher(self) -> Detector:
        """Load or train the teacher, and measure it on the validation images before a student learns from it."""
        settings = self.recipe.teacher
        if self.parts.teacher is None and settings is not None and settings.train is not None:
            return self._trained_teacher(settings)
        names = dict(zip(self.data.train.category_ids, self.data.train.categories, strict=True))
        teacher = open_given(settings, self.parts.teacher, self.fabric.device, names)
        named, key = teacher.class_names is not None, key_of(None if self.parts.teacher is not None else settings)
        detector, labels = match_teacher(
            teacher, key, self.data.train.categories, distillation_plan(self.recipe, self.parts), self._new_student()
        )
        if labels and not named:
            self.console.print(f"teacher {teacher.file}: does not name its classes; they are taken for the data's")
        check_teacher(
            teacher,
            labels,
            self.data.val,
            self.manifest,
            stage=TEACHER_CHECK,
            identity=self.data.val_identity,
            shown=resized_images(self.recipe.data.eval_short, self.recipe.data.long),
            min_map=0.0 if settings is None else settings.min_map,
            report=self.console.print,
            write=self.fabric.is_global_zero,
            max_detections=self.recipe.deploy.max_detections,
            canvas=self.data.canvas,
        )
        return detector

    def _trained_teacher(self, settings: Teacher) -> Detector:
        untrained = untrained_teacher(settings, len(self.data.train.categories))
        distillation_plan(self.recipe, self.parts).check(self._new_student(), untrained)
        plan = teacher_plan(self.recipe)
        self._stage(plan)
        teacher, record = load_detector(self.folder.weights(TEACHER))
        freeze(teacher).to(self.fabric.device)
        limit = plan.max_detections

        def check() -> dict[str, Any]:
            return {"metrics": evaluate_on(teacher, self.data, self.fabric, plan.workers, limit).to_dict()}

        inputs = {"data": self.data.val_identity, "weights": state_sha256(teacher), **limit_input(limit)}
        measured = self.manifest.stage(TEACHER_CHECK, inputs, [], check, write=self.fabric.is_global_zero)
        found = CocoMetrics.from_dict(measured["metrics"])
        kind = " ".join(name for name in (record.model.detector, record.model.backbone) if name)
        self.console.print(f"teacher: {kind}, mAP {map_text(found)} on the validation images")
        if found.best_map < settings.min_map:
            raise UserError(
                f"teacher.min_map is {settings.min_map:g} and the teacher reaches {map_text(found)} mAP on "
                f"{self.data.val_split.annotations}: train it longer, or check that its classes and images are these"
            )
        return teacher

    def check_methods(self, teacher: Detector | None) -> None:
        """Refuse methods that student and teacher, if there is one, do not fit, before a baseline trains for hours."""
        learning = distillation_plan(self.recipe, self.parts)
        if learning.names:
            learning.check(self._new_student(), teacher)

    def check_room_of_cache(self, teacher: Detector) -> None:
        """Refuse a cache of the teacher that would fill the disk before a baseline trains for hours. How many images
        pseudo labels add is not known yet; the student's training looks again."""
        if self.folder.weights().is_file():  # it may be finished, and need no cache any more
            return
        learns = distillation_plan(self.recipe, self.parts)
        cache = learns.open_cache(teacher, self.recipe.train.precision)
        if cache is not None:
            methods = learns.check(self._new_student(), teacher)
            on_first_process(self.fabric, lambda: need_room(cache, self.recipe.train, self.data.train, methods))

    def _new_student(self) -> Detector:
        """The student before its training, without weights that would have to be downloaded."""
        classes, student = len(self.data.train.categories), self.recipe.student
        if self.parts.student is not None:
            return self.parts.student(classes)
        if self.pruned is not None:
            return build_detector(self.pruned.model, classes, self.recipe.seed, key="student")
        model = student.built().model_copy(update={"weights": "none"})
        return build_detector(model, classes, self.recipe.seed, key="student")

    def cut(self) -> PrunedStudent:
        """Cut the student."""
        recipe, prune = self.recipe, self.recipe.student.prune
        assert prune is not None, "the caller looks"
        plan = cut_plan(recipe, source_of(prune, recipe.teacher, self.folder))
        return cut_student(self.fabric, plan, self.data, self.manifest, recipe.data.workers, self._say)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def student_trainings(
        self, teacher: Detector | None, pseudo: PseudoLabelled | None, *, distillation: bool
    ) -> Iterator[TrainingPlan]:
        """The student's trainings in their order; the last one makes the student. A plan may need the files of the one
        before it."""
        recipe = self.recipe
        alone = student_plan(recipe, self.parts, self.pruned)
        if distillation and recipe.baseline:
            yield replace(alone, name=BASELINE, start=None, identity={})
            if self.pruned is not None and (pseudo is not None or recipe.methods.enabled() or self.parts.methods):
                yield replace(alone, name=FINE_TUNED)
        first = alone
        if distillation:
            identity = {**alone.identity, **self._taught(teacher)}
            learning = distillation_plan(recipe, self.parts)
            first = replace(first, teacher=teacher, distillation=learning, identity=identity)
        if pseudo is not None:
            first = replace(first, images=pseudo.images, identity={**first.identity, **pseudo.identity})
        fine_tune = None if pseudo is None or recipe.pseudo_labels is None else recipe.pseudo_labels.fine_tune
        if fine_tune is None:
            yield first
            return
        yield replace(first, name=STUDENT_ON_PSEUDO_LABELS)
        start = self.folder.weights(STUDENT_ON_PSEUDO_LABELS)
        settings = fine_tuning(recipe.train, fine_tune)
        yield replace(alone, settings=settings, start=start, identity={"start": sha256_of(start)})

    def train(self, plan: TrainingPlan) -> None:
        """Do a training, if it is not done yet, and say how it went."""
        result = self._stage(plan)
        self.console.print(f"{plan.name}: mAP {result['metrics']['map']:.2f} ({result['seconds']:.0f} s of training)")

    def _stage(self, plan: TrainingPlan) -> dict[str, Any]:
        inputs = {
            **self.identity,
            "model": plan.model.model_dump(mode="json", exclude_none=True),
            "train": plan.settings.model_dump(mode="json", exclude=NOT_THE_RESULT),
            **(
                self.parts.student_identity()
                if plan.build is not None
                else named_identity("named_model", plan.model.own_parts())
            ),
            **start_identity(plan),
            **plan.identity,
        }

        def work() -> dict[str, Any]:
            later = self.later.get(plan.name, NOTHING_LATER)
            told = replace(plan, identity=inputs, loggers=self.loggers, later=later)
            return train(self.fabric, told, self.data, resume=self.resume)

        outputs = [self.folder.weights(plan.name)]
        result: dict[str, Any] = self.manifest.stage(plan.name, inputs, outputs, work, write=self.fabric.is_global_zero)
        return result

    def train_on_int8_grids(self, teacher: Detector | None) -> None:
        from compress.run.qad import distill_quantized

        plan = replace(qad_plan(self.recipe, self.data, self.parts), loggers=self.loggers)
        taught = self._taught(teacher)
        result = distill_quantized(
            self.fabric, plan, self.data, self.manifest, teacher=teacher, taught=taught, resume=self.resume
        )
        self.console.print(
            f"{STUDENT_ON_INT8_GRIDS}: mAP {result['metrics']['map']:.2f} on the grids of its int8 file "
            f"({result['seconds']:.0f} s of training)",
        )

    def _taught(self, teacher: Detector | None) -> dict[str, Any]:
        """Identify what a student learns from besides labels, as JSON."""
        distillation = distillation_plan(self.recipe, self.parts)
        if teacher is None and not distillation.names:
            return {}
        return {
            "methods": distillation.methods.model_dump(mode="json"),
            "inherit": distillation.inherit,
            "teacher": None if teacher is None else state_sha256(teacher),
            **distillation.cache_identity(),
            **method_identity(distillation.methods),
            **named_identity("named_methods", {f"methods.{path}": path for path in distillation.methods.own}),
            **self.parts.method_identity(),
        }


def _ship(recipe: Recipe, parts: Parts, data: Datasets, manifest: Manifest) -> None:
    """Make the files, validate and measure them, and write the report. One process, after training."""
    from compress.export.onnx import SAMPLES
    from compress.run.artifacts import make, plans_of_a_run
    from compress.run.evaluation import EvaluationPlan, evaluate
    from compress.run.kept import KeptPlan, keep_evaluation
    from compress.run.report import ReportPlan, commands, labelled_by_teachers, show_report, write_report

    deploy, folder = recipe.deploy, RunFolder(recipe.run_dir)
    (train, split), val = splits(recipe.data, recipe.runs, write=False), data.val
    checks = checks_on(recipe.data, train, val, data.canvas)
    checks = replace(checks, identity=data.identity_of(checks.images[:SAMPLES]))
    labelled = labelled_split(data_plan(recipe))
    made = []
    for plan in plans_of_a_run(folder, deploy, checks, quantizing(recipe, data.digests), manifest):
        for artifact in make(plan):
            made.append(artifact)
            open_console().print(f"export: {artifact}", markup=False)  # brackets are no styles
    prune, teacher = recipe.student.prune, None
    measured = has_a_teacher(recipe.teacher, recipe.methods, recipe.pseudo_labels, parts)
    if recipe.teacher is not None and parts.teacher is None and (measured or (prune and prune.of == TEACHER)):
        teacher = checkpoint_to_show(recipe.teacher, folder, val)
    device = "cuda" if recipe.train.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    names = dict(zip(val.category_ids, val.categories, strict=True))
    pictures = data.val_identity.get("val_pictures")
    cluster = None if recipe.ray is None else recipe.ray.cluster()
    judged = EvaluationPlan(folder, manifest, deploy, checks, split, val, pictures, teacher, names, device, cluster)
    rows = evaluate(judged, made)
    limit = deploy.max_detections
    kept = KeptPlan(folder, val, split.images, data.canvas, teacher, data.val_identity, limit, device)
    keep_evaluation(kept, manifest)
    labelling, pseudo = labelling_of(recipe), None
    if labelling is not None:
        has_labels = recipe.labels is None or recipe.labels.fraction > 0
        lists, fine_tune = labelling.stages(folder.stages()), labelling.settings.fine_tune
        pseudo = labelled_by_teachers(folder, lists, labelled if has_labels else None, fine_tune)
    report = ReportPlan(
        name=recipe.name,
        folder=folder,
        val=val,
        input_size=checks.input_size,
        teacher=teacher,
        has_teacher=measured,
        pseudo_labels=pseudo,
        commands=commands(folder, split),
        device=device,
        prune=prune,
        methods=(*recipe.methods.enabled(), *parts.methods),
    )
    inputs = {"rows": rows, "stages": manifest.identity(), "name": recipe.name, "commands": list(report.commands)}
    inputs |= {"versions": versions()}
    manifest.stage(REPORT, inputs, [folder.report, folder.page], lambda: write_report(report, rows))
    show_report(folder)
