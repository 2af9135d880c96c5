"""Teachers: loaded, frozen, and checked before anybody learns from them."""

from __future__ import annotations

from collections.abc import Sequence

from compress.detectors.base import Detector
from compress.detectors.checkpoints import ModelRecord, load_teacher_checkpoint
from deploy.core.errors import UserError


def load_teacher(checkpoint: str, categories: Sequence[str]) -> tuple[Detector, ModelRecord]:
    """A frozen teacher in eval mode.

    Args:
        checkpoint: a native `.safetensors`, an official mmdet GFL `.pth`, or `zoo:<name>`.
        categories: class names of the training data, in label order.

    Raises:
        UserError: the file cannot be read, or its classes are not the data's.
    """
    detector, record = load_teacher_checkpoint(checkpoint)
    if record.num_classes != len(categories):
        raise UserError(
            f"teacher {checkpoint} knows {record.num_classes} classes, the data has {len(categories)}: "
            "distillation of logits needs the same classes in both"
        )
    if record.class_names is not None and list(record.class_names) != list(categories):
        pairs = zip(record.class_names, categories, strict=True)
        label, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"teacher {checkpoint} calls label {label} {theirs!r}, the data calls it {ours!r}: same classes in the "
            "same order are needed"
        )
    return freeze(detector), record


def freeze(detector: Detector) -> Detector:
    """In eval mode, without gradients."""
    return detector.requires_grad_(False).eval()
