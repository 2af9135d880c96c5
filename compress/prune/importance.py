"""How much each channel matters, by torch-pruning's group importances: one figure for all layers that lose the channel.

Each is divided by the mean of its group, so that figures of different groups can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch_pruning as tp
from torch import Tensor

from compress.detectors.base import Detector
from compress.prune.graph import PruningGraph
from deploy.core.errors import UserError

Losses = Iterable[Callable[[Detector], Tensor]]
"""For each image, a function from a detector to its scalar loss on it."""

FROM_DATA = ("taylor", "fisher")
"""Importances that look at images."""


def importances(graph: PruningGraph, kind: str, *, losses: Losses = (), seed: int = 0) -> dict[str, Tensor]:
    """Score the channels of every group: name → float [width], mean 1, higher for what should stay.

    Args:
        kind: group_norm: squared weights of all layers of the group (DepGraph, eq. 4, without its sparse training).
            taylor: |weight × gradient| (Molchanov et al., CVPR 2019). fisher: weight² × mean squared gradient of single
            images, the diagonal of the empirical Fisher matrix (optimal brain damage). random: to compare with.
        losses: of training images, for taylor and fisher.
        seed: of random.

    Raises UserError for taylor or fisher without images or of a loss that is not finite.
    """
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.width, generator=generator) for group in graph.groups}
        return {name: score / score.mean() for name, score in scores.items()}
    if kind in FROM_DATA:
        _gradients(graph.traced, kind, losses)
    score = {
        "group_norm": tp.importance.GroupMagnitudeImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "fisher": tp.importance.GroupHessianImportance,
    }[kind]()
    found = {group.name: score(group.traced).float() for group in graph.groups}
    graph.traced.zero_grad(set_to_none=True)
    # A group without any gradient (a part that no loss sees) has no order: all its channels count alike.
    return {name: torch.nan_to_num(value, nan=1.0) for name, value in found.items()}


# --- details --------------------------------------------------------------------------------------------


def _gradients(model: Detector, kind: str, losses: Losses) -> None:
    """Leave in `grad` the mean gradient over the images (taylor) or the mean squared gradient (fisher).

    torch-pruning's own accumulation of squared gradients keeps those of the last image alone (1.6.1), so it is done
    here.
    """
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
