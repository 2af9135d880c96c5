"""LD against the numbers of the authors' code and naive references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.detectors.assign import anchors
from compress.distill import ld
from compress.distill.ld import LD, side_rows, softened_kl, vlr_region
from tests.helpers import gfl_case
from tests.helpers.gfl_case import close
from tests.helpers.method_checks import (
    assert_same,
    batch,
    check_common,
    leaves,
    outputs,
    total,
    without_boxes,
    without_values,
)
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine


def test_anchors() -> None:
    found = anchors([(2, 3), (1, 1)], (8, 16), torch.device("cpu"))
    assert found.tolist()[:2] == [[-32, -32, 32, 32], [-24, -32, 40, 32]]
    assert found.tolist()[3] == [-32, -24, 32, 40]
    assert found.tolist()[6] == [-64, -64, 64, 64]


def test_divergence() -> None:
    expected = ORACLES["E_ld_kl"]
    student, teacher = sine((3, 17), 1.5, 0.45, 0.2), sine((3, 17), 1.8, 0.45, 0.6)
    rows = softened_kl(student, teacher, 10.0)
    close(rows, expected["T10"])
    close(softened_kl(student, teacher, 1.0), expected["T1"])
    close((rows * torch.tensor([1, 0.5, 0.25])).sum() / 4 * 0.25, expected["T10_w025_weight_avg4"])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: softened_kl(z, teacher, 2.0), student)


def test_side_rows_follow_the_layout_of_the_head() -> None:
    student, teacher = sine((2, 68, 2, 3), 1.5, 0.45, 0.2), sine((2, 68, 2, 3), 1.8, 0.45, 0.6)
    rows = side_rows(student, teacher, 10.0)
    for b, y, x in ((0, 0, 0), (1, 1, 2), (0, 1, 0)):
        wanted = 0.0
        for side in range(4):
            s, t = (np.exp(z[b, side * 17 : side * 17 + 17, y, x].numpy() / 10) for z in (student, teacher))
            p, q = s / s.sum(), t / t.sum()
            wanted += 100 * np.mean(q * np.log(q / p))
        assert rows[b, y * 3 + x].item() == pytest.approx(wanted, abs=1e-12)


def test_region_of_case_g() -> None:
    student, _ = gfl_case.outputs()
    assert student.targets is not None
    region = build(LD)._region(student.prediction, student.targets)
    for image in (0, 1):
        expected = ORACLES["E_ld_vlr"][f"img{image}"]
        weights = region[image]
        assert int((weights > 0).sum()) == expected["count"]
        torch.testing.assert_close(weights.sum().item(), expected["sum"], rtol=0, atol=2e-4)
        valid = student.targets.assignment.valid[image]
        found = weights[valid]
        assert not weights[~valid].any()
        for index, weight in expected["first6"] + expected["last3"]:
            assert found[index].item() == pytest.approx(weight, abs=2e-5)


def test_case_g_losses() -> None:
    student, teacher = gfl_case.outputs()
    losses = build(LD).by_level(student, teacher)
    close(losses["ld_main"], ORACLES["E_ld_case"]["loss_ld"])
    close(losses["ld_vlr"], ORACLES["E_ld_vlr"]["loss_ld_vlr"])
    close(losses["ld_cls"], ORACLES["E_ld_mainkd"]["loss_kd"])
    assert_same(build(LD)(student, teacher, batch()), {name: value.sum() for name, value in losses.items()})
    # the weight max_c sigmoid(z_s) of the main term is detached: class logits learn from class KD only
    gradients = torch.autograd.grad(losses["ld_main"].sum() + losses["ld_vlr"].sum(), leaves(student.prediction)[2:])
    assert all((g != 0).any() for g in gradients)
    losses = build(LD, classification=0.0).by_level(student, teacher)
    assert set(losses) == {"ld_main", "ld_vlr"}
    total(losses).backward()
    assert all(x.grad is None for x in student.prediction.logits)


@pytest.mark.parametrize("overlap", ["iof", "diou"])
def test_region_equals_a_naive_reference(overlap: ld.Overlap, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    every = anchors([(6, 5), (3, 3)], (8, 16), torch.device("cpu")).double()
    corner = torch.rand(2, 7, 2, generator=generator, dtype=torch.float64) * 30
    boxes = torch.cat((corner, corner + 1 + torch.rand(2, 7, 2, generator=generator, dtype=torch.float64) * 60), -1)
    thresholds = torch.rand(2, 7, generator=generator, dtype=torch.float64) * 0.6
    thresholds[0, 2] = thresholds[1, 4:] = torch.nan
    wanted = np.zeros((2, len(every)))
    for b in range(2):
        for g in range(7):
            t, box = thresholds[b, g].item(), boxes[b, g].numpy()
            for a, anchor in enumerate(every.numpy()):
                size = np.maximum(np.minimum(anchor[2:], box[2:]) - np.maximum(anchor[:2], box[:2]), 0)
                shared, area = size.prod(), (anchor[2:] - anchor[:2]).prod()
                iou = shared / (area + (box[2:] - box[:2]).prod() - shared)
                apart = ((anchor[:2] + anchor[2:]) / 2 - (box[:2] + box[2:]) / 2) ** 2
                wide = (np.maximum(anchor[2:], box[2:]) - np.minimum(anchor[:2], box[:2])) ** 2
                d = (shared / area if overlap == "iof" else iou) - apart.sum() / wide.sum()
                if 0.25 * t <= d < t:
                    wanted[b, a] = max(wanted[b, a], iou)
    assert (wanted > 0).sum() > 20
    found = vlr_region(every, boxes, thresholds, overlap=overlap, floor=0.25)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)
    monkeypatch.setattr(ld, "PAIRS", 3 * 2 * len(every))  # in pieces of 3, 3 and 1 boxes
    assert torch.equal(vlr_region(every, boxes, thresholds, overlap=overlap, floor=0.25), found)


def test_true_diou_bounds_a_region_of_its_own() -> None:
    student, teacher = gfl_case.outputs()
    official, intended = (build(LD, vlr_overlap=x).by_level(student, teacher)["ld_vlr"] for x in ("iof", "diou"))
    assert (official != intended).all() and (intended > 0).all()


def test_the_box_terms_read_no_value_on_the_way() -> None:
    student, teacher = (without_values(x) for x in gfl_case.outputs())
    losses = build(LD, classification=0.0)(student, teacher, batch())
    assert all(value.is_meta for value in losses.values())


def test_normalised_by_positives() -> None:
    student, teacher = gfl_case.outputs()  # 7 and 4 positives, A = 11
    official, ours = (build(LD, normalise=x).by_level(student, teacher) for x in ("official", "positives"))
    torch.testing.assert_close(ours["ld_main"], official["ld_main"] / 11)
    torch.testing.assert_close(ours["ld_vlr"], official["ld_vlr"] / 11)
    torch.testing.assert_close(ours["ld_cls"], official["ld_cls"] * torch.tensor([7 / 11, 4 / 11]))


def test_weights_scale_the_terms() -> None:
    student, teacher = gfl_case.outputs()
    plain = build(LD)(student, teacher, batch())
    scaled = build(LD, weight=0.5, main=0.5, vlr=1.0, classification=30.0)(student, teacher, batch())
    torch.testing.assert_close(scaled["ld_main"], plain["ld_main"])
    torch.testing.assert_close(scaled["ld_vlr"], plain["ld_vlr"] * 2)
    torch.testing.assert_close(scaled["ld_cls"], plain["ld_cls"] * 1.5)
    assert build(LD, main=0.0, vlr=0.0)(student, teacher, batch()).keys() == {"ld_cls"}


def test_several_processes_share_the_positives() -> None:
    """Two processes with the same images each: the mean of their losses is the loss of one."""
    student, teacher = gfl_case.outputs()
    assert student.targets is not None
    plain = build(LD).by_level(student, teacher)
    student.targets.level_positives, student.targets.world_size = student.targets.level_positives * 2, 2
    assert_same(build(LD).by_level(student, teacher), plain)


def test_what_holds_for_every_method() -> None:
    check_common(build(LD), build(LD, weight=0.0), *gfl_case.outputs())


def test_images_without_ground_truth() -> None:
    for images in ({0, 1}, {1}):
        student, teacher = outputs(without_boxes(images))
        losses = build(LD)(student, teacher, batch())
        assert all((value == 0) == (len(images) == 2) and value.isfinite() for value in losses.values())
        total(losses).backward()
        for x in leaves(student.prediction):
            assert x.grad is not None and x.grad.isfinite().all() and (x.grad[1] == 0).all()


def test_crowd_boxes_have_no_region() -> None:
    targets = gfl_case.targets()
    targets[0].ignore[:] = True
    student, teacher = outputs(targets)
    total(build(LD)(student, teacher, batch())).backward()
    for x in leaves(student.prediction):
        assert x.grad is not None and (x.grad[0] == 0).all()
    assert student.prediction.distribution[1].grad[1].any()  # the other image has its region
