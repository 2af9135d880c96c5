"""Which channels of a detector leave together: torch-pruning's dependency graph (DepGraph, CVPR 2023), as plain data.

    graph = pruning_graph(detector)
    graph.groups[0].name, graph.groups[0].width     # "backbone.stem.0", 32

A channel that leaves is no output of any layer that makes it, no channel of a norm behind these, and no input of any
layer that reads it. Channels of a residual sum leave all summands; those of a GroupNorm leave with their norm group, so
that the statistics of the other groups, and with them the function of what stays, do not change.

torch-pruning reads a detector off its gradient, and some of it wrong: channels that are flipped, shuffled or split at
fixed places, gates of one channel, numbers that are no parameters. So each group is tried, see `trial`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compress.config.messages import did_you_mean
from compress.detectors.base import Capability, Detector
from compress.detectors.widths import LAYERS, is_depthwise
from compress.prune.groups import ChannelGroup, Member, remove
from compress.prune.trial import passing, sound, tensors
from deploy.core.errors import UserError, first_line

MAPS = "maps"
"""Entry of `keep` for all channels of the maps that `Detector.features` gives, whatever their layers are called."""
TRACED_SIDE = 128  # pixels; the graph does not depend on it


@dataclass(frozen=True)
class PruningGraph:
    """What can leave a detector.

    groups: in the order in which the detector has their layers, the backbone's first.
    whole: names of groups that cannot leave, because without some of their channels the detector gave something else.
    traced: a copy of the detector, in eval mode, all of which has gradients.
    """

    groups: tuple[ChannelGroup, ...]
    traced: Detector
    whole: tuple[str, ...] = ()


def pruning_graph(detector: Detector, keep: Sequence[str] = ()) -> PruningGraph:
    """Trace a detector, which is not changed.

    Left out: what the detector predicts, convolutions of several groups (depthwise ones are no such), channels that
    something outside of the `LAYERS` of `compress.detectors.widths` depends on, such as a parameter or a LayerNorm, and
    all whose leaving would not be what the graph says.

    Args:
        keep: names of layers, or of modules with layers inside, whose outputs all stay, as in `named_modules`; `maps`
            for the maps that methods compare.

    Raises UserError for a detector that cannot be traced or gives NaN, and for names that it does not have.
    """
    _check_names(detector, keep)
    if detector.prunable is not None:
        raise UserError(f"prune: {_kind(detector)} cannot be pruned: {detector.prunable}")
    if Capability.DENSE not in detector.capabilities and type(detector).traced is Detector.traced:
        raise UserError(
            f"prune: {_kind(detector)} has a second stage that is not traced, so it cannot be pruned; give it the "
            "method `traced`"
        )
    traced = copy.deepcopy(detector).requires_grad_(True).eval()
    graph = tp.DependencyGraph()
    images = torch.zeros(1, 3, TRACED_SIDE, TRACED_SIDE, dtype=torch.uint8, device=next(traced.parameters()).device)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # about parameters outside of layers, which `_can_leave` looks at
        try:
            graph.build_dependency(
                traced,
                images,
                forward_fn=lambda model, x: model.traced(x),
                output_transform=_with_gradients,
                verbose=False,
            )
            found = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
        except Exception as error:  # whatever a model of somebody's own makes torch-pruning meet
            raise UserError(
                f"prune: {_kind(detector)} cannot be traced ({first_line(error)}), so it cannot be pruned"
            ) from error
    names = {module: name for name, module in traced.named_modules()}
    groups = [_plain(graph, group, names) for group in found if _can_leave(graph, group, names)]
    groups = [group for group in groups if _in_whole_norm_groups(traced, group)]
    tried = [group for group in groups if not any(_inside(maker, keep) for maker in group.makers)]
    groups = sound(traced, tried, TRACED_SIDE)
    stay = tuple(group.name for group in tried if group not in groups)
    if MAPS in keep:
        maps = _map_widths(traced, ())
        groups = passing(groups, lambda some: _map_widths(traced, some) == maps)
    places = {name: place for place, (name, _) in enumerate(traced.named_modules())}
    return PruningGraph(tuple(sorted(groups, key=lambda group: places[group.name])), traced, stay)


# --- details --------------------------------------------------------------------------------------------


def _kind(detector: Detector) -> str:
    return detector.model.detector if detector.model is not None else type(detector).__name__


def _check_names(detector: Detector, keep: Sequence[str]) -> None:
    known = [MAPS, *(name for name, _ in detector.named_modules() if name)]
    for name in keep:
        if name not in known:
            parts = ", ".join(name for name, _ in detector.named_children())
            hint = did_you_mean(name, known) or f"; name one of its layers, a part ({parts}), or {MAPS}"
            raise UserError(f"prune.keep: {_kind(detector)} has no layer '{name}'{hint}")


def _with_gradients(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(value) if tensor.grad_fn is not None]


def _can_leave(graph: tp.DependencyGraph, group: Any, names: Mapping[nn.Module, str]) -> bool:
    """Whether some layer reads the channels, and nothing that loses them is of a kind that cannot."""
    read, width = False, len(group[0].idxs)
    for item in group:
        layer = item.dep.target.module
        if None in item.root_idxs:
            return False
        if isinstance(layer, LAYERS) and layer in names:
            if isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer):
                return False
            read = read or (isinstance(layer, nn.Conv2d | nn.Linear) and not _is_output(graph, item, layer))
        else:  # an operation has no parameters; weights of summands and of activations are few
            parameters = [layer] if isinstance(layer, nn.Parameter) else layer.parameters()
            if any(parameter.numel() >= width for parameter in parameters):
                return False
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
    return ChannelGroup(members[0].layer, len(group[0].idxs), together, tuple(members))


def _in_whole_norm_groups(traced: Detector, group: ChannelGroup) -> bool:
    """Whether channels that leave together are whole groups of every GroupNorm, and others stay."""
    for member in group.members:
        layer = traced.get_submodule(member.layer)
        if isinstance(layer, nn.GroupNorm):
            block = torch.full((layer.num_channels,), -1)
            block[member.channels] = member.owners // group.together
            of_norm_group = block.view(layer.num_groups, -1)
            if bool((of_norm_group != of_norm_group[:, :1]).any()):
                return False
    return group.together < group.width and group.width % group.together == 0


def _inside(layer: str, keep: Sequence[str]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in keep)


def _map_widths(traced: Detector, groups: Sequence[ChannelGroup]) -> list[int]:
    """Channels of the maps, after some of these groups left. Shapes alone are computed."""
    model = copy.deepcopy(traced).to("meta")
    remove(model, groups, {group.name: torch.arange(group.together) for group in groups})
    images = torch.zeros(1, 3, TRACED_SIDE, TRACED_SIDE, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        return [int(x.shape[1]) for x in model.features(images)]
