"""DKD: against BCKD and a reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.distill.bckd import BCKD
from compress.distill.dkd import DKD, decoupled_rows
from kernels.ops.binary_kd_loss import reference
from tests.helpers import gfl_case
from tests.helpers.method_checks import batch, certain, check_common, outputs, total, without_boxes
from tests.helpers.methods import build
from tests.oracles import sine


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_rows_equal_a_naive_reference(temperature: float) -> None:
    student, teacher = sine((3, 4), 1.5, 0.7, 0.2), sine((3, 4), 2.0, 0.6, 0.9)
    label = torch.tensor([0, 3, 1])
    target, others = decoupled_rows(student, teacher, label, temperature)
    for i in range(3):
        row = []
        for c in range(4):
            z, t = student[i, c].item() / temperature, 1 / (1 + np.exp(-teacher[i, c].item() / temperature))
            s = 1 / (1 + np.exp(-z))
            row.append(temperature**2 * abs(t - s) * -(t * np.log(s) + (1 - t) * np.log(1 - s)))
        wanted = row.pop(int(label[i]))
        assert target[i].item() == pytest.approx(wanted, abs=1e-12)
        assert others[i].item() == pytest.approx(sum(row), abs=1e-12)
    z = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: decoupled_rows(z, teacher, label, temperature), z)


def test_both_halves_together_are_bckd_at_the_positives() -> None:
    student, teacher = gfl_case.outputs()
    assert student.targets is not None
    losses = build(DKD, beta=1.0).by_level(student, teacher)
    positive = (student.targets.assignment.gt_index >= 0).float().split([256, 64], 1)
    for level in range(2):
        pair = (student.prediction.logits[level].flatten(2), teacher.prediction.logits[level].flatten(2))
        expected, _ = reference(*pair, positive[level])
        torch.testing.assert_close(losses["dkd_target"][level] + losses["dkd_other"][level], expected / 11)
    whole = build(BCKD).by_level(student, teacher)["bckd_cls"]
    assert (losses["dkd_target"] + losses["dkd_other"] < whole).all()


def test_weights_scale_the_terms() -> None:
    student, teacher = gfl_case.outputs()
    plain = build(DKD, beta=1.0)(student, teacher, batch())
    scaled = build(DKD, weight=0.5, alpha=3.0, beta=4.0)(student, teacher, batch())
    assert set(scaled) == {"dkd_target", "dkd_other"}
    torch.testing.assert_close(scaled["dkd_target"], plain["dkd_target"] * 1.5)
    torch.testing.assert_close(scaled["dkd_other"], plain["dkd_other"] * 2)


def test_what_holds_for_every_method() -> None:
    check_common(build(DKD), build(DKD, weight=0.0), *gfl_case.outputs())


def test_certainty_belongs_to_its_location() -> None:
    student, teacher = gfl_case.outputs()
    teacher = certain(teacher, 0.0)
    assert teacher.certainty is not None
    teacher.certainty[0][0, 5, 5] = 2.0  # positive 85 of image 0, label 0
    losses = build(DKD).by_level(student, teacher)
    pair = student.prediction.logits[0][:1, :, 5, 5], teacher.prediction.logits[0][:1, :, 5, 5]
    target, _ = decoupled_rows(*pair, torch.tensor([0]), 1.0)
    torch.testing.assert_close(losses["dkd_target"][0], 2 * target[0] / 11)
    assert losses["dkd_target"][1] == 0


def test_images_without_ground_truth() -> None:
    student, teacher = outputs(without_boxes({0, 1}))
    losses = build(DKD)(student, teacher, batch())
    assert all(value == 0 for value in losses.values())
    total(losses).backward()
    assert all((x.grad == 0).all() for x in student.prediction.logits)

    student, teacher = outputs(without_boxes({1}))
    losses = build(DKD)(student, teacher, batch())
    total(losses).backward()
    for x in student.prediction.logits:
        assert x.grad is not None and (x.grad[0] != 0).any() and (x.grad[1] == 0).all()
