"""DKD: decoupled knowledge distillation (Zhao et al., CVPR 2022), for heads of sigmoids: project definition.

DKD splits the KL divergence of a softmax into the target class and the others, each with its weight (`decoupled_kl`,
the paper's form, confirmed against an implementation). A head of sigmoids has no competing classes to split; our
reading takes BCKD's row at each positive location i and weighs its columns, c_i being the label of i:

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

from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Method, Outputs, at_places


class DKD(Method):
    """Target class and other classes of the positives, weighted apart.

    Args:
        weight: factor on both terms.
        alpha: weight of the target class.
        beta: weight of the other classes.
        temperature: T.
    """

    needs = frozenset({Capability.DENSE})

    def __init__(self, *, weight: float = 1.0, alpha: float = 1.0, beta: float = 8.0, temperature: float = 1.0) -> None:
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


def decoupled_rows(student: Tensor, teacher: Tensor, label: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """BCKD's rows, split: logits [P, K] and label int64 [P] → target column [P] and sum of the others [P]."""
    z = student / temperature
    t = (teacher / temperature).sigmoid()
    rows = F.binary_cross_entropy_with_logits(z, t, reduction="none") * (t - z.sigmoid()).abs() * temperature**2
    is_target = F.one_hot(label, student.shape[1]).bool()
    return rows.where(is_target, 0).sum(1), rows.where(~is_target, 0).sum(1)


def decoupled_kl(student: Tensor, teacher: Tensor, label: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """DKD of a softmax head: logits [P, K] and label int64 [P] → TCKD [P] and NCKD [P], each times T^2.

    TCKD is the KL divergence (teacher from student) of the pairs (p_label, 1 - p_label), NCKD that of the softmax over
    the K - 1 other classes. With one class both are 0.
    """
    if student.shape[1] == 1:  # there is nothing to tell apart
        zero = student.sum(1) * 0
        return zero, zero
    columns = torch.arange(student.shape[1] - 1, device=student.device).expand(student.shape[0], -1)
    columns = columns + (columns >= label[:, None])  # all but the label's
    binary_s, others_s = _decoupled(student / temperature, label, columns)
    binary_t, others_t = _decoupled(teacher / temperature, label, columns)
    tckd = F.kl_div(binary_s, binary_t, reduction="none", log_target=True).sum(1)
    nckd = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return tckd * temperature**2, nckd * temperature**2


def _decoupled(logits: Tensor, label: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (label, not label) [P, 2] and of the others among themselves [P, K - 1]."""
    others = logits.gather(1, columns)
    pair = torch.cat((logits.gather(1, label[:, None]), others.logsumexp(1, keepdim=True)), 1)
    return pair.log_softmax(1), others.log_softmax(1)
