"""Plans that a recipe's sections make: what the rest of this folder is given instead of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.config.data import Data, Split
from compress.config.model import Model
from compress.config.recipe import Recipe, recipe_content, recipe_sha256
from compress.data.coco import CocoDetection
from compress.data.digests import PictureDigests
from compress.detectors.base import Detector
from compress.manifest import (
    BASELINE,
    FINE_TUNED,
    STUDENT,
    STUDENT_ON_INT8_GRIDS,
    STUDENT_ON_PSEUDO_LABELS,
    TEACHER,
    RunFolder,
)
from compress.run.data import DataPlan, Datasets, labelled_split, splits, validation_set
from compress.run.loggers import LoggingPlan
from compress.run.parts import Parts
from compress.run.pruned import CutPlan, PrunedStudent, whole_student
from compress.run.pseudo_labels import LabellingPlan, fine_tuning, labelling_plan
from compress.run.trainings import Distillation, TrainingPlan, pictures_of
from compress.training.time_left import Later
from deploy.core.errors import UserError
from deploy.core.storage import is_file

if TYPE_CHECKING:
    from compress.run.artifacts import Checks
    from compress.run.qad import QadPlan
    from compress.run.quantize import Quantizing


def with_whole_student(recipe: Recipe) -> Recipe:
    """The recipe, with a student that is to be pruned as it is before: its own section says only what it is cut from.

    Raises UserError for a checkpoint that cannot be read.
    """
    return recipe.model_copy(update={"student": whole_student(recipe.student, recipe.teacher)})


def data_plan(recipe: Recipe) -> DataPlan:
    """Plan the images of a recipe's run."""
    folder, deploy = RunFolder(recipe.run_dir), recipe.deploy
    return DataPlan(recipe.data, recipe.runs, folder, recipe.labels, deploy.input_size, deploy.max_detections)


def logging_plan(recipe: Recipe) -> LoggingPlan:
    """Plan what loggers are told of a recipe's run."""
    return LoggingPlan(recipe.loggers, recipe.name, recipe_content(recipe), recipe_sha256(recipe))


def training_labels(
    recipe: Recipe | None, given: Split | None, needed: str | None, say: Callable[[str], None]
) -> Split | None:
    """The training images that a cut looks at: those that are given, or the run's, which are drawn where they are
    generated.

    Args:
        recipe: beside the checkpoint, if there is one.
        needed: the setting that cannot do without images, as it is called where it was given; None: they would only
            show mAP, and the run's may lie on another machine.

    Raises UserError where none are found for a setting that needs them, and for the run's validation set.
    """
    if given is not None:
        if recipe is not None and _same_file(given, splits(recipe.data, recipe.runs, write=False)[1]):
            what = needed or "a cut"
            raise UserError(f"{given.annotations}: is the run's validation set; {what} takes training images")
        return given
    if recipe is None:
        if needed:
            raise UserError(f"{needed}: looks at labelled training images, and none are given")
        return None
    labels = labelled_split(data_plan(recipe))
    if needed:
        splits(recipe.data, recipe.runs)
    elif not is_file(labels.annotations):
        say(f"note: mAP is not measured: {labels.annotations}, the run's training labels, is not here")
        return None
    return labels


def distillation_plan(recipe: Recipe, parts: Parts | None = None) -> Distillation:
    """Plan how a recipe's student learns from its teacher."""
    own = {} if parts is None else parts.methods
    if recipe.teacher is None:
        return Distillation(recipe.methods, own=own)
    teacher = recipe.teacher
    return Distillation(recipe.methods, teacher.inherit, own, teacher.cache, teacher.cache_classes)


def labelling_of(recipe: Recipe) -> LabellingPlan | None:
    """Plan what teachers label in a recipe's run; None: nothing."""
    if recipe.pseudo_labels is None:
        return None
    return labelling_plan(
        recipe.pseudo_labels,
        labels=recipe.labels,
        data=recipe.data,
        teacher=recipe.teacher,
        student=recipe.student,
        run=RunFolder(recipe.run_dir),
        max_detections=recipe.deploy.max_detections,
        cluster=None if recipe.ray is None else recipe.ray.cluster(),
    )


def student_plan(recipe: Recipe, parts: Parts | None = None, pruned: PrunedStudent | None = None) -> TrainingPlan:
    """A recipe's student, trained from the labels alone. pruned: where it starts from, if it was cut."""
    return TrainingPlan(
        name=STUDENT,
        model=recipe.student.built() if pruned is None else pruned.model,
        start=None if pruned is None else pruned.file,
        identity={} if pruned is None else pruned.identity,
        settings=recipe.train,
        folder=RunFolder(recipe.run_dir),
        seed=recipe.seed,
        workers=recipe.data.workers,
        recipe_sha256=recipe_sha256(recipe),
        build=None if parts is None else parts.student,
        max_detections=recipe.deploy.max_detections,
    )


def teacher_plan(recipe: Recipe) -> TrainingPlan:
    """The teacher that a recipe trains first."""
    teacher = recipe.teacher
    assert teacher is not None and teacher.model is not None and teacher.train is not None, "the caller looks"
    return replace(student_plan(recipe), name=TEACHER, model=teacher.model, settings=teacher.train)


def training_plans(recipe: Recipe, parts: Parts, *, distillation: bool) -> list[TrainingPlan]:
    """The trainings whose number of images is known beforehand: that of a student that also learns from pseudo labels
    is not."""
    plans = []
    if distillation and recipe.teacher is not None and recipe.teacher.train is not None:
        plans.append(teacher_plan(recipe))
    if not distillation or recipe.pseudo_labels is None:
        learns = distillation_plan(recipe, parts) if distillation else Distillation()
        plans.append(replace(student_plan(recipe), distillation=learns))
    return plans


def trainings_to_come(
    recipe: Recipe, parts: Parts, teacher: Detector | None, *, distillation: bool
) -> list[TrainingPlan]:
    """All trainings of a run in their order, without weights that would have to be downloaded, to see what they cost.

    teacher: what the student learns from, with any weights. The plan of a student on pseudo labels has no images.
    """
    plans = [plan for plan in training_plans(recipe, parts, distillation=distillation) if plan.name == TEACHER]
    alone = student_plan(recipe, parts)
    learns = distillation_plan(recipe, parts) if distillation else Distillation()
    pseudo = recipe.pseudo_labels if distillation else None
    if distillation and recipe.baseline:
        plans.append(replace(alone, name=BASELINE))
        if recipe.student.prune is not None and (learns.names or pseudo is not None):
            plans.append(replace(alone, name=FINE_TUNED))
    taught = replace(alone, teacher=teacher, distillation=learns)
    plans.append(replace(taught, name=STUDENT if pseudo is None else on_pseudo_labels(recipe) or STUDENT))
    if pseudo is not None and pseudo.fine_tune is not None:
        plans.append(replace(alone, settings=fine_tuning(recipe.train, pseudo.fine_tune)))
    qad = recipe.deploy.int8.qad
    if distillation and qad is not None:
        settings = recipe.train.model_copy(update={"steps": qad.steps, "epochs": None, "eval_every": None})
        plans.append(replace(taught, name=STUDENT_ON_INT8_GRIDS, settings=settings))
    return [replace(plan, model=_without_weights(plan.model)) for plan in plans]


def _without_weights(model: Model) -> Model:
    if model.weights == "none" and (model.init is None or model.is_whole):
        return model
    return model.model_copy(update={"weights": "none", "init": None})


def on_pseudo_labels(recipe: Recipe) -> str | None:
    """Name of the training on what teachers label; None: they label nothing."""
    if recipe.pseudo_labels is None:
        return None
    return STUDENT if recipe.pseudo_labels.fine_tune is None else STUDENT_ON_PSEUDO_LABELS


def outlook(recipe: Recipe, parts: Parts, images: int, *, distillation: bool, ships: bool) -> dict[str, Later]:
    """What comes after each training of a run on so many images. That of a student on pseudo labels is not known."""
    plans = trainings_to_come(recipe, parts, None, distillation=distillation)
    unknown = on_pseudo_labels(recipe) if distillation else None
    stages: list[tuple[str, int | None]] = [
        (plan.name, None if plan.name == unknown else pictures_of(plan.settings, images)) for plan in plans
    ]
    between = [("labelling", None)] * (unknown is not None) + [("cut", None)] * (recipe.student.prune is not None)
    own = sum(plan.name == TEACHER for plan in plans)
    stages[own:own] = between
    stages += [(name, None) for name in ("export", "validate", "benchmark") if ships]
    return {
        name: Later(
            sum(pictures or 0 for _, pictures in stages[index:]),
            tuple(name for name, pictures in stages[index:] if pictures is None),
        )
        for index, (name, _) in enumerate(stages, start=1)
    }


def cut_plan(recipe: Recipe, checkpoint: str) -> CutPlan:
    """Plan how a recipe's student is cut from the detector of this checkpoint."""
    assert recipe.student.prune is not None, "the caller looks"
    folder = RunFolder(recipe.run_dir)
    return CutPlan(recipe.student.prune, checkpoint, folder, recipe.data, recipe.deploy, recipe.seed)


def qad_plan(recipe: Recipe, data: Datasets, parts: Parts | None = None) -> QadPlan:
    """Plan how a recipe's student is trained for int8."""
    from compress.run.qad import QadPlan
    from compress.run.quantize import Quantizing

    folder, deploy, pseudo = RunFolder(recipe.run_dir), recipe.deploy, recipe.pseudo_labels
    assert deploy.int8.qad is not None, "the caller looks"
    fine_tuned = pseudo is not None and pseudo.fine_tune is not None  # without methods
    return QadPlan(
        student=folder.weights(),
        adapters=folder.training(STUDENT_ON_PSEUDO_LABELS if fine_tuned else STUDENT).last,
        folder=folder,
        train=recipe.train,
        qad=deploy.int8.qad,
        deploy=deploy,
        quantizing=Quantizing(
            deploy.int8,
            *splits(recipe.data, recipe.runs, write=False),
            digests=data.digests,
            generated=data.generated,
        ),
        input_size=data.canvas,
        resize_short_long=(recipe.data.eval_short, recipe.data.long),
        distillation=distillation_plan(recipe, parts),
        seed=recipe.seed,
        workers=recipe.data.workers,
        recipe_sha256=recipe_sha256(recipe),
    )


def validation_images(recipe: Recipe) -> tuple[Split, CocoDetection, Checks]:
    """The labelled images that a recipe's files are judged on, and what exports are compared with torch on."""
    train, split = splits(recipe.data, recipe.runs)
    val, size = validation_set(split, recipe.data, recipe.deploy.input_size)
    return split, val, checks_on(recipe.data, train, val, size)


def checks_on(data: Data, train: Split, val: CocoDetection, size: tuple[int, int]) -> Checks:
    """What exported files are compared with torch on."""
    from compress.run.artifacts import Checks

    return Checks([val.path(index) for index in range(len(val))], size, (data.eval_short, data.long), train)


def quantizing(recipe: Recipe, digests: PictureDigests | None = None) -> Quantizing:
    """Plan what a recipe's int8 files are calibrated on, and searched with if it says so. digests: of pictures."""
    from compress.run.quantize import Quantizing, Search

    train_split, split = splits(recipe.data, recipe.runs)
    int8, search = recipe.deploy.int8, None
    if int8.guided:
        labels, part = labelled_split(data_plan(recipe)), RunFolder(recipe.run_dir).search_split
        search = Search(labels, recipe.deploy.max_map_drop, int8.deciding_images, part)
    digests = PictureDigests() if digests is None else digests
    return Quantizing(int8, train_split, split, search, digests, recipe.data.synthetic is not None)


def _same_file(one: Split, other: Split) -> bool:
    return all(map(is_file, (one.annotations, other.annotations))) and one.annotations.samefile(other.annotations)
