"""BCKD against the numbers of the authors' code."""

from __future__ import annotations

import torch

from compress.distill.bckd import BCKD
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.iou_loss import giou_loss
from tests.helpers import gfl_case
from tests.helpers.gfl_case import close
from tests.helpers.methods import build
from tests.oracles import ORACLES


def test_classification_rows_and_gradient() -> None:
    expected = ORACLES["B_bckd_cls"]
    student = torch.tensor(expected["student"]).requires_grad_()  # [2, 3]
    loss, _ = binary_kd_loss(student.t()[None], torch.tensor(expected["teacher"]).t()[None], torch.ones(1, 2))
    (loss / 3).backward()
    close(loss / 3, expected["avg3"])
    close(student.grad, expected["grad_avg3"])  # another value if |t - s| were detached


def test_localization_rows() -> None:
    expected = ORACLES["B_bckd_loc_tiny"]
    rows = giou_loss(torch.tensor(expected["pred"]), torch.tensor(expected["teacher"]))
    close(rows, expected["rows"])
    close(4 * (rows * torch.tensor(expected["w"])).sum() / 3, expected["loss4_avg3"])


def test_case_g_losses_weights_and_gradients() -> None:
    expected = ORACLES["B_bckd_case"]
    student, teacher = gfl_case.outputs()
    losses = build(BCKD).by_level(student, teacher)
    close(losses["bckd_cls"], expected["loss_kd"])
    close(losses["bckd_loc"], expected["loss_score_kd"])

    logits, distribution = student.prediction.logits, student.prediction.distribution
    cls_grad = torch.autograd.grad(losses["bckd_cls"].sum(), logits, retain_graph=True)
    close(torch.stack([g.norm() for g in cls_grad]), expected["grad_norm_kd_wrt_cls"])
    loc_grad = torch.autograd.grad(losses["bckd_loc"].sum(), [*logits, *distribution], allow_unused=True)
    assert loc_grad[0] is None and loc_grad[1] is None
    close(torch.stack([g.norm() for g in loc_grad[2:]]), expected["grad_norm_scorekd"][2:])

    disagreement = binary_kd_loss(logits[0].flatten(2), teacher.prediction.logits[0].flatten(2), torch.ones(2, 256))[1]
    close(disagreement[0, :8], expected["weight_first8_l0"])


def test_a_level_without_positives_contributes_nothing() -> None:
    student, teacher = gfl_case.outputs()
    assert student.targets is not None
    student.targets.level_positives[1] = 0
    losses = build(BCKD).by_level(student, teacher)
    assert losses["bckd_cls"][1] == 0 and losses["bckd_loc"][1] == 0
    assert losses["bckd_cls"][0] > 0 and losses["bckd_loc"][0] > 0


def test_weights_scale_the_terms() -> None:
    student, teacher = gfl_case.outputs()
    plain = build(BCKD).by_level(student, teacher)
    scaled = build(BCKD, weight=0.5, cls_weight=3.0, loc_weight=2.0).by_level(student, teacher)
    torch.testing.assert_close(scaled["bckd_cls"], plain["bckd_cls"] * 1.5)
    torch.testing.assert_close(scaled["bckd_loc"], plain["bckd_loc"] * 0.25)
