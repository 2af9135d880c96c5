"""BCKD: bridging cross-task protocol inconsistency (Yang et al., ICCV 2023).

    t = sigmoid(z_t), s = sigmoid(z_s);   v = 1 for valid locations, positive or negative (times the teacher's
    certainty, if it has one);   A = number of positives
    L_cls = sum_{i,c} v_i * BCE(z_s, t) * |t - s|^beta / A                                         (section 3.2)
    L_loc = sum_i v_i * max_c |t - s| * (1 - GIoU(box_s, box_t)) / A                               (section 3.3)

Detached: the teacher, and in L_loc the whole weight max_c |t - s|. The factor |t - s|^beta in L_cls is not.
Boxes are compared in units of the stride. As in the authors' code a level without any positive location
contributes nothing; where the batch is spread over processes we ask that of the whole batch (the authors: of
each process), so that the loss does not depend on the number of processes.
The two heads may be of any kind whose predictions stand at the same places: GFL and FCOS, or RetinaNets of the same
anchors. Places are then the anchors, without those between RetinaNet's thresholds; FCOS's centerness takes no part.
Published settings: cls_weight 1, loc_weight 4, beta 1. Confirmed against the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.config.methods import Bckd
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import BuildContext, Method, Outputs, at_places, boxes_in_strides
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.distribution_iou_loss import distribution_iou_kd_loss
from kernels.ops.iou_loss import giou_loss


class BCKD(Method):
    """Binary classification and IoU-based localization distillation.

    Args:
        cls_weight: weight of L_cls.
        loc_weight: weight of L_loc.
        beta: exponent of the modulating factor of L_cls.
        weight: factor on both terms.
        compiled: run the dense classification pass through torch.compile.
    """

    needs = frozenset({Capability.DENSE})

    def __init__(
        self,
        *,
        cls_weight: float,
        loc_weight: float,
        beta: float,
        weight: float = 1.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.cls_weight = weight * cls_weight
        self.loc_weight = weight * loc_weight
        self.beta = beta
        self.compiled = compiled

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {name: value.sum() for name, value in self.by_level(student, teacher).items()}

    def by_level(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The two terms as [L] tensors, `bckd_cls` and `bckd_loc`."""
        assert student.targets is not None, "the student's targets carry the normaliser"
        targets = student.targets
        z_s, z_t = student.prediction.float(), teacher.prediction.float()
        distributions = bool(z_s.distribution) and bool(z_t.distribution)
        if not distributions:
            student_boxes = boxes_in_strides(student, z_s)
            with torch.no_grad():
                teacher_boxes = boxes_in_strides(teacher, z_t)
        classification, localization = [], []
        for level, valid in enumerate(targets.assignment.valid.split(z_s.counts, 1)):
            v = valid.float()  # [B, M]
            if teacher.certainty is not None:
                v = v * at_places(teacher.certainty[level], z_s.anchors)
            loss, disagreement = binary_kd_loss(
                z_s.class_logits(level),
                z_t.class_logits(level),
                v,
                beta=self.beta,
                compiled=self.compiled,
            )
            classification.append(loss)
            if distributions:
                localization.append(
                    distribution_iou_kd_loss(
                        z_s.distribution[level].flatten(2), z_t.distribution[level].flatten(2), disagreement * v
                    )
                )
            else:
                rows = giou_loss(student_boxes[level], teacher_boxes[level])  # [B, M]
                localization.append((rows * disagreement * v).sum())
        has_positive = (targets.level_positives > 0).float()
        scale = has_positive / (targets.avg_factor + torch.finfo(torch.float32).eps)
        return {
            "bckd_cls": self.cls_weight * torch.stack(classification) * scale,
            "bckd_loc": self.loc_weight * torch.stack(localization) * scale,
        }


def build(settings: Bckd, context: BuildContext) -> BCKD:
    """The method of a recipe."""
    return BCKD(**settings.constants(), weight=context.weight, compiled=context.compiled)
