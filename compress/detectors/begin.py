"""A detector that begins from the weights of another: `student.init`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.detectors.base import Detector
from compress.detectors.build import assemble
from compress.detectors.checkpoints import ModelRecord, load_teacher_checkpoint
from deploy.core.errors import UserError


def begin_from(detector: Detector, spec: str, class_names: Sequence[str], key: str = "init") -> tuple[str, ...]:
    """Copy the weights of the checkpoint `spec` into `detector`, which is of its architecture.

    Layers that hold classes keep their random weights where the checkpoint's classes are not `class_names` in this
    order. key: of the recipe, for messages.

    Returns the names of these layers' weights.

    Raises UserError as `load_teacher_checkpoint`, and for another architecture.
    """
    other, record = load_teacher_checkpoint(spec)
    state, own = other.state_dict(), detector.state_dict()
    same = record.num_classes == len(class_names) and record.class_names in (None, tuple(class_names))
    renewed = [] if same else _class_layers(record)
    lost = [name for name in own if name not in renewed and (name not in state or state[name].shape != own[name].shape)]
    if lost or (state.keys() - own.keys()):
        name = next(iter([*lost, *sorted(state.keys() - own.keys())]))
        shapes = [list(where[name].shape) if name in where else "not there" for where in (state, own)]
        parts = ("detector", "backbone", "neck_channels", "head_depth", "head_norm", "anchor_scale", "widths")
        theirs = {part: getattr(record.model, part) for part in parts if getattr(record.model, part) is not None}
        raise UserError(
            f"{key}: {spec} is of another architecture: its {name} is {shapes[0]}, here {shapes[1]}; it has "
            + ", ".join(f"{part} {value}" for part, value in theirs.items() if part != "widths")
            + (" and was pruned" if "widths" in theirs else "")
        )
    detector.load_state_dict({name: value for name, value in state.items() if name not in renewed}, strict=False)
    return tuple(renewed)


# --- details --------------------------------------------------------------------------------------------


def _class_layers(record: ModelRecord) -> list[str]:
    """Names of the weights whose shape depends on the number of classes."""
    with torch.device("meta"):
        few, more = (
            assemble(record.model, count).state_dict() for count in (record.num_classes, record.num_classes + 1)
        )
    return [name for name in few if few[name].shape != more[name].shape]
