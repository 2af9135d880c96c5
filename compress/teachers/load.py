"""Open a teacher, whatever it is: `open_teacher`, from a recipe's section or from a path on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.teachers.base import BoxTeacher, DetectorTeacher
from compress.teachers.settings import Source
from deploy.files import sha256_of


def open_teacher(
    source: Source | str, device: torch.device, *, categories: Mapping[int, str] | None = None
) -> BoxTeacher:
    """A frozen teacher on `device`.

    Args:
        source: a section `teacher` of a recipe (its `train` and what belongs to it is not looked at), or what a command
            line may say: a checkpoint as `load_teacher_checkpoint` takes it.
        categories: names by category id, for a teacher that knows only ids.

    Returns:
        A `DetectorTeacher` where there is more to learn from than boxes.

    Raises:
        UserError: it cannot be read, or is not what it is said to be.
    """
    if isinstance(source, str):
        source = source_of(source)
    assert source.checkpoint is not None, "the section was validated"
    return _native(source.checkpoint, device)


def source_of(text: str) -> Source:
    """The teacher that a command line names. Raises UserError for what can be none."""
    return Source.model_construct(checkpoint=text)


# --- details --------------------------------------------------------------------------------------------


def _native(checkpoint: str, device: torch.device) -> DetectorTeacher:
    detector, record = load_teacher_checkpoint(checkpoint)
    path = checkpoint_file(checkpoint)
    return DetectorTeacher(
        detector,
        file=checkpoint if checkpoint.startswith("zoo:") else Path(path).name,
        sha256=sha256_of(path),
        class_names=record.class_names,
        device=device,
    )
