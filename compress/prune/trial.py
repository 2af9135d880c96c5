"""Whether channels can leave a detector as its graph says, by trying.

A detector without channels must give what it gives where nothing reads them. That is compared on an image of noise, of
which a wrong guess about which channel is which makes something else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from compress.detectors.base import Detector
from compress.prune.groups import ChannelGroup, leaving_members, remove

TOLERANCE = 1e-5  # of the largest output; float32 rounds to 1e-6 of it


def sound(detector: Detector, groups: Sequence[ChannelGroup], side: int) -> list[ChannelGroup]:
    """Those of the groups whose first channels (as many as leave together) can leave.

    Tries all at once, and halves where that fails. side: of the image, pixels.
    """
    images = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    model = copy.deepcopy(detector).cpu()  # GPUs may round to ten bits

    def tried(some: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        if not some or _agree(model, some, images):
            return list(some)
        half = len(some) // 2
        return tried(some[:half]) + tried(some[half:]) if half else []

    return tried(groups)


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
        expected = tensors(unread.traced(images))
        remove(smaller, groups, channels)
        found = tensors(smaller.traced(images))
    except Exception:  # whatever a model of somebody's own does with fewer channels
        return False
    return len(found) == len(expected) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )
