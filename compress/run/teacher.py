"""Teachers for methods that learn from features or logits."""

from __future__ import annotations

from collections.abc import Sequence

from compress.config.recipe import Recipe
from compress.detectors.base import Capability, Detector
from compress.run.trainings import check_methods
from compress.teachers.base import BoxTeacher
from deploy.core.errors import UserError


def for_methods(recipe: Recipe, teacher: BoxTeacher, categories: Sequence[str]) -> tuple[Detector, list[int]]:
    """The detector that the methods learn from; and for each class of the teacher its label in the data, or -1.

    Features may come from a teacher of any classes. Logits are compared class by class, so they need the data's classes
    in the data's order. A checkpoint that does not name its classes gets the data's names if there are as many.

    Raises:
        UserError: the teacher gives boxes alone; teacher, student and methods do not fit each other; other classes.
    """
    assert recipe.teacher is not None, "the recipe was validated"
    key = f"teacher.{recipe.teacher.given[0]}"
    if teacher.detector is None:
        method = next(iter(recipe.methods.enabled()), None)
        wanted = "" if method is None else f", and methods.{method} learns from features or logits"
        raise UserError(f"{key}: {teacher.file} gives boxes alone{wanted}; use pseudo_labels, or another teacher")
    methods = check_methods(recipe, len(categories), teacher.detector).values()
    unnamed = teacher.class_names is None and recipe.teacher.checkpoint is not None
    if unnamed and teacher.detector.num_classes == len(categories):
        teacher.class_names = tuple(categories)
    names = list(teacher.class_names or ())
    if names != list(categories):
        needing = "methods on logits need" if any(Capability.DENSE in built.method.needs for built in methods) else ""
        if recipe.teacher.inherit and len(names) == len(categories):  # then the head's last layer would be copied too
            needing = "teacher.inherit needs"
        if needing:
            raise UserError(f"{key}: {_difference(names, categories)}; {needing} the same classes in the same order")
    return teacher.detector, [categories.index(name) if name in categories else -1 for name in names]


# --- details --------------------------------------------------------------------------------------------


def _difference(names: Sequence[str], categories: Sequence[str]) -> str:
    if not names:
        return "the teacher does not name its classes"
    if len(names) != len(categories):
        return f"the teacher knows {len(names)} classes, the data has {len(categories)}"
    label = next(index for index, (theirs, ours) in enumerate(zip(names, categories, strict=True)) if theirs != ours)
    return f"the teacher calls label {label} {names[label]!r}, the data calls it {categories[label]!r}"
