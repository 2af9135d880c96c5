"""Parts that a Python program hands to a run as objects, beside what its recipe names."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.detectors.base import Detector
from compress.detectors.weights import state_sha256
from compress.distill.method import Method
from compress.distill.weighting import WeightedMethod
from compress.teachers.base import BoxTeacher
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

    def method_identity(self) -> dict[str, Any]:
        """Identify own methods that a training depends on, as JSON; empty without them."""
        return {"own_methods": {name: describe(part) for name, part in self.methods.items()}} if self.methods else {}

    def student_identity(self) -> dict[str, Any]:
        """Identify an own student that a training depends on, as JSON; empty without one."""
        return {} if self.student is None else {"own_student": describe(self.student)}


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
        plain = (bool, int, float, str)
        described["settings"] = {key: value for key, value in vars(part).items() if isinstance(value, plain)}
    return described
