"""The trainings of a run: teacher, baseline and student, each built from its section, trained and saved.

Everything here works the same in one process and in several; process 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.train import Train
from compress.console import open_console
from compress.data.concat import TrainingImages
from compress.data.loader import eval_loader, train_loader
from compress.data.views import Canvases, Views, different
from compress.detectors.base import Capability, Detector
from compress.detectors.begin import begin_from
from compress.detectors.build import build_detector, inherit, model_of
from compress.detectors.checkpoints import (
    ModelRecord,
    check_described,
    checkpoint_file,
    load_detector,
    save_detector,
)
from compress.distill.build import build_methods
from compress.distill.level_matching import describe
from compress.distill.method import Method
from compress.distill.teacher_cache import TeacherCache
from compress.distill.teacher_outputs import looked_at
from compress.distill.weighting import WeightedMethod
from compress.manifest import TEACHER, RunFolder, fingerprint
from compress.run.data import Datasets
from compress.run.parts import describe as describe_part
from compress.training.distributed import is_first_process, on_first_process
from compress.training.evaluate import evaluate
from compress.training.loggers.opened import OpenLoggers
from compress.training.loop import Training, check_length, fit, steps_of, without_effect
from compress.training.place import place_for, publish, telling_what_stays
from compress.training.time_left import NOTHING_LATER, Later
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.validate.coco import DETECTIONS, CocoMetrics

EVAL_BATCH = 8


@dataclass(frozen=True)
class Distillation:
    """Plan of how a student learns from more than labels.

    methods: the recipe's section. own: methods that are there as objects; a training works on copies.
    inherit: start the student's neck and head from the teacher's.
    cache: folder of the teacher's outputs; None: it runs in every step. cache_classes: see `TeacherCache`.
    """

    methods: Methods = field(default_factory=Methods)
    inherit: bool = False
    own: Mapping[str, Method | WeightedMethod] = field(default_factory=dict)
    cache: Path | None = None
    cache_classes: int | None = None

    @property
    def names(self) -> list[str]:
        """The methods that take part."""
        return [*self.methods.enabled(), *self.own]

    @property
    def of_teacher(self) -> list[str]:
        """Those of them that learn from the teacher."""
        own = {name: part.method if isinstance(part, WeightedMethod) else part for name, part in self.own.items()}
        return [*self.methods.of_teacher(), *(name for name, part in own.items() if part.needs_teacher)]

    def build(
        self, student: Detector, teacher: Detector | None, *, seed: int = 0, compiled: bool = False
    ) -> dict[str, WeightedMethod]:
        """The methods, with fresh adapters. Raises UserError where teacher, student and methods do not fit."""
        return build_methods(self.methods, student, teacher, seed=seed, compiled=compiled, own=self.own)

    def cache_identity(self) -> dict[str, Any]:
        """Identify how the teacher's outputs are rounded on their way through a cache, as JSON; empty without one."""
        return {} if self.cache is None else {"teacher_cache": {"classes": self.cache_classes}}

    def open_cache(self, teacher: Detector, precision: str) -> TeacherCache | None:
        """The teacher's cache, if it has one. precision: as `train.precision`."""
        if self.cache is None:
            return None
        described = describe_part(teacher)
        described["settings"].pop("compiled", None)  # of its loss
        identity = {
            "teacher": described,
            "model": None if teacher.model is None else teacher.model.model_dump(mode="json", exclude_none=True),
            "mean": teacher.mean.flatten().tolist(),
            "std": teacher.std.flatten().tolist(),
            "precision": precision,
        }
        return TeacherCache(self.cache, teacher, identity, classes=self.cache_classes, report=_say)

    def pass_on(self, student: Detector, teacher: Detector) -> None:
        """Let the student inherit, where it should. Raises UserError where nothing fits."""
        if self.inherit and not inherit(student, teacher):
            raise UserError(
                f"teacher.inherit: no layer of the teacher's neck and head (width {teacher.feature_channels}) fits the "
                f"student's (width {student.feature_channels}); give both the same neck_channels"
            )

    def check(self, student: Detector, teacher: Detector | None) -> dict[str, WeightedMethod]:
        """Do what the student's training will begin with. The weights of `student` do not matter, and change.

        Raises UserError where teacher, student and methods do not fit each other.
        """
        methods = self.build(student, teacher)
        if teacher is not None:
            self.pass_on(student, teacher)
        return methods


@dataclass(frozen=True)
class TrainingPlan:
    """One training of a run, built anew from its settings.

    name: of its folder, its checkpoint and its row in the manifest.
    teacher, distillation: what it learns from besides labels, and how; None: from labels alone.
    images: to train on, with the classes of the labelled ones; None: the labelled ones.
    start: a checkpoint of the same model with the weights to begin with; None: fresh ones.
    identity: everything that shapes the result (JSON-able).
    recipe_sha256: for the checkpoint's record.
    build: gives the detector for a number of classes, in the place of `model`.
    max_detections: of an image that count where it is measured, if more than COCO's 100.
    loggers: of other tools, that are told how it goes. later: what the run does after it.
    """

    name: str
    model: Model
    settings: Train
    folder: RunFolder
    seed: int = 0
    workers: int = 0
    teacher: Detector | None = None
    distillation: Distillation = field(default_factory=Distillation)
    images: TrainingImages | None = None
    start: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    recipe_sha256: str = ""
    build: Callable[[int], Detector] | None = None
    max_detections: int = DETECTIONS
    loggers: OpenLoggers | None = None
    later: Later = NOTHING_LATER

    def detector(self, num_classes: int) -> Detector:
        """The detector as its training begins with it."""
        if self.build is not None:
            return self.build(num_classes)
        return build_detector(self.model, num_classes, self.seed, compiled=self.settings.compile, key=self.key)

    @property
    def init(self) -> str | None:
        """The checkpoint that the detector begins from; None also for a whole one, which loads its own when built."""
        return None if self.build is not None or self.model.is_whole else self.model.init

    @property
    def key(self) -> str:
        """Key of the recipe's section that describes the detector."""
        return "teacher.model" if self.name == TEACHER else "student"


def check(plan: TrainingPlan, images: int) -> list[str]:
    """Refuse what cannot work on so many images, before other trainings take hours. Returns lines about settings that
    it is too short for."""
    settings = plan.settings
    if settings.batch_size > images:
        raise UserError(f"{plan.name}: batch_size {settings.batch_size} is more than the {images} training images")
    batches = images // (settings.batch_size // settings.accumulate)
    stops = {name: term.stop_epoch for name, term in plan.distillation.methods.enabled().items()}
    check_length(plan.name, settings, batches, stops)
    return without_effect(plan.name, settings, batches)


def train(
    fabric: Fabric, plan: TrainingPlan, data: Datasets, *, resume: bool = False, max_steps: int | None = None
) -> dict[str, Any]:
    """Do a training and save `<run>/<name>.safetensors`, where a finished one stays until then. Returns its figures
    (JSON-able), and the `canvas` that the validation images lay on."""
    output, identity = plan.folder.weights(plan.name), fingerprint(plan.identity)
    place = on_first_process(fabric, lambda: place_for(plan.folder, plan.name, identity, resume=resume))
    fabric.seed_everything(plan.seed, verbose=False)
    detector, teacher = plan.detector(len(data.train.categories)), plan.teacher
    renewed = begin(plan, detector, data.train.categories)
    if renewed and fabric.is_global_zero:
        _say(f"{plan.name}: {len(renewed)} class layers begin anew: what it starts from has other classes")
    if plan.build is not None:
        check_described(output, detector, _record(plan, detector, data, None))
    if plan.start is not None:
        detector.load_state_dict(load_detector(plan.start)[0].state_dict())
    methods = plan.distillation.build(detector, teacher, seed=plan.seed, compiled=plan.settings.compile)
    if teacher is not None:
        taught = [built.method for built in methods.values() if built.method.needs_teacher]
        if any(method.needs == {Capability.FEATURES} for method in taught):
            note = describe(detector.strides, teacher.strides)
            if note is not None and fabric.is_global_zero:
                open_console().print(f"{plan.name}: {note}")
        plan.distillation.pass_on(detector, teacher)
    cache = None if teacher is None or not methods else plan.distillation.open_cache(teacher, plan.settings.precision)
    loader = _loader(fabric, plan, data, keys=cache is not None)
    if cache is not None:
        images = data.train if plan.images is None else plan.images
        on_first_process(fabric, lambda: need_room(cache, plan.settings, images, methods))
    training = Training(
        name=plan.name,
        folder=place,
        settings=plan.settings,
        loader=loader,
        evaluate=lambda d: evaluate_on(d, data, fabric, plan.workers, plan.max_detections),
        identity=identity,
        teacher=teacher,
        methods=methods,
        cache=cache,
        loggers=plan.loggers,
        later=plan.later,
    )
    with telling_what_stays(plan.folder, plan.name, place):
        result = fit(fabric, detector, training, resume=resume, max_steps=max_steps)

    def save() -> None:
        if result.metrics is not None:
            save_detector(output, detector, metadata=_record(plan, detector, data, result.metrics))
            publish(plan.folder, plan.name, place)

    on_first_process(fabric, save)
    return {**result.to_dict(), "canvas": list(data.canvas)}


def pictures_of(settings: Train, images: int) -> int:
    """Pictures that a training on so many images looks at, every pass counted."""
    return steps_of(settings, images // (settings.batch_size // settings.accumulate))[1] * settings.batch_size


def begin(plan: TrainingPlan, detector: Detector, class_names: Sequence[str]) -> Sequence[str]:
    """Give `detector` the weights that its `init` says. Returns the class layers that begin anew.

    Raises UserError for a checkpoint of another architecture.
    """
    if plan.start is not None or plan.init is None:
        return getattr(detector, "renewed", ())
    if is_first_process():
        _say(f"{plan.name}: begins from {plan.init}")
    return begin_from(detector, plan.init, class_names, f"{plan.key}.init")


def start_identity(plan: TrainingPlan) -> dict[str, str]:
    """Identify the checkpoint that the detector begins from, as JSON; empty where it has none of ours."""
    return {} if plan.init is None else {"init": sha256_of(checkpoint_file(plan.init))}


def need_room(
    cache: TeacherCache, settings: Train, images: TrainingImages, methods: Mapping[str, WeightedMethod]
) -> None:
    """Raise UserError where a training would fill the disk with its teacher's outputs."""
    assert settings.views is not None, "the recipe was validated"
    visits = pictures_of(settings, len(images))
    parts = looked_at(weighted.method for weighted in methods.values())
    views = different(settings.views, images.outcomes())
    cache.need_room(Canvases.for_all(images).counts(images), views, visits, parts)


def evaluate_on(
    detector: Detector, data: Datasets, fabric: Fabric, workers: int, max_detections: int = DETECTIONS
) -> CocoMetrics:
    """COCO metrics (percent) on the validation images, shared out among the processes. max_detections: see
    `evaluate_coco`."""
    loader = eval_loader(
        data.val,
        batch_size=EVAL_BATCH,
        workers=workers,
        canvas=data.canvas,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    return evaluate(detector, loader, data.val, fabric.device, max_detections)


# --- details --------------------------------------------------------------------------------------------


def _loader(fabric: Fabric, plan: TrainingPlan, data: Datasets, *, keys: bool) -> DataLoader[Any]:
    return train_loader(
        data.train if plan.images is None else plan.images,
        batch_size=plan.settings.batch_size // plan.settings.accumulate,
        seed=plan.seed,
        workers=plan.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        views=None if plan.settings.views is None else Views(plan.settings.views, plan.seed),
        keys=keys,
    )


def _say(line: str) -> None:
    open_console().print(line, markup=False, soft_wrap=True)


def _record(plan: TrainingPlan, detector: Detector, data: Datasets, metrics: CocoMetrics | None) -> ModelRecord:
    return ModelRecord(
        model=model_of(detector),
        num_classes=detector.num_classes,
        class_names=data.train.categories,
        category_ids=data.train.category_ids,
        val_map=None if metrics is None else metrics.map,
        resize_short_long=data.resize_short_long,
        operating_point=None if metrics is None else metrics.operating_point,
        recipe_sha256=plan.recipe_sha256,
    )
