"""`--dry-run`: build everything that a recipe names and take one real training step on made-up images.

The recipe's own images are looked at before: both files are read, the first pictures are opened, and the steps of each
training are counted. Where they are missing, that is an error, unless `without_data` says that it is meant. At the end
a few steps are timed on them, and how long the run will take is estimated.

Nothing is downloaded and nothing is kept. Weights that would have to be downloaded (the zoo's teacher, ImageNet
backbones) are random here, and the output says so. Made-up images are at most 256 px on the short side and two a
process, so that a recipe for eight GPUs can be rehearsed on a laptop.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from PIL import Image
from rich.console import Console

from compress.config.base import ZOO_PREFIX
from compress.config.data import Split
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.config.teacher import Source, Teacher
from compress.console import open_console
from compress.data.synthetic import class_names, generate
from compress.detectors.base import Detector, freeze
from compress.detectors.build import build_detector, model_size
from compress.detectors.checkpoints import COCO_CATEGORIES, ZOO, ModelRecord, zoo_model
from compress.manifest import STUDENT, RunFolder
from compress.pseudo.images import images_in
from compress.run.data import DataPlan, open_data, open_splits, splits
from compress.run.estimate import Sets, stages_of_run
from compress.run.estimate import lines as estimate_lines
from compress.run.parts import Parts
from compress.run.plans import data_plan, on_pseudo_labels, training_plans, trainings_to_come
from compress.run.pruned import check_source, rehearse_cut
from compress.run.pseudo_labels import LabellingPlan, labelling_plan, only_labels
from compress.run.pseudo_labels import rehearse as rehearse_labels
from compress.run.teacher import NO_CLASS_SHARED, key_of, match_teacher, open_given, untrained_teacher
from compress.run.trainings import Distillation, TrainingPlan, check, train
from compress.teachers.base import BoxTeacher, DetectorTeacher
from compress.teachers.load import open_teacher
from compress.training.distributed import on_first_process
from compress.training.loop import steps_of
from deploy.core.errors import UserError
from deploy.core.shown import counted
from deploy.core.storage import is_file, is_folder
from deploy.latency.telemetry import Telemetry
from deploy.validate.coco import read_annotations

SHORT_PX, LONG_PX = 256, 448
OPENED = 8  # pictures of each set


def dry_run(
    recipe: Recipe,
    parts: Parts,
    fabric: Fabric,
    *,
    distillation: bool,
    without_data: bool = False,
    ships: bool = False,
) -> None:
    """ships: the run would also make and measure files. Raises UserError for what would also stop the real run."""
    console = open_console(quiet=not fabric.is_global_zero)
    seen = _data(recipe, parts, console, distillation=distillation, without_data=without_data)
    categories = seen.categories
    if recipe.student.prune is not None:
        recipe = _cut(recipe, categories, console, distillation=distillation)
    inherit = recipe.teacher is not None and recipe.teacher.inherit
    learning = Distillation(recipe.methods, inherit, parts.methods)
    new_student = partial(_student, recipe, parts, len(categories))
    teacher = None
    learns = recipe.teacher is not None and not only_labels(recipe.teacher, recipe.methods, recipe.pseudo_labels)
    if distillation and (parts.teacher is not None or learns):
        teacher = _teacher(recipe, parts, learning, new_student(), categories, fabric, console)
    labellers = _labellers(recipe, categories, fabric, console) if distillation and recipe.pseudo_labels else []
    if distillation:
        learning.check(new_student(), teacher)
    with tempfile.TemporaryDirectory() as own:
        place = Path(fabric.broadcast(own))  # the first process's: all of them read what it writes
        small = _rehearsal(recipe, place, categories, console, write=fabric.is_global_zero)
        folder = RunFolder(small.run_dir)
        data = open_data(DataPlan(small.data, small.runs, folder), fabric)
        size = (recipe.data.eval_short, recipe.data.long)
        student = _student(small, parts, len(categories))
        figures = model_size(student, (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32))
        kind = " ".join(filter(None, (recipe.student.detector, recipe.student.size, recipe.student.backbone)))
        console.print(
            f"student: {kind}, {figures['params_m']:.2f} M parameters, "
            f"{figures['gflops']:.1f} GFLOPs at {size[0]} x {size[1]}",
        )
        if teacher is not None:
            teacher.to(fabric.device)
        plan = TrainingPlan(
            name=STUDENT,
            model=small.student.built(),
            settings=small.train,
            folder=folder,
            seed=small.seed,
            teacher=teacher,
            distillation=learning if distillation else Distillation(),
            images=rehearse_labels(_labelling(small), data, labellers, place, console) if labellers else None,
            build=parts.student,
        )
        result = train(fabric, plan, data, max_steps=1)
        sets = _drawn(recipe, place / "drawn", fabric) if recipe.data.synthetic is not None else seen.sets
        if sets is not None:
            for line in _estimate(recipe, parts, fabric, sets, teacher, distillation=distillation, ships=ships):
                console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"dry run of {recipe.name}: {result['steps']} step on made-up images; everything fits together",
    )


@dataclass(frozen=True)
class _Seen:
    """Of the recipe's images: the categories by id, COCO's where no data are there, and that was meant; and the
    images, if they are there."""

    categories: dict[int, str]
    sets: Sets | None = None


def _data(recipe: Recipe, parts: Parts, console: Console, *, distillation: bool, without_data: bool) -> _Seen:
    """Look at the images and count the steps."""
    data = recipe.data
    if data.synthetic is not None:
        _say_lengths(recipe, parts, data.synthetic.train, console, distillation=distillation)
        return _Seen(dict(enumerate(class_names(data.synthetic.classes), start=1)))
    assert data.val is not None, "the recipe was validated"
    sets_given = [*data.train_sets.items(), ("val", data.val)]
    lost = [
        f"data.{key}.{what}: {path}: no such {'file' if what == 'annotations' else 'folder'}"
        for key, split in sets_given
        for what, path, there in (("annotations", split.annotations, is_file), ("images", split.images, is_folder))
        if not there(path)
    ]
    if lost and not without_data:
        raise UserError("\n".join([*lost[:-1], f"{lost[-1]}; to rehearse without it, add --without-data"]))
    if lost:
        for _, split in sets_given:
            if is_file(split.annotations):
                found = read_annotations(split.annotations)["categories"]
                return _Seen({row["id"]: row["name"] for row in found})
        console.print(f"dry run: {sets_given[0][1].annotations} is not there; COCO's 80 classes stand in")
        return _Seen(dict(COCO_CATEGORIES))
    with tempfile.TemporaryDirectory() as place:  # where several training sets are joined
        train, val, canvas = open_splits(data_plan(recipe), *splits(data, Path(place)), cache=False)
    for images in (train, val):
        for index in range(min(OPENED, len(images))):
            images[index]
    files = [{images.path(index) for index in range(len(images))} for images in (train, val)]
    both = len(files[0] & files[1])
    if both:
        console.print(f"note: {both} of {len(val)} validation images are also training images: mAP says little")
    count = len(train) if recipe.labels is None else round(len(train) * recipe.labels.fraction)
    labelled = "" if recipe.labels is None else f", about {count} of them with labels"
    console.print(
        f"data: {len(train)} training images{labelled}, {len(val)} for validation, "
        f"{counted(len(train.categories), 'class')}; the first {OPENED} of both could be read",
    )
    if count:
        _say_lengths(recipe, parts, count, console, distillation=distillation)
    sets = Sets(train, val, count, len(val), data.cache, canvas)
    return _Seen(dict(zip(train.category_ids, train.categories, strict=True)), sets)


def _drawn(recipe: Recipe, folder: Path, fabric: Fabric) -> Sets:
    """A few of the images that the run would draw."""
    wanted = recipe.data.synthetic
    assert wanted is not None, "the caller looks"
    trained = recipe.train if recipe.teacher is None or recipe.teacher.train is None else recipe.teacher.train
    few = {"train": min(wanted.train, max(recipe.train.batch_size, trained.batch_size)), "val": min(wanted.val, OPENED)}
    on_first_process(fabric, lambda: generate(folder, **{**wanted.model_dump(), **few}))
    train, val = (Split(annotations=folder / f"{name}.json", images=folder / "images") for name in few)
    opened = open_splits(data_plan(recipe), train, val, cache=False)
    return Sets(opened[0], opened[1], wanted.train, wanted.val, recipe.data.cache, opened[2])


def _estimate(
    recipe: Recipe,
    parts: Parts,
    fabric: Fabric,
    sets: Sets,
    teacher: Detector | None,
    *,
    distillation: bool,
    ships: bool,
) -> list[str]:
    """Lines that say how long the run will take."""
    if distillation and recipe.labels is not None and recipe.labels.fraction == 0:
        return ["how long it takes is not estimated: that depends on what the teachers label"]
    pseudo, unlabelled, left_out = recipe.pseudo_labels if distillation else None, 0, []
    given = teacher if recipe.teacher is None or recipe.teacher.train is None else None
    if pseudo is not None:
        unlabelled = sum(len(images_in(folder)) for folder in pseudo.unlabeled if is_folder(folder))
        if recipe.labels is not None:
            unlabelled += round(sets.images / recipe.labels.fraction) - sets.images
        left_out += [] if given is not None else ["the labelling"]
    if recipe.student.prune is not None:
        left_out.append("the cut")
    if recipe.deploy.int8.guided or recipe.deploy.engines is not None:
        left_out.append("the search for int8 layers" if recipe.deploy.int8.guided else "engines")
    with Telemetry() as machine:
        stages = stages_of_run(
            fabric,
            trainings_to_come(recipe, parts, teacher, distillation=distillation),
            sets,
            given=given,
            unlabelled=unlabelled,
            labelled=on_pseudo_labels(recipe),
            deploy=recipe.deploy if ships else None,
        )
        machine.read()
    return estimate_lines(stages, fabric.device, left_out=left_out, readings=machine.readings)


def _say_lengths(recipe: Recipe, parts: Parts, images: int, console: Console, *, distillation: bool) -> None:
    """Count the steps of each training on so many images, and refuse one that cannot work."""
    for plan in training_plans(recipe, parts, distillation=distillation):
        for line in check(plan, images):
            console.print(line)
        settings = plan.settings
        epoch, steps = steps_of(settings, images // (settings.batch_size // settings.accumulate))
        console.print(
            f"{plan.name}: {steps} steps of {settings.batch_size} images, {steps / epoch:.1f} epochs of {images} images"
        )


def _student(recipe: Recipe, parts: Parts, num_classes: int) -> Detector:
    """A new one with random weights."""
    if parts.student is not None:
        return parts.student(num_classes)
    model = recipe.student.built().model_copy(update={"weights": "none"})
    return build_detector(model, num_classes, recipe.seed, key="student")


def _cut(recipe: Recipe, categories: dict[int, str], console: Console, *, distillation: bool) -> Recipe:
    """The recipe with a student of the pruned architecture, or of one like it."""
    prune, data = recipe.student.prune, recipe.data
    assert prune is not None, "the caller looks"
    # Where they are not there, COCO's classes stand in, which say nothing.
    if all(is_file(split.annotations) for split in data.train_sets.values()):
        check_source(prune, recipe.teacher, list(categories.values()), distillation=distillation)
    side = min(data.eval_short, SHORT_PX) // 32 * 32 or 32
    model = rehearse_cut(recipe.student, len(categories), (side, side), recipe.seed)
    if prune.budget in ("latency_ms", "max_map_drop"):
        console.print(f"dry run: student.prune.{prune.budget} is not measured; half of what can leave is cut off")
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"widths": model.widths})})


def _teacher(
    recipe: Recipe,
    parts: Parts,
    learning: Distillation,
    student: Detector,
    categories: dict[int, str],
    fabric: Fabric,
    console: Console,
) -> Detector:
    """Make the teacher that the student learns from. student: a new one, which this changes."""
    names, settings = list(categories.values()), recipe.teacher
    if parts.teacher is not None:
        teacher = open_given(None, parts.teacher, fabric.device, categories)
        return match_teacher(teacher, key_of(None), names, learning, student)[0]
    assert settings is not None
    if settings.given:
        teacher = _open(settings, categories, fabric, console)
        detector, labels = match_teacher(teacher, key_of(settings), names, learning, student)
        if labels and max(labels) < 0:
            console.print(f"teacher {teacher.file}: {NO_CLASS_SHARED}", markup=False)
        return detector
    return _untrained(settings, len(names), console)


def _untrained(settings: Teacher, num_classes: int, console: Console) -> Detector:
    """A teacher that the run would train first."""
    assert settings.model is not None
    _without_download(settings.model, console, "teacher")
    return untrained_teacher(settings, num_classes)


def _labellers(recipe: Recipe, categories: dict[int, str], fabric: Fabric, console: Console) -> list[BoxTeacher]:
    """The teachers of `pseudo_labels`; random ones for what would have to be downloaded or trained first."""
    assert recipe.pseudo_labels is not None
    if recipe.pseudo_labels.teachers is None and recipe.teacher is not None and recipe.teacher.train is not None:
        detector = _untrained(recipe.teacher, len(categories), console)
        name, names = "teacher.safetensors", tuple(categories.values())
        return [DetectorTeacher(detector, file=name, sha256="", class_names=names, device=fabric.device)]
    return [_open(source, categories, fabric, console) for source in _labelling(recipe).sources]


def _labelling(recipe: Recipe) -> LabellingPlan:
    assert recipe.pseudo_labels is not None
    return labelling_plan(
        recipe.pseudo_labels,
        labels=recipe.labels,
        data=recipe.data,
        teacher=recipe.teacher,
        student=recipe.student,
        run=RunFolder(recipe.run_dir),
        max_detections=recipe.deploy.max_detections,
    )


def _open(source: Source, categories: dict[int, str], fabric: Fabric, console: Console) -> BoxTeacher:
    """A random one for what would have to be downloaded."""
    name = (source.checkpoint or "").removeprefix("zoo:")
    if name not in ZOO:
        return open_teacher(_source(source, console), fabric.device, categories=categories)
    console.print(f"dry run: zoo:{name} is not downloaded; random weights stand in")
    detector, names = _zoo(name, len(COCO_CATEGORIES)), tuple(COCO_CATEGORIES.values())
    return DetectorTeacher(detector, file=name, sha256="", class_names=names, device=fabric.device)


def _source(source: Source, console: Console) -> Source:
    """Without a download."""
    if source.torchvision is None or source.torchvision.weights != "coco":
        return source
    console.print(f"dry run: COCO weights of {source.torchvision.model} are not downloaded; random ones stand in")
    return source.model_copy(update={"torchvision": source.torchvision.model_copy(update={"weights": "none"})})


def _zoo(name: str, classes: int) -> Detector:
    return freeze(ModelRecord(model=zoo_model(name), num_classes=classes).build())


def _without_download(model: Model, console: Console, who: str) -> Model:
    if model.init is not None and model.init.removeprefix(ZOO_PREFIX) in ZOO:
        console.print(f"dry run: the {who}'s {model.init} is not downloaded; random weights stand in")
        return model.model_copy(update={"init": None})
    if model.weights != "imagenet":
        return model
    console.print(f"dry run: the {who}'s ImageNet weights are not downloaded; random ones stand in")
    return model.model_copy(update={"weights": "none"})


def _rehearsal(recipe: Recipe, folder: Path, categories: dict[int, str], console: Console, *, write: bool) -> Recipe:
    """The recipe on a few noise images in `folder`, two a process and micro-batch."""
    split = Split(annotations=folder / "noise" / "noise.json", images=folder / "noise")
    if write:
        _draw(split, categories, recipe.seed, images=4 * recipe.train.devices * recipe.train.accumulate)
    short = min(recipe.data.eval_short, SHORT_PX)
    data = recipe.data.model_copy(
        update={
            "synthetic": None,
            "train": split,
            "val": split,
            "short": short,
            "long": max(short, min(recipe.data.long, LONG_PX)),
            "workers": 0,
        }
    )
    schedule = recipe.train.schedule.model_copy(update={"warmup_steps": 0})
    train = recipe.train.model_copy(
        update={
            "batch_size": 2 * recipe.train.devices * recipe.train.accumulate,
            "steps": 1,
            "epochs": None,
            "schedule": schedule,
        }
    )
    student = _without_download(recipe.student, console, "student")
    changed = {"data": data, "labels": None, "train": train, "student": student, "runs": folder / "runs"}
    return recipe.model_copy(update=changed)


def _draw(split: Split, categories: dict[int, str], seed: int, *, images: int) -> None:
    folder = split.images
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        Image.fromarray(random.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(folder / f"{image_id}.png")
        rows.append({"id": image_id, "file_name": f"{image_id}.png", "width": 320, "height": 240})
        for _ in range(4):
            w, h = random.uniform(20, 150, 2)
            x, y = random.uniform(0, 320 - w), random.uniform(0, 240 - h)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, "area": w * h,
                    "category_id": int(random.choice(list(categories))), "bbox": [x, y, w, h],
                }
            )  # fmt: skip
    names = [{"id": key, "name": name} for key, name in categories.items()]
    split.annotations.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": names}))
