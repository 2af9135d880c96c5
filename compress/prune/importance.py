"""How much each channel matters: one figure for all layers that lose it, the sum over their weights.

Each is divided by the mean of its group, so that figures of different groups can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.detectors.base import Detector
from compress.prune.graph import PruningGraph
from compress.prune.groups import ChannelGroup
from deploy.core.errors import UserError

Losses = Iterable[Callable[[Detector], Tensor]]
"""For each image, a function from a detector to its scalar loss on it."""

FROM_DATA = ("taylor", "fisher")
"""Importances that look at images."""


def importances(graph: PruningGraph, kind: str, *, losses: Losses = (), seed: int = 0) -> dict[str, Tensor]:
    """Score the channels of every group: name → float [width], mean 1, higher for what should stay.

    Args:
        kind: group_norm: weight² (DepGraph, eq. 4, without its sparse training). taylor: |weight × mean gradient|
            (Molchanov et al., CVPR 2019). fisher: weight² × mean squared gradient of single images, the diagonal of the
            empirical Fisher matrix (optimal brain damage). random: to compare with.
        losses: of training images, for taylor and fisher.
        seed: of random.

    Raises UserError for taylor or fisher without images, a loss that is not finite, and scores that are not.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind in FROM_DATA:
        _gradients(graph.traced, kind, losses)
    scores = {}
    for group in graph.groups:
        score = torch.rand(group.width, generator=generator) if kind == "random" else _sums(graph.traced, group, kind)
        if not score.isfinite().all():
            raise UserError(
                f"prune.importance: {kind} of {group.name} is not finite; prune a detector that trained well, or take "
                "random"
            )
        # A group without any gradient (a part that no loss sees) has no order: all its channels count alike.
        scores[group.name] = score / score.mean() if score.mean() > 0 else torch.ones_like(score)
    graph.traced.zero_grad(set_to_none=True)
    return scores


# --- details --------------------------------------------------------------------------------------------


@torch.no_grad()
def _sums(model: Detector, group: ChannelGroup, kind: str) -> Tensor:
    """Sums over the weights of all layers that lose a channel, norms among them: float32 [width] on the CPU.

    torch-pruning 1.6.1 has such importances, too. Its fisher keeps the gradients of the last image alone, its taylor
    leaves out norms and, behind a flattened map, gives channels the figures of others; see findings/.
    """
    total = torch.zeros(group.width)
    for member in group.members:
        weight: Any = getattr(model.get_submodule(member.layer), "weight", None)
        if weight is None or (weight.grad is None and kind in FROM_DATA):
            continue
        if kind == "group_norm":
            values = weight.square()
        else:
            values = (weight * weight.grad).abs() if kind == "taylor" else weight.square() * weight.grad
        if values.dim() > 1:  # of a convolution or a fully connected layer
            values = values.transpose(0, 0 if member.output else 1).flatten(1).sum(1)
        total.index_add_(0, member.owners, values.cpu().float()[member.channels])
    return total


def _gradients(model: Detector, kind: str, losses: Losses) -> None:
    """Leave in `grad` the mean gradient over the images (taylor) or the mean squared gradient (fisher)."""
    parameters = dict(model.named_parameters())
    sums: Mapping[str, Tensor] = {name: torch.zeros_like(value) for name, value in parameters.items()}
    count = 0
    for loss in losses:
        model.zero_grad(set_to_none=True)
        value = loss(model)
        if not torch.isfinite(value):
            raise UserError(f"prune.importance: the loss of training image {count + 1} is {value.item()}")
        value.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name].add_(parameter.grad if kind == "taylor" else parameter.grad.square())
        count += 1
    if not count:
        raise UserError(
            f"prune.importance: {kind} needs training images, and there are none; give some, or take group_norm"
        )
    for name, parameter in parameters.items():
        parameter.grad = sums[name] / count
