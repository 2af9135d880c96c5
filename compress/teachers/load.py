"""Open a teacher of any kind: `open_teacher`, from a recipe's section or from a path on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from compress.config.recipe import load_teacher_file
from compress.config.teacher import Custom, Mmdet, Onnx, Source, Torchvision, Transformers
from compress.detectors.checkpoints import checkpoint_file, load_teacher_checkpoint
from compress.teachers.base import BoxTeacher, DetectorTeacher
from deploy.core.errors import UserError
from deploy.core.files import sha256_of


@dataclass(frozen=True)
class TeacherRecord:
    """A source of teachers, a key of `compress.config.teacher.Source`.

    open: its section, the device and names by category id (None: unknown) → a frozen teacher on that device. It imports
        the source's own library.
    """

    open: Callable[[Any, torch.device, Mapping[int, str] | None], BoxTeacher]


def _checkpoint(checkpoint: str, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    detector, record = load_teacher_checkpoint(checkpoint)
    path = checkpoint_file(checkpoint)
    return DetectorTeacher(
        detector,
        file=checkpoint if checkpoint.startswith("zoo:") else Path(path).name,
        sha256=sha256_of(path),
        class_names=record.class_names,
        device=device,
        resize_short_long=record.resize_short_long,
        operating_point=record.operating_point,
    )


def _torchvision(source: Torchvision, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    from compress.teachers.torchvision import TorchvisionTeacher

    return TorchvisionTeacher(source, device)


def _mmdet(source: Mmdet, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    from compress.teachers.mmdet import open_mmdet

    return open_mmdet(source, device)


def _transformers(source: Transformers, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    from compress.teachers.transformers import TransformersTeacher

    return TransformersTeacher(source.model, device)


def _onnx(source: Onnx, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    from compress.teachers.onnx import open_onnx

    return open_onnx(source, device)


def _results(path: Path, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    from compress.teachers.results import ResultsTeacher

    return ResultsTeacher(path, categories)


def _custom(source: Custom, device: torch.device, categories: Mapping[int, str] | None) -> BoxTeacher:
    from compress.teachers.custom import open_custom

    return open_custom(source, device, categories)


TEACHERS = {
    "checkpoint": TeacherRecord(_checkpoint),
    "torchvision": TeacherRecord(_torchvision),
    "mmdet": TeacherRecord(_mmdet),
    "transformers": TeacherRecord(_transformers),
    "onnx": TeacherRecord(_onnx),
    "results": TeacherRecord(_results),
    "custom": TeacherRecord(_custom),
}


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
    (key,) = source.given
    return TEACHERS[key].open(getattr(source, key), device, categories)


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
            f"{text}: is not a teacher; use .safetensors, .pth, zoo:NAME, .onnx, COCO results (.json), or .yaml"
        ) from None
