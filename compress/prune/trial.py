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
    """Those of the groups of which channels can leave, each group's whatever leaves the others.

    side: of the image, pixels. Raises UserError for a detector that gives NaN.
    """
    images = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    model = copy.deepcopy(detector).cpu()  # GPUs may round to ten bits
    with torch.no_grad():
        if any(bool(x.isnan().any()) for x in _outputs(model, images)):
            raise UserError(f"prune: {detector.family} gives NaN for an image of noise; prune one that trained well")

    rounds = [_leaving(groups, number) for number in range(max(1, (len(groups) - 1).bit_length()))]
    return passing(groups, lambda some: all(_agree(model, some, channels, images) for channels in rounds))


def passing(
    groups: Sequence[ChannelGroup],
    test: Callable[[Sequence[ChannelGroup]], bool],
    kept: Sequence[ChannelGroup] = (),
) -> list[ChannelGroup]:
    """The groups that pass a test together with `kept`, which pass it; all at once, or halves one after the other, so
    that what is given has always passed together."""
    together = [*kept, *groups]
    if not groups or test(together):
        return together
    if len(groups) == 1:
        return list(kept)
    half = len(groups) // 2
    return passing(groups[half:], test, passing(groups[:half], test, kept))


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


def _leaving(groups: Sequence[ChannelGroup], number: int) -> dict[str, Tensor]:
    """Channels that leave in a round: the first that leave together, or the next, by a digit of the group's place in
    binary. Any two groups lose other ones in some round, which shows those that must lose the same."""
    channels = {}
    for place, group in enumerate(groups):
        second = place >> number & 1 and group.width > group.together
        channels[group.name] = torch.arange(group.together) + (group.together if second else 0)
    return channels


@torch.no_grad()
def _agree(model: Detector, groups: Sequence[ChannelGroup], channels: Mapping[str, Tensor], images: Tensor) -> bool:
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
