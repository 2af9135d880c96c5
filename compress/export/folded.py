"""A detector as it is exported: layers that compute the same as one convolution in eval mode are one.

The exporter folds a BatchNorm behind a convolution by itself. Not by itself: norms of several levels that share a
convolution (`LevelNorm`), and the two branches of a RepVGG block (Ding et al., arXiv 2101.03697, section 3.3), a 3 x 3
and a 1 x 1 convolution with norms, which the encoders of D-FINE and RT-DETRv2 are made of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compress.detectors.level_norm import LevelNorm, PerLevel, normed


def folded(model: nn.Module) -> nn.Module:
    """A copy of `model`, which computes the same in eval mode, with layers folded; with none to fold, `model` itself.

    A convolution `conv` in front of a `LevelNorm` becomes a `PerLevel` of convolutions with bias, `conv.0` to `conv.4`;
    a RepVGG block becomes one convolution and its activation. Weights are computed in float64.
    """
    if not any(isinstance(module, LevelNorm) for module in model.modules()) and not any(_branched(model)):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for (conv_name, conv), (norm_name, norm) in normed(parent):
            setattr(parent, conv_name, PerLevel(_fold(conv, each) for each in norm))
            setattr(parent, norm_name, nn.Identity())
    for parent, name, block in list(_branched(model)):
        wide, narrow = (_fold(branch.conv, branch.norm) for branch in (block.conv1, block.conv2))
        setattr(parent, name, nn.Sequential(_sum(wide, narrow), block.activation))
    return model.eval()


# --- details --------------------------------------------------------------------------------------------


def _branched(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The RepVGG blocks of transformers, each with its parent and name: `conv1` (3 x 3) and `conv2` (1 x 1), both a
    `conv` with its BatchNorm `norm`, are added and activated. RF-DETR has blocks of that name without branches."""
    for parent in model.modules():
        for name, block in parent.named_children():
            if type(block).__name__ in ("DFineRepVggBlock", "RTDetrV2RepVggBlock"):
                yield parent, name, block


def _sum(wide: nn.Conv2d, narrow: nn.Conv2d) -> nn.Conv2d:
    """One convolution as large as `wide` for the sum of `wide` and `narrow`, which is 1 x 1 and as wide in channels."""
    assert wide.bias is not None and narrow.bias is not None
    around = [(side - 1) // 2 for side in reversed(wide.kernel_size) for _ in (0, 1)]
    with torch.no_grad():
        wide.weight.copy_(wide.weight.double() + F.pad(narrow.weight.double(), around))
        wide.bias.copy_(wide.bias.double() + narrow.bias.double())
    return wide


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """The convolution with the factor and the bias of a BatchNorm behind it, computed in float64."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = norm.bias.double() - norm.running_mean.double() * factor
    if conv.bias is not None:
        bias += conv.bias.double() * factor
    result = copy.deepcopy(conv)
    result.weight.copy_(conv.weight.double() * factor[:, None, None, None])
    result.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return result
