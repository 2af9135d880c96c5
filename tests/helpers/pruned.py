"""Detectors to prune, with weights that say something, and the function that a pruned one must have."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from compress.config.model import Model
from compress.data.batch import Batch, Target
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.prune.cut import cut
from compress.prune.graph import pruning_graph
from compress.prune.importance import importances
from compress.prune.order import blocks, leaving
from compress.prune.trial import tensors

SIZE = 64
CLASSES = 3
SMALL = {"retinanet": {"anchor_scale": 2.0}, "faster_rcnn": {"anchor_scale": 4.0, "roi_samples": 16}}


def model(family: str = "gfl", **settings: Any) -> Model:
    """Settings of a small detector: backbone nano, pyramid and head of 32 channels, towers of one convolution."""
    shape = {"backbone": "nano", "neck_channels": 32, "head_depth": 1} | SMALL.get(family, {}) | settings
    return Model.model_validate({"detector": family, **shape})


@functools.cache
def _detector(settings: Model) -> Detector:
    return lively(build_detector(settings, CLASSES, seed=0)).eval()


def detector(family: str = "gfl", **settings: Any) -> Detector:
    """A detector of `model`, as if trained, in eval mode; each caller has its own."""
    if family == "quickstart":
        return copy.deepcopy(_quickstart())
    return copy.deepcopy(_detector(model(family, **settings)))


@functools.cache
def _quickstart() -> Detector:
    return load_teacher_checkpoint("zoo:quickstart")[0]


@torch.no_grad()
def lively(module: nn.Module, seed: int = 0) -> Any:
    """Give every weight, bias and statistic a value of its own, and every output some of every input."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            if value.dim() > 1 and name == "weight":
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif name == "bias" or name == "running_mean":
                value.copy_(0.2 * noise)
            elif name == "weight" or name == "running_var":
                value.copy_(1 + 0.2 * noise.clamp(-2, 2))
    return module


def pruned(detector: Detector, *, keep: tuple[str, ...] = (), share: float = 0.5, seed: int = 0) -> Detector:
    """The detector without so many of the blocks of channels that can leave, by random importances."""
    graph = pruning_graph(detector, keep)
    order = blocks(graph, importances(graph, "random", seed=seed))
    return cut(detector, graph, leaving(order, round(share * len(order))))


def pictures(count: int = 1, seed: int = 0, size: int = SIZE) -> Tensor:
    """uint8 [count, 3, size, size]: rectangles on noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    images[:, 0, size // 8 : size // 2, size // 4 : size * 3 // 4] = 255
    return images.to(torch.uint8)


def batch() -> Batch:
    """Two images with two boxes each."""
    boxes, size = torch.tensor([[4.0, 6, 30, 40], [20, 10, 60, 60]]), (SIZE, SIZE)
    crowd = torch.zeros(2, dtype=torch.bool)
    return Batch(pictures(2), [Target(boxes, torch.tensor([0, 2]), crowd, None, i, size, size) for i in range(2)])


@torch.no_grad()
def outputs(detector: Detector, images: Tensor) -> list[Tensor]:
    """Everything that the network computes, float32."""
    return tensors(detector.eval().traced(images))


def masked(whole: Detector, smaller: Detector) -> Detector:
    """The whole detector, every layer of which sees zeros where its counterpart in the smaller one has no input.

    Which channels these are, the weights say: those of the smaller detector must be a part of the whole one's, unequal
    to all others. So this knows nothing of graphs and groups. A norm works on all channels of the whole detector.

    Asserts that the smaller detector's layers are parts of the whole one's.
    """
    result = copy.deepcopy(whole).eval()
    parts = dict(smaller.named_modules())
    for name, layer in result.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        part = parts[name]
        assert isinstance(part, nn.Conv2d | nn.Linear)
        one_sided = isinstance(layer, nn.Conv2d) and layer.groups > 1
        outputs, inputs = _kept(layer.weight.detach(), part.weight.detach(), one_sided)
        if layer.bias is not None:
            assert torch.equal(layer.bias[outputs], part.bias)
        if not one_sided:
            layer.register_forward_pre_hook(_zeroing(inputs))
    return result


# --- details --------------------------------------------------------------------------------------------


def _kept(whole: Tensor, part: Tensor, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Which outputs and inputs of a layer with weights `whole` one with weights `part` has; one_sided: inputs belong to
    outputs."""
    first = whole.flatten(2)[..., 0] if whole.dim() > 2 else whole  # [O, I]
    wanted = part.flatten(2)[..., 0] if part.dim() > 2 else part
    order = first.flatten().argsort()
    place = order[torch.searchsorted(first.flatten()[order], wanted.contiguous()).clamp(max=len(order) - 1)]
    # A few numbers occur twice, so most of a row decide which row it is.
    outputs, inputs = (place // first.shape[1]).mode(1).values, (place % first.shape[1]).mode(0).values
    if one_sided:
        inputs = torch.arange(whole.shape[1])
    assert torch.equal(whole[outputs][:, inputs], part), "these are no weights of the whole layer"
    return outputs, inputs


def _zeroing(kept: Tensor) -> Any:
    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = arguments
        axis = 1 if isinstance(layer, nn.Conv2d) else x.dim() - 1
        seen = torch.zeros(x.shape[axis])
        seen[kept] = 1
        return (x * seen.view(-1, *[1] * (x.dim() - 1 - axis)),)

    return hook
