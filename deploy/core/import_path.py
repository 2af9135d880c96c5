"""Objects that users name by import path: `package.module:Name`, as a recipe or an option writes them."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from deploy.core.errors import UserError, first_line

PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
"""What an import path looks like: a module, a colon, a name in it."""


def is_import_path(text: str) -> bool:
    """Whether `text` has the form of an import path; nothing is imported."""
    return re.fullmatch(PATTERN, text) is not None


def import_extra(module: str, extra: str, package: str | None = None) -> Any:
    """Import a module that an extra of this project brings.

    package: as pip knows it; None: as the module is called. Raises UserError in one line: it is not installed, or it
    does not load.
    """
    package = package or module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{package} is not installed: pip install 'compress-detectors[{extra}]'") from error
    except (ImportError, OSError) as error:
        raise UserError(f"{package} does not load: {first_line(error)}") from error


def import_object(path: str, key: str) -> Any:
    """Import the object at `path`; modules in the working directory are found too, as with `python -m`.

    Args:
        path: `package.module:Name`.
        key: the recipe key or option that named it, for messages.

    Raises UserError in one line: not an import path, no such module, an error inside the module, no such name.
    """
    if not is_import_path(path):
        raise UserError(f"{key}: '{path}' is not an import path; write package.module:Name")
    module_name, _, attributes = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        why = "no such module" if module_name.startswith(missing) else f"it needs the module {missing}"
        raise UserError(f"{key}: cannot import {module_name}: {why}; is it installed, or in this folder?") from None
    except Exception as error:  # whatever a user's module raises while it is imported
        raise UserError(f"{key}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise UserError(f"{key}: {module_name} has no {attributes}")
        found = getattr(found, name)
    return found


def call_own(build: Callable[..., Any], path: str, key: str, *args: Any, **options: Any) -> Any:
    """Call the user's class or function at the import path `path`, which `key` named. Raises UserError in one line for
    whatever it raises, with that as its cause."""
    try:
        return build(*args, **options)
    except UserError:
        raise
    except Exception as error:  # whatever a user's constructor raises
        raise UserError(f"{key}: {path} cannot be built: {type(error).__name__}: {first_line(error)}") from error
