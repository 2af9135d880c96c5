"""Whether channels can leave a detector as its graph says, by trying.

A detector without channels must give what it gives where nothing reads them. That is compared on an image of noise, of
which a wrong guess about which channel is which makes something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from compress.detectors.base import Detector
from compress.prune.groups import ChannelGroup, leaving_members, remove
from deploy.core.errors import UserError

TOLERANCE = 1e-5  # of the largest output; float32 rounds to 1e-6 of it


def sound(detector: Detector, groups: Sequence[ChannelGroup], side: int) -> list[ChannelGroup]:
    """Those of the groups whose first channels (as many as leave together) can leave.

    side: of the image, pixels. Raises UserError for a detector that gives NaN.
    """
    images = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    model = copy.deepcopy(detector).cpu()  # GPUs may round to ten bits
    with torch.no_grad():
        if any(bool(x.isnan().any()) for x in _outputs(model, images)):
            raise UserError(f"prune: {detector.family} gives NaN for an image of noise; prune one that trained well")

    return passing(groups, lambda some: _agree(model, some, images))


def passing(groups: Sequence[ChannelGroup], test: Callable[[Sequence[ChannelGroup]], bool]) -> list[ChannelGroup]:
    """The groups that pass a test, which is put to all at once, and to halves of those that fail."""
    if not groups or test(groups):
        return list(groups)
    half = len(groups) // 2
    return passing(groups[:half], test) + passing(groups[half:], test) if half else []


def tensors(value: Any) -> list[Tensor]:
    """All tensors in dataclasses, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


# --- details --------------------------------------------------------------------------------------------


@torch.no_grad()
def _agree(model: Detector, groups: Sequence[ChannelGroup], images: Tensor) -> bool:
    channels = {group.name: torch.arange(group.together) for group in groups}
    unread, smaller = copy.deepcopy(model), copy.deepcopy(model)
    try:
        for member, gone in leaving_members(groups, channels):
            if not member.output:
                layer: Any = unread.get_submodule(member.layer)
                layer.weight[:, gone] = 0
        expected = _outputs(unread, images)
        remove(smaller, groups, channels)
        found = _outputs(smaller, images)
    except Exception:  # whatever a model of somebody's own does with fewer channels
        return False
    return len(found) == len(expected) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


def _outputs(model: Detector, images: Tensor) -> list[Tensor]:
    return [x for x in tensors(model.traced(images)) if x.is_floating_point()]
