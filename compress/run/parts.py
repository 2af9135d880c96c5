"""Parts that a Python program hands to a run as objects, beside what its recipe names."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.detectors.base import Detector
from compress.detectors.build import detector_class
from compress.detectors.weights import state_sha256
from compress.distill.method import Method
from compress.distill.weighting import WeightedMethod
from compress.teachers.base import BoxTeacher
from compress.teachers.custom import NEEDED
from deploy.core.errors import UserError
from deploy.core.import_path import import_object


@dataclass(frozen=True)
class Parts:
    """Objects in the place of, or beside, what a recipe names.

    methods: name → a method that the student learns from, too; a `WeightedMethod` has its weight and schedule. A
        training works on a copy of it.
    teacher: in the place of the recipe's.
    student: gives the detector to train, for a number of classes, in the place of `student` in the recipe.
    """

    methods: Mapping[str, Method | WeightedMethod] = field(default_factory=dict)
    teacher: Detector | BoxTeacher | None = None
    student: Callable[[int], Detector] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for what is no such object."""
        if not isinstance(self.methods, Mapping):
            raise UserError(f"methods: needs a dict of objects by name, got {_type(self.methods)}")
        if self.student is not None and not callable(self.student):
            raise UserError(f"student: needs a function of the number of classes, got {_type(self.student)}")
        lacking = [name for name in NEEDED if not hasattr(self.teacher, name)]
        if self.teacher is not None and not isinstance(self.teacher, Detector) and lacking:
            raise UserError(
                f"teacher: {_type(self.teacher)} is no Detector and no BoxTeacher: it has no {', '.join(lacking)}"
            )

    def student_class(self, detector: str) -> type[Detector]:
        """Return the student's class, to ask it for its abilities. detector: what the recipe names."""
        if self.student is None:
            return detector_class(detector, "student.detector")
        made = self.student(2)
        if not isinstance(made, Detector):
            raise UserError(f"student: {self.student!r} gives {_type(made)}, no Detector")
        return type(made)

    def method_identity(self) -> dict[str, Any]:
        """Identify own methods that a training depends on, as JSON; empty without them."""
        return {"own_methods": {name: describe(part) for name, part in self.methods.items()}} if self.methods else {}

    def student_identity(self) -> dict[str, Any]:
        """Identify an own student that a training depends on, as JSON; empty without one."""
        if self.student is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            made = self.student(2)  # its settings may be in what makes it, where `describe` does not see them
        shapes = {key: list(value.shape) for key, value in made.state_dict().items()}
        detector = {key: value for key, value in describe(made).items() if key != "weights"}
        return {"own_student": describe(self.student), "own_detector": {**detector, "shapes": shapes}}


def named_identity(kind: str, paths: Mapping[str, str]) -> dict[str, Any]:
    """Identify what a training depends on that works with the parts at these import paths (recipe key → path), as JSON
    under the key `kind`; empty without them."""
    return {kind: {key: describe(import_object(path, key)) for key, path in paths.items()}} if paths else {}


def describe(part: Any) -> dict[str, Any]:
    """Describe an object: its class, the text of that class, its weights and its plain settings. A finished training is
    done again when one of them changes; what a class takes from other modules is not seen."""
    kind = part if inspect.isclass(part) or inspect.isroutine(part) else type(part)
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a console
        source = ""
    described: dict[str, Any] = {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
    }
    if isinstance(part, WeightedMethod):
        described["method"] = describe(part.method)
    if isinstance(part, nn.Module):
        described["weights"] = state_sha256(part)
        inner = vars(nn.Module())
        described["settings"] = {
            key: value
            for key, value in vars(part).items()
            if _is_plain(value) and not (key in inner and isinstance(value, dict))
        }
    return described


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return isinstance(value, bool | int | float | str)


def _type(thing: Any) -> str:
    return f"a value of type {type(thing).__name__}"
