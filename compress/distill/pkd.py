"""PKD: Pearson knowledge distillation (Cao et al., NeurIPS 2022, arXiv 2207.02039).

For each pyramid level, S the adapted student map and T the teacher's, both [B, C, h, w], M = B·h·w:

    x^ = (x - mean(x)) / (std(x) + 1e-6)       a channel at a time, over the M values of the batch; std unbiased
    L  = loss_weight * mean((S^ - T^)^2) / 2,  summed over levels

which is (M - 1) / M * mean_c(1 - r_c) with Pearson's correlation r_c of channel c (but for the 1e-6): scale and
offset of the teacher's channels do not matter, so that teachers of another architecture, or `combine: sum` of UET,
are as good as any.

A mean over batch, channels and locations. Detached: the teacher. The statistics are those of the images of this
process. A student map of another size is resized to the teacher's (bilinear).

Published settings: loss_weight 6 on five levels for GFL, 10 and 6 on four levels for RetinaNet and Faster R-CNN.
Equation and constants are confirmed against an established implementation (mmrazor; the GFL weight is of CrossKD's
combination with PKD). Ours: a level of a single location (M = 1), where nothing can be standardised and the reference
gives NaN, contributes zero; certainty weighs the squared differences.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from compress.config.methods import Pkd
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Adapter, BuildContext, Method, Outputs, weigh

EPSILON = 1e-6


class PKD(Method):
    """Pearson distillation of pyramid maps.

    Args:
        student_channels, teacher_channels: widths of the two pyramids.
        levels: pyramid maps that take part, the finest first.
        weight: factor on the loss.
        adapter: 1×1 convolutions on the student's maps; auto: only where the widths differ.
        loss_weight: the published constant.
    """

    needs = frozenset({Capability.FEATURES})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        levels: int,
        adapter: Literal["auto", "always"],
        loss_weight: float,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.weight = weight * loss_weight
        self.adapter = Adapter(student_channels, teacher_channels, levels, always=adapter == "always")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        student_maps = self.adapter(student.features[: self.levels])
        total = student_maps[0].new_zeros(())
        for level, (s, t) in enumerate(zip(student_maps, teacher.features[: self.levels], strict=True)):
            certainty = None if teacher.certainty is None else teacher.certainty[level]
            total = total + pearson_distance(s, t.detach().float(), certainty)
        return {"pkd": self.weight * total}


def build(settings: Pkd, context: BuildContext) -> PKD:
    """The method of a recipe."""
    return PKD(*context.channels, **settings.constants(), weight=context.weight)


def pearson_distance(student: Tensor, teacher: Tensor, certainty: Tensor | None = None) -> Tensor:
    """L of one level without its weight: a scalar in the dtype of its arguments.

    student: [B, C, h', w'], resized to the teacher's [B, C, h, w] if need be. certainty: [B, h, w] or None.
    """
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
    assert student.shape == teacher.shape, f"maps differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}"
    if student[:, 0].numel() == 1:
        return student.sum() * 0
    squared = (standardise(student) - standardise(teacher)).square()
    return weigh(squared, certainty).mean() / 2


def standardise(x: Tensor) -> Tensor:
    """Each channel of x [B, C, h, w] with mean 0 and standard deviation 1 over the batch; a constant one is 0."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    # two passes of our own: on a CPU `x.std` over these dimensions takes ten times as long
    variance = centred.square().sum((0, 2, 3), keepdim=True) / (x[:, 0].numel() - 1)
    varies = variance > 0  # the root has no gradient at 0
    return centred / (variance.where(varies, 1.0).sqrt() * varies + EPSILON)
