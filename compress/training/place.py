"""Where a training works, so that a finished one of its name stays until the new one is whole.

The first training of a name works in its own folder, `<run>/student`. One that will replace a finished training works
in `<run>/student.new`; what is there already, weights, checkpoints and figures, is not touched until the new weights
are written, and then replaced as a whole. So a training that fails or is killed costs nothing that was finished.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from compress.manifest import TRAININGS, RunFolder, TrainingFolder
from deploy.core.errors import UserError


def place_for(folder: RunFolder, name: str, identity: str, *, resume: bool) -> TrainingFolder:
    """The folder that a training of this identity works in: what `resume` continues, or a fresh one. For one process of
    several."""
    first, again = folder.training(name), folder.again(name)
    finished = folder.weights(name).is_file()
    if resume and again.last.is_file():
        return again
    if resume and first.last.is_file() and (not finished or _identity(first.last) == identity):
        return first  # interrupted; or whole, and only the record of the run does not say so
    if not finished:
        return first
    shutil.rmtree(again.path, ignore_errors=True)
    return again


def publish(folder: RunFolder, name: str, place: TrainingFolder) -> None:
    """Put the folder of a training in its place, after its weights. A kill in between leaves one that resuming ends."""
    first = folder.training(name).path
    if place.path == first:
        return
    old = first.with_name(f"{name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if first.exists():
        os.rename(first, old)
    os.rename(place.path, first)
    shutil.rmtree(old, ignore_errors=True)


def remove_replaced(folder: RunFolder) -> None:
    """Remove folders that `publish` had replaced when it was killed."""
    for name in TRAININGS:
        place = folder.training(name).path
        if place.is_dir():
            shutil.rmtree(place.with_name(f"{name}.old"), ignore_errors=True)


@contextmanager
def telling_what_stays(folder: RunFolder, name: str, place: TrainingFolder) -> Iterator[None]:
    """Say in the error of a training that fails what it leaves usable."""
    try:
        yield
    except UserError as error:
        if place.path == folder.training(name).path:
            raise
        raise type(error)(f"{error}; the finished {folder.weights(name)} is as it was") from error


# --- details --------------------------------------------------------------------------------------------


def _identity(checkpoint: Path) -> str | None:
    """Which training a checkpoint is of; None for a damaged one."""
    try:
        return str(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["identity"])
    except Exception:  # a damaged archive raises whatever its reader stumbles over
        return None
