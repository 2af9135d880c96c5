"""Distill a large object detector into a small one that ships, and prove that it survived.

    run = compress.distill("first.yaml")
    run.student.detect("street.jpg")
    run.student.export("student.onnx")
    compress.open("student.onnx").detect("street.jpg")       # without torch

`compress.api` says what each does. Nothing of it is imported before it is used: `import compress` loads no torch and no
NumPy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import distill as distill
    from compress.api import export as export
    from compress.api import open as open
    from compress.api import run as run
    from compress.api import train as train
    from compress.config.recipe import load_recipe as load_recipe
    from deploy.core.detections import Detections as Detections

__version__ = "0.1.0"

__all__ = ["Detections", "distill", "export", "load_recipe", "open", "run", "train"]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS_AND_FOLDERS:
        return import_module(f"compress.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'compress' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_HOMES = {
    "Detections": "deploy.core.detections",
    "load_recipe": "compress.config.recipe",
    "open": "compress.api",
    "train": "compress.api",
}
_FUNCTIONS_AND_FOLDERS = ("distill", "export", "run")
"""Names of the face that are also folders of this package."""


class _Folder(ModuleType):
    """A package that can be called: `compress.run` is the folder of that name, and `compress.run(...)` a function."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        function = getattr(import_module("compress.api"), self.__name__.removeprefix("compress."))
        return function(*arguments, **named)


class _Face(ModuleType):
    """Module type of this package. Python sets a folder as its attribute as soon as something is imported from there,
    and would put it in the place of the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS_AND_FOLDERS and isinstance(value, ModuleType):
            value.__class__ = _Folder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def foreign_kernels() -> str | None:
    """One line about another package called `kernels` that hides ours, or None when all is well.

    Hugging Face publishes a package that is imported under the same name. Nothing is imported here.
    """
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("kernels")
    found = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
    if found is not None and (found / "ops" / "quality_focal_loss.py").is_file():
        return None
    what = f"the package 'kernels' at {found} is not ours" if found else "our package 'kernels' is not installed"
    return (
        f"{what} (Hugging Face publishes one of that name): pip uninstall -y kernels; "
        "pip install --force-reinstall --no-deps compress-detectors"
    )


def require_own_kernels() -> None:
    """Raise ImportError, in one line, when `foreign_kernels` has something to say."""
    problem = foreign_kernels()
    if problem:
        raise ImportError(problem, name="kernels")
