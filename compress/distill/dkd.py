"""DKD: decoupled knowledge distillation (Zhao et al., CVPR 2022), for heads of sigmoids: project definition.

DKD splits the KL divergence of a softmax into the target class and the others, each with its weight. A head of
sigmoids has no competing classes to split; our reading takes BCKD's row at each positive location i and weighs its
columns, c_i being the label of i:

    row[i, c] = T^2 * BCE(z_s[i, c] / T, t) * |t - s|,   t = sigmoid(z_t[i, c] / T), s = sigmoid(z_s[i, c] / T)
    dkd_target = alpha * sum_{i positive} row[i, c_i] / A
    dkd_other  = beta * sum_{i positive} sum_{c != c_i} row[i, c] / A

A is the number of positives of the batch (mean over processes). Detached: the teacher. The factor |t - s| is not, as
in BCKD. Settings: alpha 1 and beta 8, a common choice for the softmax form; T = 1. With alpha = beta = 1 it is BCKD's
classification term without the negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.config.methods import Dkd
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import BuildContext, Method, Outputs, at_places


class DKD(Method):
    """Target class and other classes of the positives, weighted apart.

    Args:
        weight: factor on both terms.
        alpha: weight of the target class.
        beta: weight of the other classes.
        temperature: T.
    """

    needs = frozenset({Capability.DENSE})

    def __init__(self, *, alpha: float, beta: float, temperature: float, weight: float = 1.0) -> None:
        super().__init__()
        self.alpha = weight * alpha
        self.beta = weight * beta
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {name: value.sum() for name, value in self.by_level(student, teacher).items()}

    def by_level(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The terms as [L] tensors, `dkd_target` and `dkd_other`."""
        assert student.targets is not None, "the student's targets carry the assignment"
        targets = student.targets
        z_s, z_t = student.prediction.float(), teacher.prediction.float().detach()
        target, other = [], []
        for level, gt in enumerate(targets.assignment.gt_index.split(z_s.counts, 1)):  # [B, M]
            b, m = (gt >= 0).nonzero(as_tuple=True)  # [P]
            label = targets.labels[b, gt[b, m]]
            ours, theirs = z_s.class_logits(level)[b, :, m], z_t.class_logits(level)[b, :, m]  # [P, K]
            rows_target, rows_other = decoupled_rows(ours, theirs, label, self.temperature)
            if teacher.certainty is not None:
                certainty = at_places(teacher.certainty[level], z_s.anchors)[b, m]
                rows_target, rows_other = rows_target * certainty, rows_other * certainty
            target.append(rows_target.sum())
            other.append(rows_other.sum())
        scale = 1 / (targets.avg_factor + torch.finfo(torch.float32).eps)
        return {
            "dkd_target": self.alpha * torch.stack(target) * scale,
            "dkd_other": self.beta * torch.stack(other) * scale,
        }


def build(settings: Dkd, context: BuildContext) -> DKD:
    """The method of a recipe."""
    return DKD(**settings.constants(), weight=context.weight)


def decoupled_rows(student: Tensor, teacher: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """BCKD's rows, split: logits [P, K] and label int64 [P] → target column [P] and sum of the others [P]."""
    z = student / temperature
    t = (teacher / temperature).sigmoid()
    rows = F.binary_cross_entropy_with_logits(z, t, reduction="none") * (t - z.sigmoid()).abs() * temperature**2
    is_target = F.one_hot(label, student.shape[1]).bool()
    return rows.where(is_target, 0).sum(1), rows.where(~is_target, 0).sum(1)
