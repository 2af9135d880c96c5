"""Fake quantization: a detector that computes, in float and with gradients, what its int8 file will compute.

    network = FakeQuantized(detector, grids)    # grids: where `deploy.quantize` put Q/DQ, for a start
    ... train network ...                       # detector's own weights train, and a scale for every activation
    network.grids()                             # what the file gets

An activation becomes s * clamp(round(x / s), low - z, high - z) with the zero point z of the start and a learned
scale s = s_start * exp(RATE * theta); a weight becomes round(w / s_c) * s_c with s_c = max |w| / limit over channel c,
as the file does it. round passes its gradient on unchanged; clamp stops it outside of the range. For s this is LSQ
(Esser et al., ICLR 2020, equation 3), with its gradient scale 1 / sqrt(n * high), n elements in the tensor. Biases and
everything that is no activation of the grids stay float: the int32 bias of a CPU file is finer than its results.

Q/DQ belongs to a tensor: every reader of the tensor, a residual sum as well, reads the rounded values. The network
therefore runs below a `TorchFunctionMode`, which numbers the operations and rounds the results that the grids name;
where those are is found once, by running the detector on a black image. A convolution that meets an input which was
not rounded for it raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from compress.config.families import families_with
from compress.detectors.base import DensePrediction
from compress.detectors.checkpoints import ModelRecord, load_detector
from compress.detectors.gfl import GFL
from compress.detectors.level_norm import LevelNorm, normed
from deploy.core.errors import UserError
from deploy.quantize.grids import Call, Grids

RATE = 20.0  # a step of the optimizer's size moves a weight absolutely, and a scale by RATE times that, relatively
_TRACED = (64, 64)  # pixels; which operations run does not depend on the size


def load_quantizable(checkpoint: Path) -> tuple[GFL, ModelRecord]:
    """Load a detector that can be rounded. Raises UserError for another one."""
    detector, record = load_detector(checkpoint)
    if not detector.quantizable:
        raise UserError(
            f"{checkpoint}: quantization-aware distillation is for {families_with('quantizable')} students, this is "
            f"{detector.family}"
        )
    return cast(GFL, detector), record  # a quantizable detector has the parts of GFL, which FakeQuantized replaces


def fold_batch_norms(detector: GFL) -> None:
    """Move the factor of every BatchNorm behind a convolution into the convolution's weight, in place.

    What is left of the norm is frozen and adds its bias: mean 0, deviation 1, factor 1. The detector computes the same
    (in eval mode) and keeps its parameters' names and shapes; its weights are now those of the exported graph. The
    backbone's norms stay in eval mode from here on, and the rest of it trains, stages that were frozen included.

    The norms of a head's levels share their convolution and stay as they are, in eval mode too. Rounding is the same:
    a weight's grid is that of its channel, so that a factor of the channel may be applied before or after it.
    """
    detector.backbone.freeze(-1, norm_eval=True)
    for module in detector.modules():
        if isinstance(module, LevelNorm):
            module.frozen = True
            module.train(module.training)
    convolutions = {name: m for name, m in detector.named_modules() if isinstance(m, nn.Conv2d)}
    norms = {id(m.running_mean): m for m in detector.modules() if isinstance(m, _BatchNorm)}
    for mean, name in _trace(detector).norms:
        norm, convolution = norms[mean], convolutions[name]
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            bias = norm.bias.double() - norm.running_mean.double() * factor
            if convolution.bias is not None:
                bias += convolution.bias.double() * factor
                convolution.bias.zero_().requires_grad_(False)
            convolution.weight.copy_(convolution.weight.double() * factor[:, None, None, None])
            norm.bias.copy_(bias)
            norm.weight.fill_(1).requires_grad_(False)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)


def round_activation(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """QuantizeLinear and DequantizeLinear of ONNX: `x` float32, `scale` a float32 scalar, both with gradients."""
    level = (x / scale).clamp(low - zero_point, high - zero_point)
    return (level + (level.round() - level).detach()) * scale


def weight_scales(weight: Tensor, limit: int) -> Tensor:
    """Scale of every output channel of `weight` [C, ...], float32 [C], as onnxruntime.quantization computes it."""
    largest = weight.detach().abs().flatten(1).amax(1).double()
    scale = (largest / limit).float()
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def round_weight(weight: Tensor, limit: int) -> Tensor:
    """`weight` [C, ...] on the grid of its channel's scale; the gradient passes unchanged."""
    scale = weight_scales(weight, limit).view(-1, *[1] * (weight.dim() - 1))
    rounded = (weight.detach() / scale).round().clamp(-limit, limit) * scale
    return weight + (rounded - weight).detach()


class FakeQuantized(GFL):
    """A detector on the grids of an int8 file. It shares backbone, neck and head with `detector`, which stays the float
    detector of the same weights; what it has of its own are the scales.

    Compute in float32: an autocast around it is switched off.

    Raises UserError when `grids` belongs to another detector.
    """

    def __init__(self, detector: GFL, grids: Grids) -> None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # its neck and head are replaced at once
            super().__init__(
                detector.num_classes,
                detector.backbone,
                neck_channels=detector.feature_channels,
                head_depth=len(detector.head.cls_convs),
                compiled=detector.compiled,
            )
        self.neck, self.head = detector.neck, detector.head
        device = detector.mean.device
        self.mean, self.std = detector.mean.clone(), detector.std.clone()
        self._start = grids
        self.start: Tensor
        self.register_buffer("start", torch.tensor([grid.scale for grid in grids.activations], device=device))
        self.theta = nn.Parameter(torch.zeros(len(grids.activations), device=device))
        self._plan = _plan(_trace(detector), grids)

    def scales(self) -> Tensor:
        """Scales of all activations, float32 [n], in the order of the grids."""
        return self.start * (RATE * self.theta).exp()

    def grids(self) -> Grids:
        """The start's grids with the scales as they are now."""
        scales = self.scales().tolist()
        pairs = zip(self._start.activations, scales, strict=True)
        return self._start.model_copy(
            update={"activations": tuple(grid.model_copy(update={"scale": scale}) for grid, scale in pairs)}
        )

    def features(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(images.device.type, enabled=False), _Rounding(self, "features"):
            return super().features(images)

    def predict(self, features: list[Tensor]) -> DensePrediction:
        with torch.autocast(features[0].device.type, enabled=False):
            rounding = _Rounding(self, "predict")
            pairs = zip(features, self._plan.levels, strict=True)
            features = [x if at is None or _grid_of(x) == at else rounding.round(x.float(), at) for x, at in pairs]
            with rounding:
                return super().predict(features)


# ---------------------------------------------------------------------------------------------------- where


class _Layers:
    """The convolutions of a detector, and how often each has run.

    names: by the id of the weight. per_level: those in front of a `LevelNorm`, of which the file has one a level.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.names: dict[int, str] = {}
        self.per_level: dict[int, str] = {}
        for name, module in detector.named_modules():
            if isinstance(module, nn.Conv2d):
                self.names[id(module.weight)] = name
        for parent in detector.modules():
            for (_, conv), _ in normed(parent):
                self.per_level[id(conv.weight)] = self.names.pop(id(conv.weight))
        self.calls: dict[int, int] = {}

    def call(self, weight: Tensor) -> Call | None:
        """The use of a layer that begins now; None for a weight that is none of these."""
        key = id(weight)
        count = self.calls.get(key, 0)
        self.calls[key] = count + 1
        if key in self.per_level:
            return f"{self.per_level[key]}.{count}", 0
        return (self.names[key], count) if key in self.names else None


@dataclass
class _Trace:
    """Record of what a detector computes, as numbers of operations: (part, count of the float results in it)."""

    makers: dict[Call, _Place] = field(default_factory=dict)
    """Convolution → where its result is finished: itself, or the BatchNorm behind it."""
    sources: dict[Call, _Place | None] = field(default_factory=dict)
    """Convolution → what computes its input; None: the caller of `predict`."""
    levels: dict[Call, int] = field(default_factory=dict)
    """Convolution that takes a pyramid map → its level."""
    norms: list[tuple[int, str]] = field(default_factory=list)
    """id of a BatchNorm's running mean, the convolution before it."""


_Place = tuple[str, int]


class _Tracing(TorchFunctionMode):
    def __init__(self, trace: _Trace, part: str, layers: _Layers, features: list[Tensor]) -> None:
        super().__init__()
        self.trace, self.part, self.layers = trace, part, layers
        self.count = 0
        self.origin: dict[int, _Place] = {}  # id of a tensor → the last operation that gave it
        self.levels = {id(x): level for level, x in enumerate(features)}
        self.convolved: dict[int, Call] = {}
        self.alive: list[Any] = []  # an id is one tensor's as long as the tensor lives

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _counts(result):
            return result
        place = (self.part, self.count)
        self.count += 1
        self.alive += [args, result]
        call = self.layers.call(args[1]) if func is F.conv2d else None
        if call is not None:
            self.trace.makers[call] = place
            self.trace.sources[call] = self.origin.get(id(args[0]))
            if id(args[0]) in self.levels:
                self.trace.levels[call] = self.levels[id(args[0])]
            self.convolved[id(result)] = call
        elif func is F.batch_norm and id(args[0]) in self.convolved:
            call = self.convolved[id(args[0])]
            self.trace.makers[call] = place
            if call[0] in self.layers.names.values():
                self.trace.norms.append((id(args[1]), call[0]))
        self.origin[id(result)] = place
        return result


@torch.no_grad()
def _trace(detector: GFL) -> _Trace:
    layers = _Layers(detector)
    was_training, trace = detector.training, _Trace()
    detector.eval()
    images = torch.zeros(1, 3, *_TRACED, dtype=torch.uint8, device=detector.mean.device)
    with _Tracing(trace, "features", layers, []):
        features = GFL.features(detector, images)
    with _Tracing(trace, "predict", layers, features):
        GFL.predict(detector, features)
    detector.train(was_training)
    return trace


@dataclass
class _Plan:
    rounded: dict[_Place, int]
    """Operation → the grid that its result is rounded to."""
    kept: dict[_Place, int]
    """Operation → the grid that its result is on already: a ReLU that the file does without."""
    inputs: dict[Call, int]
    """Convolution → the grid that its input is on. Those without compute in float."""
    levels: list[int | None]
    """The grids of the pyramid maps."""


def _plan(trace: _Trace, grids: Grids) -> _Plan:
    plan = _Plan({}, {}, {}, [None] * (1 + max(trace.levels.values())))
    for index, grid in enumerate(grids.activations):
        calls = [*grid.taken_by, *([] if grid.made_by is None else [grid.made_by])]
        if any(call not in trace.makers for call in calls):
            raise UserError(f"the grids name a layer {calls[0][0]!r} that the detector does not have: train again")
        made = None
        if grid.made_by is not None:
            made = trace.makers[grid.made_by]
            plan.rounded[made] = index
        for call in grid.taken_by:
            plan.inputs[call] = index
            source = trace.sources[call]
            if call in trace.levels:
                plan.levels[trace.levels[call]] = index
                continue
            assert source is not None, "an input that nothing computes"
            if source != made:
                (plan.rounded if made is None else plan.kept)[source] = index
    for call, level in trace.levels.items():  # a map is made in the other part
        if call in plan.inputs and plan.levels[level] != plan.inputs[call]:
            raise UserError(f"the grids of {call[0]} are not those of pyramid level {level}: train again")
    return plan


# ---------------------------------------------------------------------------------------------------- running


class _Rounding(TorchFunctionMode):
    """One pass through a part of the network."""

    def __init__(self, network: FakeQuantized, part: str) -> None:
        super().__init__()
        self.part, self.plan, self.limit = part, network._plan, network._start.weight_limit
        self.activations, (self.low, self.high) = network._start.activations, network._start.integers
        self.layers = _Layers(network)
        self.theta, self.start = network.theta, network.start
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self.layers.call(args[1]) if func is F.conv2d else None
        if call is not None and call in self.plan.inputs:
            if _grid_of(args[0]) != self.plan.inputs[call]:
                raise RuntimeError(f"{call[0]}, call {call[1]}: its input was not rounded for it")
            args = (args[0], round_weight(args[1], self.limit), *args[2:])
        result = func(*args, **(kwargs or {}))
        if not _counts(result):
            return result
        place = (self.part, self.count)
        self.count += 1
        if place in self.plan.rounded:
            return self.round(result, self.plan.rounded[place])
        if place in self.plan.kept:
            result.compress_grid = self.plan.kept[place]
        return result

    def round(self, x: Tensor, index: int) -> Tensor:
        """`x` on a grid, marked with its index."""
        share = (x.numel() * self.high) ** -0.5
        gradient = self.theta[index] * share
        theta = self.theta[index].detach() + (gradient - gradient.detach())  # theta's value, exactly
        scale = self.start[index] * (RATE * theta).exp()
        result = round_activation(x, scale, self.activations[index].zero_point, self.low, self.high)
        result.compress_grid = index  # type: ignore[attr-defined]
        return result


def _counts(result: Any) -> bool:
    return isinstance(result, Tensor) and result.is_floating_point()


def _grid_of(x: Tensor) -> int | None:
    return getattr(x, "compress_grid", None)
