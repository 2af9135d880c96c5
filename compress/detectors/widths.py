"""Widths of a pruned detector's layers: the difference between its architecture and that of its settings.

    {"backbone.stem.0": (16, 3), "backbone.stem.1": (16,), ...}

A layer of `widths` has fewer channels than its settings make: (out, in) of convolutions and fully connected layers,
(channels,) of norms. `resize` cuts a freshly built detector to widths, so that weights of these shapes can be loaded:
a checkpoint holds the settings and the widths, and nothing else is needed to build the detector again.

A GroupNorm keeps the size of its groups and loses whole groups; a depthwise convolution loses channels with their
groups. What else a layer is (stride, padding, bias) does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deploy.core.errors import UserError

Widths = Mapping[str, tuple[int, ...]]
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
LAYERS = (nn.Conv2d, nn.Linear, *NORMS)
"""Types of layers that can lose channels. A LayerNorm is none: all its channels are normalised together."""


def widths_of(layer: nn.Module) -> tuple[int, ...]:
    """The widths of a layer of a type in `LAYERS`."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, NORMS)
    return (layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features,)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each channel of a convolution has a filter of its own and sees itself alone."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def resize(model: nn.Module, widths: Widths) -> None:
    """Cut layers of `model` to their first channels.

    Args:
        widths: by name of the layer.

    Raises UserError for names and widths that do not fit the model.
    """
    modules = dict(model.named_modules())
    for name, wanted in widths.items():
        layer = modules.get(name)
        if not isinstance(layer, LAYERS):
            raise UserError(f"widths: the detector has no layer {name!r} that can lose channels")
        found = widths_of(layer)
        fits = len(wanted) == len(found) and all(1 <= side <= whole for side, whole in zip(wanted, found, strict=True))
        if fits:
            sides = [torch.arange(side, device="cpu") for side in wanted]
            try:
                select(layer, sides[0], sides[1] if len(sides) > 1 else None)
            except ValueError as error:
                raise UserError(f"widths: {name}: {error}") from None
            fits = widths_of(layer) == tuple(wanted)  # a depthwise convolution has one width
        if not fits:
            raise UserError(f"widths: {name} has {list(found)} channels and cannot be cut to {list(wanted)}")


def select(layer: nn.Module, outputs: Tensor | None, inputs: Tensor | None = None) -> None:
    """Reduce a layer to these channels, int64 indices in ascending order; None: to all it has.

    Of norms and depthwise convolutions only `outputs` count. Raises ValueError for channels that cannot stay alone:
    parts of a group of a GroupNorm or of a grouped convolution.
    """
    if isinstance(layer, nn.Conv2d):
        _select_of_conv(layer, outputs, inputs)
    elif isinstance(layer, nn.Linear):
        layer.weight = _taken(layer.weight, outputs, inputs)
        layer.bias = _taken(layer.bias, outputs)
        layer.out_features, layer.in_features = layer.weight.shape
    elif outputs is not None:
        assert isinstance(layer, NORMS)
        _select_of_norm(layer, outputs)


# --- details --------------------------------------------------------------------------------------------


def _select_of_conv(layer: nn.Conv2d, outputs: Tensor | None, inputs: Tensor | None) -> None:
    if is_depthwise(layer):
        inputs = None
    elif layer.groups > 1:
        raise ValueError(f"is a convolution of {layer.groups} groups, which cannot lose channels")
    depthwise = is_depthwise(layer)
    layer.weight = _taken(layer.weight, outputs, inputs)
    layer.bias = _taken(layer.bias, outputs)
    layer.out_channels = layer.weight.shape[0]
    layer.in_channels = layer.out_channels if depthwise else layer.weight.shape[1]
    if depthwise:
        layer.groups = layer.out_channels


def _select_of_norm(layer: nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d, outputs: Tensor) -> None:
    if isinstance(layer, nn.GroupNorm):
        size = layer.num_channels // layer.num_groups
        groups = outputs[::size] // size
        whole = (groups[:, None] * size + torch.arange(size, device="cpu")).flatten()
        if len(outputs) % size or not torch.equal(whole, outputs):
            raise ValueError(f"normalises {size} channels together, which leave together")
        layer.num_channels, layer.num_groups = len(outputs), len(groups)
    else:
        layer.num_features = len(outputs)
        for name in ("running_mean", "running_var"):
            values = getattr(layer, name)
            if values is not None:
                setattr(layer, name, values.index_select(0, outputs.to(values.device)))
    layer.weight, layer.bias = _taken(layer.weight, outputs), _taken(layer.bias, outputs)


def _taken(parameter: Any, *sides: Tensor | None) -> Any:
    """A parameter reduced to these indices of its first axes; None stays None."""
    if parameter is None:
        return None
    values = parameter.detach()
    for axis, indices in enumerate(sides):
        if indices is not None:
            values = values.index_select(axis, indices.to(values.device))
    return nn.Parameter(values.clone(), requires_grad=parameter.requires_grad)
