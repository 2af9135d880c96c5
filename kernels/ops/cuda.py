"""Calls of the CUDA C++ versions of `iou_loss` and `mc_dropout` (`kernels/csrc`), in the layouts that they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.common.dropout import Dropout, three_dimensions
from kernels.common.dropout_table import table
from kernels.csrc.build import load

KINDS = {"iou": 0, "giou": 1, "diou": 2, "ciou": 3}
COMBINE = {"none": 0, "sum": 1, "mean": 2}
WORD = (1 << 32) - 1


def iou_loss(
    boxes: Tensor, target: Tensor, weight: Tensor | None, kind: str, eps: float, boxes_grad: bool, target_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] and the gradients to boxes and target ([N, 4] in `kept_dtype`, or empty). All inputs contiguous."""
    weight = None if weight is None else weight.float()
    return load().iou_loss(_aligned(boxes), _aligned(target), weight, KINDS[kind], eps, boxes_grad, target_grad)


def mc_dropout(x: Tensor, dropout: Dropout, variance: bool) -> tuple[Tensor, Tensor | None]:
    """out and var, both like x. The same random numbers as the Triton kernel's."""
    source, arguments = _source(x, dropout)
    out, var = load().mc_dropout(source, arguments, variance)
    return _like(out, x), _like(var, x) if variance else None


def mc_dropout_backward(grad_out: Tensor, grad_var: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """Gradient like x from those of out and var."""
    source, arguments = _source(x, dropout)
    gradients = (_aligned(_like(gradient, source)) for gradient in (grad_out, grad_var))
    return _like(load().mc_dropout_backward(*gradients, source, arguments), x)


def _source(x: Tensor, dropout: Dropout) -> tuple[Tensor, Any]:
    """x in a layout that the kernels read, and the `Arguments` of the extension."""
    B, C, S = three_dimensions(x, dropout.mode)
    channels_last = not x.is_contiguous() and x.dim() >= 3 and x.movedim(1, -1).is_contiguous()
    tables = table(dropout.rates, x.device)
    first = tables.groups[0]
    one_rate = len(tables.groups) == 1 and first.rate is not None
    arguments = load().Arguments(
        [B, C, S, int(channels_last)],
        [dropout.seed & WORD, dropout.seed >> 32, dropout.offset & WORD, dropout.offset >> 32],
        tables.header,
        tables.words,
        None if one_rate else tables.mean,
        None if one_rate else tables.variance,
        first.copies if one_rate else 0,
        first.per_copy,
        first.per_pair,
        dropout.mode == "channel",
        COMBINE[dropout.combine],
    )
    return _aligned(x if channels_last else x.contiguous()), arguments


def _like(t: Tensor, model: Tensor) -> Tensor:
    """t with the memory layout that `torch.empty_like(model)` has."""
    wanted = torch.empty_like(model, device="meta").stride()
    return t if t.stride() == wanted else torch.empty_like(model).copy_(t)


def _aligned(x: Tensor) -> Tensor:
    """A view may begin anywhere; the kernels read 16 bytes at a time."""
    return x.clone() if x.data_ptr() % 16 else x
