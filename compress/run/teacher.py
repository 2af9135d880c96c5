"""The teacher of a run: opened or trained here, matched with the data, measured before a student learns from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compress.config.methods import Methods
from compress.config.pseudo import PseudoLabels
from compress.config.teacher import Teacher
from compress.data.coco import CocoDetection
from compress.detectors.base import Capability, Detector, freeze
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.detectors.weights import state_sha256
from compress.manifest import TEACHER, RunFolder
from compress.run.parts import Parts
from compress.run.pseudo_labels import only_labels
from compress.run.trainings import Distillation
from compress.teachers.base import BoxTeacher, DetectorTeacher
from compress.teachers.load import open_teacher
from deploy.core.errors import UserError

NO_CLASS_SHARED = "knows none of the data's classes; its maps can teach, its mAP here is not measured"
UNNAMED = ("teacher", "teacher.checkpoint", "teacher.custom")
"""Teachers that may leave the names of their classes to the data."""


def has_a_teacher(settings: Teacher | None, methods: Methods, pseudo_labels: PseudoLabels | None, parts: Parts) -> bool:
    """Whether there is a teacher that a student learns from, or one to train, which may label alone."""
    if parts.teacher is not None:
        return True
    if settings is None:
        return False
    return settings.train is not None or bool(parts.methods) or not only_labels(settings, methods, pseudo_labels)


def key_of(settings: Teacher | None) -> str:
    """Return the key at which a recipe names its teacher; `teacher` for one that was handed over as an object."""
    return "teacher" if settings is None or not settings.given else f"teacher.{settings.given[0]}"


def open_given(
    settings: Teacher | None, part: Detector | BoxTeacher | None, device: torch.device, categories: Mapping[int, str]
) -> BoxTeacher:
    """The teacher that is there already: an object, or what the section names. categories: id → name."""
    if isinstance(part, Detector):
        return DetectorTeacher(
            part, file=type(part).__name__, sha256=state_sha256(part), class_names=None, device=device
        )
    if part is not None:
        return part
    assert settings is not None, "there is a section, or an object"
    return open_teacher(settings, device, categories=categories)


def untrained_teacher(settings: Teacher, num_classes: int) -> Detector:
    """A teacher that a run trains first, as it is before: frozen, with random weights."""
    assert settings.model is not None, "the recipe was validated"
    model = settings.model.model_copy(update={"weights": "none"})
    return freeze(build_detector(model, num_classes, 0, key="teacher.model"))


def match_teacher(
    teacher: BoxTeacher, key: str, categories: Sequence[str], distillation: Distillation, student: Detector
) -> tuple[Detector, list[int]]:
    """The detector that the student learns from; and for each class of the teacher its label in the data, or -1.

    Features may come from a teacher of any classes. Logits are compared class by class, so they need the data's classes
    in the data's order. A checkpoint that does not name its classes gets the data's names if there are as many.

    Args:
        key: of the recipe, for messages.
        student: of the model that will be trained; its weights change.

    Raises:
        UserError: the teacher gives boxes alone; teacher, student and methods do not fit each other; other classes.
    """
    detector = teacher.detector
    if detector is None:
        method = next(iter(distillation.of_teacher), None)
        learns = "" if method is None else f", and methods.{method} learns from features or logits"
        raise UserError(f"{key}: {teacher.file} gives boxes alone{learns}; use pseudo_labels, or another teacher")
    methods = distillation.check(student, detector).values()
    if teacher.class_names is None and key in UNNAMED and detector.num_classes == len(categories):
        teacher.class_names = tuple(categories)
    names = list(teacher.class_names or ())
    if names != list(categories):
        on_classes = {Capability.DENSE, Capability.LOCATIONS, Capability.QUERIES}
        needing = "methods on logits need" if any(built.method.needs & on_classes for built in methods) else ""
        if distillation.inherit and len(names) == len(categories):  # then the head's last layer would be copied too
            needing = "teacher.inherit needs"
        if needing:
            raise UserError(
                f"{key}: {class_difference(names, categories)}; {needing} the same classes in the same order"
            )
    return detector, [categories.index(name) if name in categories else -1 for name in names]


def checkpoint_to_show(settings: Teacher, folder: RunFolder, val: CocoDetection) -> str | None:
    """The checkpoint of the teacher that a student learned or was cut from, to time it and to draw what it finds; None
    for one of another library or of other classes, which is measured before the training and not again."""
    if settings.train is not None:
        return str(folder.weights(TEACHER))
    if settings.checkpoint is None:
        return None
    record = load_teacher_checkpoint(settings.checkpoint)[1]
    same = record.num_classes == len(val.categories) and record.class_names in (None, val.categories)
    return settings.checkpoint if same else None


def class_difference(names: Sequence[str], categories: Sequence[str], subject: str = "the teacher") -> str:
    """Say in which way classes are not those of the data, which they are not. subject: whose they are."""
    if not names:
        return f"{subject} does not name its classes"
    if len(names) != len(categories):
        return f"{subject} knows {len(names)} classes, the data has {len(categories)}"
    label = next(index for index, (theirs, ours) in enumerate(zip(names, categories, strict=True)) if theirs != ours)
    return f"{subject} calls label {label} {names[label]!r}, the data calls it {categories[label]!r}"
