"""Which channels of a detector leave together: torch-pruning's dependency graph (DepGraph, CVPR 2023), as plain data.

    graph = pruning_graph(detector)
    graph.groups[0].name, graph.groups[0].width     # "backbone.stem.0", 32

A channel that leaves is no output of any layer that makes it, no channel of a norm behind these, and no input of any
layer that reads it. Channels of a residual sum leave all summands; those of a GroupNorm leave with their norm group, so
that the statistics of the other groups, and with them the function of what stays, do not change.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import lcm
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compress.detectors.base import Detector
from compress.detectors.widths import LAYERS, is_depthwise, select, widths_of
from deploy.core.errors import UserError, first_line

MAPS = "maps"
"""Entry of `keep` for all channels of the maps that `Detector.features` gives, whatever their layers are called."""
TRACED_SIDE = 128  # pixels; the graph does not depend on it


@dataclass(frozen=True)
class Member:
    """One side of a layer that loses channels with its group.

    layer: its name. output: whether its outputs leave (of a norm or a depthwise convolution: its channels).
    channels: int64 [m], the layer's channels. owners: int64 [m], to which channel of the group each of them belongs.
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
    together: size of the norm groups, which leave as a whole; 1 without GroupNorm.
    traced: torch-pruning's group of all channels, of the traced copy of the detector.
    """

    name: str
    width: int
    together: int
    members: tuple[Member, ...]
    traced: Any

    @property
    def makers(self) -> list[str]:
        """Layers whose outputs leave."""
        return [member.layer for member in self.members if member.output]


@dataclass(frozen=True)
class PruningGraph:
    """What can leave a detector.

    traced: a copy of the detector, in eval mode, whose layers the groups' `traced` refer to; its gradients are free.
    """

    groups: tuple[ChannelGroup, ...]
    traced: Detector


def pruning_graph(detector: Detector, keep: Sequence[str] = ()) -> PruningGraph:
    """Trace a detector, which is not changed.

    Left out: what the detector predicts, convolutions of several groups (depthwise ones are no such), channels that a
    parameter outside of the `LAYERS` of `compress.detectors.widths` depends on.

    Args:
        keep: names of layers, or of modules with layers inside, whose outputs all stay, as in `named_modules`; `maps`
            for the maps that methods compare.

    Raises UserError for a detector that cannot be traced, and for names that it does not have.
    """
    _check_names(detector, keep)
    traced = copy.deepcopy(detector).requires_grad_(True).eval()
    graph = tp.DependencyGraph()
    images = torch.zeros(1, 3, TRACED_SIDE, TRACED_SIDE, dtype=torch.uint8, device=next(traced.parameters()).device)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # about parameters outside of layers, which `_can_leave` looks at
        try:
            graph.build_dependency(
                traced, images, forward_fn=lambda model, x: model.traced(x), output_transform=_tensors, verbose=False
            )
            found = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
        except Exception as error:  # whatever a model of somebody's own makes torch-pruning meet
            raise UserError(
                f"prune: {_kind(detector)} cannot be traced ({first_line(error)}), so it cannot be pruned"
            ) from error
    names = {module: name for name, module in traced.named_modules()}
    groups = [_plain(graph, group, names) for group in found if _can_leave(graph, group, names)]
    groups = [group for group in groups if not any(_inside(maker, keep) for maker in group.makers)]
    if MAPS in keep:
        maps = _map_widths(traced, None)
        groups = [group for group in groups if _map_widths(traced, group) == maps]
    return PruningGraph(tuple(groups), traced)


def cut_group(model: nn.Module, group: ChannelGroup, leaving: Tensor) -> dict[str, tuple[int, ...]]:
    """Take these channels of a group, int64 indices, out of a model in place. Each group at most once: its channels are
    numbered as they were. Returns the widths of the layers that it changed."""
    widths = {}
    for member in group.members:
        layer = model.get_submodule(member.layer)
        kept = member.channels[~torch.isin(member.owners, leaving)].sort().values
        select(layer, kept if member.output else None, None if member.output else kept)
        widths[member.layer] = widths_of(layer)
    return widths


# --- details --------------------------------------------------------------------------------------------


def _kind(detector: Detector) -> str:
    return detector.model.detector if detector.model is not None else type(detector).__name__


def _check_names(detector: Detector, keep: Sequence[str]) -> None:
    known = {name for name, _ in detector.named_modules()}
    for name in keep:
        if name != MAPS and name not in known:
            parts = ", ".join(name for name, _ in detector.named_children())
            raise UserError(
                f"prune.keep: {_kind(detector)} has no layer '{name}'; name one of its layers, a part ({parts}), or "
                f"{MAPS}"
            )


def _tensors(value: Any) -> list[Tensor]:
    """All tensors with a gradient in dataclasses, lists and mappings."""
    if isinstance(value, Tensor):
        return [value] if value.grad_fn is not None else []
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _can_leave(graph: tp.DependencyGraph, group: Any, names: Mapping[nn.Module, str]) -> bool:
    """Whether some layer reads the channels, and all layers that lose them are of a kind that can."""
    read = False
    for item in group:
        layer = item.dep.target.module
        if isinstance(layer, nn.Parameter) or None in item.root_idxs:
            return False
        if layer not in names:  # an operation, not a layer
            continue
        if not isinstance(layer, LAYERS):
            if any(True for _ in layer.parameters()):
                return False
            continue
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer):
            return False
        read = read or (isinstance(layer, nn.Conv2d | nn.Linear) and not _is_output(graph, item, layer))
    return read


def _is_output(graph: tp.DependencyGraph, item: Any, layer: nn.Module) -> bool:
    """Whether a dependency takes outputs from the layer; norms and depthwise convolutions have one side alone."""
    one_sided = not isinstance(layer, nn.Conv2d | nn.Linear) or is_depthwise(layer)
    return one_sided or bool(graph.is_out_channel_pruning_fn(item.dep.handler))


def _plain(graph: tp.DependencyGraph, group: Any, names: Mapping[nn.Module, str]) -> ChannelGroup:
    members, together = [], 1
    for item in group:
        layer = item.dep.target.module
        if not isinstance(layer, LAYERS) or layer not in names:
            continue
        if isinstance(layer, nn.GroupNorm):
            together = lcm(together, layer.num_channels // layer.num_groups)
        members.append(
            Member(
                names[layer],
                _is_output(graph, item, layer),
                torch.tensor(item.idxs, dtype=torch.int64),
                torch.tensor(item.root_idxs, dtype=torch.int64),
            )
        )
    return ChannelGroup(members[0].layer, len(group[0].idxs), together, tuple(members), group)


def _inside(layer: str, keep: Sequence[str]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in keep)


def _map_widths(traced: Detector, group: ChannelGroup | None) -> list[int]:
    """Channels of the maps, after some of a group left. Shapes alone are computed."""
    model = copy.deepcopy(traced).to("meta")
    if group is not None:
        cut_group(model, group, torch.arange(group.together))
    images = torch.zeros(1, 3, TRACED_SIDE, TRACED_SIDE, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        return [int(x.shape[1]) for x in model.features(images)]
