"""Weighting of a method over the course of training: its weight, `weight: auto`, and its schedule.

    loss = detection loss + sum_m factor_m(t) * scale_m * L_m

scale_m is 1, or for `weight: auto`

    scale_m = ratio_m * |d L_det / d F| / |d L_m / d F|

where F are the student's pyramid maps, all levels together: the place that the gradients of logit and of feature
methods both go through. The norms are measured every `MEASURE_EVERY` steps; the scale follows their ratio as a
running geometric mean, because single batches scatter by an order of magnitude.
Where the batch is spread over processes, squared norms are summed over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.detectors.base import Reduce
from compress.distill.method import Method

MEASURE_EVERY = 20  # steps
HALF_FACTOR = 2.0**16  # on a loss whose gradients would vanish in float16, as a gradient scaler's
MEMORY = 0.9  # of the running mean of the logarithm


@dataclass  # not frozen: Fabric's mixed precision walks through the arguments of forward
class TrainingPosition:
    """Position in training: finished optimizer steps and epochs, and the length of the whole run in both."""

    step: int
    total: int
    steps_per_epoch: int

    @property
    def measures(self) -> bool:
        """Whether gradient norms are measured in this step."""
        return self.step % MEASURE_EVERY == 0


class WeightedMethod(nn.Module):
    """A method with its weight and schedule.

    Args:
        method: gives the terms.
        weight: multiplies them; without meaning with `auto_ratio`.
        auto_ratio: for `weight: auto`, the wanted gradient norm relative to the detection loss; None: a fixed weight.
        stop_epoch: epochs after which the method ends; None: never.
        decay: let the weight fall linearly to zero, at `stop_epoch` or at the end of training.
    """

    def __init__(
        self,
        method: Method,
        *,
        weight: float = 1.0,
        auto_ratio: float | None = None,
        stop_epoch: int | None = None,
        decay: bool = False,
    ) -> None:
        super().__init__()
        self.method = method
        self.auto_ratio = auto_ratio
        self.stop_epoch = stop_epoch
        self.decay = decay
        self.norm: Tensor
        self.scale: Tensor
        self.register_buffer("norm", torch.zeros(()))  # last measured gradient norm, as scaled
        self.register_buffer("scale", torch.tensor(weight if auto_ratio is None else 0.0))  # 0: not measured yet

    def factor(self, position: TrainingPosition) -> float:
        """Factor of the schedule, in 0..1; 0 means that the method need not run."""
        end = position.total if self.stop_epoch is None else self.stop_epoch * position.steps_per_epoch
        if position.step >= end:
            return 0.0
        return 1 - position.step / end if self.decay else 1.0

    @torch.no_grad()
    def measure(self, method_norm: Tensor, detection_norm: Tensor) -> None:
        """Take up measured gradient norms (scalars); those of the method are of its unscaled terms."""
        if self.auto_ratio is not None:
            wanted = self.auto_ratio * detection_norm / method_norm
            usable = torch.isfinite(wanted) & (wanted > 0)  # a method may have nothing to say in a batch
            mean = torch.where(self.scale > 0, self.scale.pow(MEMORY) * wanted.pow(1 - MEMORY), wanted)
            self.scale.copy_(torch.where(usable, mean, self.scale))
        self.norm.copy_(method_norm * self.scale)


def gradient_norm(loss: Tensor, features: list[Tensor], reduce: Reduce | None) -> Tensor:
    """L2 norm of d loss / d features over all levels (and processes); the graph is kept. 0 without a path."""
    square = torch.zeros((), device=features[0].device)
    if loss.requires_grad:
        factor = HALF_FACTOR if features[0].dtype == torch.float16 else 1.0
        gradients = torch.autograd.grad(loss * factor, features, retain_graph=True, allow_unused=True)
        square = sum(((g.float() / factor).square().sum() for g in gradients if g is not None), start=square)
    return (square if reduce is None else reduce(square)).sqrt()
