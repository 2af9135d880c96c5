"""CWD: channel-wise knowledge distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Every channel of a map is a distribution over the locations. For each level, s and t of the student and the teacher,
[B, C, h, w]:

    p = softmax_hw(t / temperature),   q = softmax_hw(s / temperature)
    L = loss_weight * temperature^2 * sum_{b,c,hw} p * (log p - log q) / (B * C),  summed over levels

s and t are the pyramid maps (the student's adapted to the teacher's width), or the class logits [B, K, h, w] as they
are. Detached: the teacher. Padding takes part like any location.

Published settings: loss_weight 10 on features and 5 on logits, temperature 1; the variant on the class logits is of
GFL. Equation and constants are confirmed against an established implementation (mmrazor). Ours: certainty weighs
p * (log p - log q) - p + q, which is the same sum, but zero or more at each location, so that no weighting can make a
difference pay.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from compress.config.methods import Cwd
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Adapter, BuildContext, Method, Outputs, weigh

NEEDS = {"features": frozenset({Capability.FEATURES}), "logits": frozenset({Capability.DENSE})}
"""What the method asks of the models, by what is compared."""


class CWD(Method):
    """Channel-wise distillation of pyramid maps or class logits.

    Args:
        student_channels, teacher_channels: widths of the two pyramids; of no meaning on logits.
        levels: pyramid levels that take part, the finest first.
        weight: factor on the loss.
        adapter: 1×1 convolutions on the student's maps; auto: only where the widths differ. Logits have none.
        on: what is compared.
        temperature: of the softmax.
        loss_weight: the published constant.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        levels: int,
        adapter: Literal["auto", "always"],
        on: Literal["features", "logits"],
        temperature: float,
        loss_weight: float,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.weight = weight * loss_weight
        self.temperature = temperature
        self.adapter: Adapter | None = None
        if on == "features":
            self.adapter = Adapter(student_channels, teacher_channels, levels, always=adapter == "always")
        self.needs = NEEDS[on]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if self.adapter is None:
            student_maps = [x.float() for x in student.prediction.logits[: self.levels]]
            teacher_maps = teacher.prediction.logits[: self.levels]
        else:
            student_maps = self.adapter(student.features[: self.levels])
            teacher_maps = teacher.features[: self.levels]
        total = student_maps[0].new_zeros(())
        for level, (s, t) in enumerate(zip(student_maps, teacher_maps, strict=True)):
            certainty = None if teacher.certainty is None else teacher.certainty[level]
            total = total + channel_kl(s, t.detach().float(), self.temperature, certainty)
        return {"cwd": self.weight * total}


def build(settings: Cwd, context: BuildContext) -> CWD:
    """The method of a recipe."""
    return CWD(*context.channels, **settings.constants(), weight=context.weight)


def channel_kl(student: Tensor, teacher: Tensor, temperature: float, certainty: Tensor | None = None) -> Tensor:
    """L of one level without its weight: a scalar in the dtype of its arguments.

    student, teacher: [B, C, h, w]. certainty: [B, h, w] or None.
    """
    assert student.shape == teacher.shape, f"maps differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}"
    log_q = (student.flatten(2) / temperature).log_softmax(2)  # [B, C, M]
    log_p = (teacher.flatten(2) / temperature).log_softmax(2)
    scale = temperature**2 / (student.shape[0] * student.shape[1])
    if certainty is None:
        return scale * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True) - log_p.exp() + log_q.exp()
    return scale * weigh(rows.view_as(student), certainty).sum()
