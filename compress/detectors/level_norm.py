"""BatchNorm in a head that the levels of a pyramid share: one convolution for all, one norm for each level.

Maps of different levels differ in scale, so that common statistics would fit none of them (as RTMDet's head has them,
Lyu et al., arXiv 2212.07784, section 3.1). In eval mode a BatchNorm is a factor and a bias for each channel: an
export moves them into the convolution before it, which then is one for each level. A file made of that has no norm in
its head, and nothing in it averages over a map: padding far from an object does not move what is found there, as it
does with GroupNorm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from compress.detectors.base import STRIDES


class PerLevel(nn.ModuleList):
    """A layer for each level of the pyramid, called with the map and the index of its level."""

    def forward(self, x: Tensor, level: int) -> Tensor:
        result: Tensor = self[level](x)
        return result


class LevelNorm(PerLevel):
    """BatchNorm of [B, channels, h, w] with statistics, factors and biases of each level.

    frozen: stay on the running statistics, in training mode too.
    """

    def __init__(self, channels: int, levels: int = len(STRIDES)) -> None:
        super().__init__(nn.BatchNorm2d(channels) for _ in range(levels))
        self.frozen = False

    def train(self, mode: bool = True) -> LevelNorm:
        super().train(mode)
        if self.frozen:
            for norm in self:
                norm.eval()
        return self

    def forward(self, x: Tensor, level: int) -> Tensor:
        """In training a map of one location of one image, which has no deviation, is normalised by the running
        statistics."""
        norm = self[level]
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        result: Tensor = norm(x)
        return result


def at_level(layers: Iterable[nn.Module], x: Tensor, level: int) -> Tensor:
    """Run layers, of which some may be `PerLevel`, on the map of a level."""
    for layer in layers:
        x = layer(x, level) if isinstance(layer, PerLevel) else layer(x)
    return x


def normed(parent: nn.Module) -> list[tuple[tuple[str, nn.Conv2d], tuple[str, LevelNorm]]]:
    """Convolutions with a `LevelNorm` behind them among the children of a module, each with its name."""
    children = list(parent.named_children())
    found = []
    for (name, conv), (norm_name, norm) in itertools.pairwise(children):
        if isinstance(norm, LevelNorm):
            assert isinstance(conv, nn.Conv2d), "a LevelNorm stands behind the convolution that it normalises"
            found.append(((name, conv), (norm_name, norm)))
    return found
