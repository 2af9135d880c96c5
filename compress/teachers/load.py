"""Open a teacher, whatever it is: `open_teacher`, from a recipe's section or from a path on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from compress.config.recipe import load_teacher_file
from compress.config.teacher import Onnx, Source
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.teachers.base import BoxTeacher, DetectorTeacher
from deploy.core.errors import UserError
from deploy.core.files import sha256_of


def open_teacher(
    source: Source | str, device: torch.device, *, categories: Mapping[int, str] | None = None
) -> BoxTeacher:
    """A frozen teacher on `device`.

    Args:
        source: a section `teacher` of a recipe with a source (not `train`), or what a command line says: `source_of`.
        categories: names by category id, for a teacher that knows only ids.

    Raises:
        UserError: it cannot be read, or is not what it is said to be.
    """
    if isinstance(source, str):
        source = source_of(source)
    # A kind's own library is imported where it is used.
    if source.torchvision is not None:
        from compress.teachers.torchvision import TorchvisionTeacher

        return TorchvisionTeacher(source.torchvision, device)
    if source.mmdet is not None:
        from compress.teachers.mmdet import open_mmdet

        return open_mmdet(source.mmdet, device)
    if source.transformers is not None:
        from compress.teachers.transformers import TransformersTeacher

        return TransformersTeacher(source.transformers.model, device)
    if source.onnx is not None:
        from compress.teachers.onnx import open_onnx

        return open_onnx(source.onnx, device)
    if source.results is not None:
        from compress.teachers.results import ResultsTeacher

        return ResultsTeacher(source.results, categories)
    assert source.checkpoint is not None, "the section was validated"
    return _native(source.checkpoint, device)


def source_of(text: str) -> Source:
    """The teacher that a command line names: a checkpoint (`.safetensors`, `.pth`, `zoo:NAME`), an `.onnx` file of this
    project, COCO results (`.json`), or a `.yaml` file with a section `teacher`. Raises UserError for what can be none.
    """
    path = Path(text)
    match path.suffix:
        case ".onnx":
            return Source(onnx=Onnx(file=path))
        case ".json":
            return Source(results=path)
        case ".yaml" | ".yml":
            return load_teacher_file(path)
    try:
        return Source(checkpoint=text)
    except ValidationError:
        raise UserError(
            f"{text}: can be no teacher; use .safetensors, .pth, zoo:NAME, .onnx, COCO results (.json), or .yaml"
        ) from None


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
