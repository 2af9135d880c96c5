"""Groups of channels that leave together, and a model without some of them.

widths = remove(model, groups, {"backbone.stem.0": torch.tensor([3, 7])})
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.detectors.widths import select, widths_of


@dataclass(frozen=True)
class Member:
    """One side of a layer that loses channels with its group.

    layer: its name. output: whether its outputs leave (of a norm or a depthwise convolution: its channels).
    channels: int64 [m], those of the layer's channels that belong to the group. owners: int64 [m], to which channel of
    the group each of them belongs; several may belong to one, as those of a fully connected layer behind a flattened
    map.
    """

    layer: str
    output: bool
    channels: Tensor
    owners: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of which each can leave, or `together` of them at a time.

    name: the layer that makes them, the first of several.
    width: their number.
    together: size of the norm groups, which leave as a whole; 1 without GroupNorm. Channels 0 to together - 1 are the
        first of them.
    """

    name: str
    width: int
    together: int
    members: tuple[Member, ...]

    @property
    def makers(self) -> list[str]:
        """Layers whose outputs leave."""
        return [member.layer for member in self.members if member.output]


def remove(
    model: nn.Module, groups: Iterable[ChannelGroup], channels: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Take channels out of a model in place, int64 indices by the name of their group, all at once: a layer that reads
    several groups has its channels numbered as before the first. Returns the widths of the layers that it changed."""
    sides: dict[str, dict[bool, list[Tensor]]] = {}
    for member, gone in leaving_members(groups, channels):
        sides.setdefault(member.layer, {}).setdefault(member.output, []).append(gone)
    widths = {}
    for name, by_side in sides.items():
        layer = model.get_submodule(name)
        kept: list[Tensor | None] = [None, None]  # of outputs and inputs
        for output, parts in by_side.items():
            side = 0 if output else 1
            stays = torch.ones(widths_of(layer)[side], dtype=torch.bool, device="cpu")
            stays[torch.cat(parts)] = False
            kept[side] = stays.nonzero()[:, 0]
        select(layer, *kept)
        widths[name] = widths_of(layer)
    return widths


def leaving_members(groups: Iterable[ChannelGroup], channels: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """Every member of the groups that loses channels, with those of its layer's channels that leave, int64."""
    for group in groups:
        if group.name in channels:
            for member in group.members:
                yield member, member.channels[torch.isin(member.owners, channels[group.name])]
