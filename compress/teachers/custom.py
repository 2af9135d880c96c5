"""Teachers of a user's own, by import path: `open_custom`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.config.teacher import Custom
from compress.detectors.base import Detector
from compress.detectors.weights import state_sha256
from compress.teachers.base import BoxTeacher, DetectorTeacher
from deploy.core.errors import UserError
from deploy.core.import_path import call_own, import_object

KEY = "teacher.custom.factory"
NEEDED = ("sha256", "settings", "class_names", "capabilities", "detector", "view", "preprocessing", "covers", "detect")


def open_custom(source: Custom, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    """The teacher that `source.factory`, called as `factory(device=device, categories=categories, **options)`, gives.

    That is a `Detector` (with the attribute `class_names`, if it knows them), which then sees the student's images; or
    anything else with the attributes and methods of `BoxTeacher`, most easily a subclass.

    Raises UserError for a factory that cannot be imported or called, or gives something else.
    """
    options = source.options or {}
    made = call_own(
        import_object(source.factory, KEY), source.factory, KEY, device=device, categories=categories, **options
    )
    if isinstance(made, Detector):
        names = getattr(made, "class_names", None)
        return DetectorTeacher(
            made,
            file=source.factory,
            sha256=state_sha256(made),
            class_names=None if names is None else tuple(names),
            device=device,
            settings=options,
        )
    lacking = [name for name in NEEDED if not hasattr(made, name)]
    if lacking:
        raise UserError(
            f"{KEY}: {source.factory} gives {type(made).__name__}, which is neither a Detector nor a BoxTeacher: it "
            f"has no {', '.join(lacking)}"
        )
    if not hasattr(made, "file"):
        made.file = source.factory
    teacher: BoxTeacher = made
    return teacher
