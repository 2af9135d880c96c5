"""GFL's loss, assignment and inference against the official implementation's numbers."""

from __future__ import annotations

import pytest
import torch

from compress.data.batch import ImageSize, Target
from compress.detectors.assign import atss
from tests.helpers import gfl_case
from tests.helpers.gfl_case import close
from tests.oracles import ORACLES


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_gradients(compiled: bool) -> None:
    expected = ORACLES["F5_gfl_case"]
    detector, prediction = gfl_case.detector(), gfl_case.prediction("student")
    detector.compiled = compiled
    targets = detector.assign(prediction, gfl_case.targets())
    assert int(targets.avg_factor) == expected["avg_factor"]
    losses = detector.loss_by_level(prediction, targets)
    for name, value in losses.items():
        close(value, expected[name])
    total = sum(value.sum() for value in losses.values())
    close(total, expected["total"])
    total.backward()
    norms = [x.grad.norm() for x in (*prediction.logits, *prediction.distribution)]
    close(torch.stack(norms), expected["grad_norms"])


def test_positives_and_valid_locations() -> None:
    expected = ORACLES["F5_gfl_case"]
    detector, prediction = gfl_case.detector(), gfl_case.prediction("student")
    targets = detector.assign(prediction, gfl_case.targets())
    levels = targets.assignment.gt_index.split([256, 64], 1)
    for level, rows in enumerate(expected["pos"]):
        found = [
            [int(b), int(m), int(targets.labels[b, levels[level][b, m]])]
            for b, m in (levels[level] >= 0).nonzero().tolist()
        ]
        assert found == rows
    valid = [x.sum(1).tolist() for x in targets.assignment.valid.split([256, 64], 1)]
    assert valid == expected["label_weight_sums"]
    close(targets.assignment.thresholds[0], ORACLES["F6_atss"]["img0"]["thr"])
    close(targets.assignment.thresholds[1, :1], ORACLES["F6_atss"]["img1"]["thr"])


def test_assignment_on_five_levels() -> None:
    expected = ORACLES["F6_atss5"]
    boxes = torch.tensor([expected["gt"]])
    sizes = [tuple(x) for x in expected["fs"]]
    result = atss(boxes, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[128, 160]]), sizes, (8, 16, 32, 64, 128))
    close(result.thresholds[0], (torch.tensor(expected["mean"]) + torch.tensor(expected["std"])).tolist())
    found = [[a, int(result.gt_index[0, a]) + 1] for a in (result.gt_index[0] >= 0).nonzero().flatten().tolist()]
    assert found == [[a, gt] for a, gt, _ in expected["pos"]]


def test_inference() -> None:
    detector, prediction = gfl_case.detector(), gfl_case.prediction("student", shift=1.0)
    detections = detector.decode(prediction, [target.image_size for target in gfl_case.targets()])
    for found, expected in zip(detections, ORACLES["F7_infer"], strict=True):
        assert len(found.scores) == expected["num"]
        close(found.boxes[:5], [row[0] for row in expected["top5"]])
        close(found.scores[:5], [row[1] for row in expected["top5"]])
        assert found.labels[:5].tolist() == [row[2] for row in expected["top5"]]


def test_inference_scales_to_the_original_image() -> None:
    detector, prediction = gfl_case.detector(), gfl_case.prediction("student", shift=1.0)
    sizes = [target.image_size for target in gfl_case.targets()]
    plain = detector.decode(prediction, sizes)[1]
    sizes[1] = ImageSize(sizes[1].network, (120, 192))  # the image was shrunk to (60, 96)
    doubled = detector.decode(prediction, sizes)[1]
    torch.testing.assert_close(doubled.boxes, plain.boxes * 2)


def test_an_empty_batch_is_all_negative_and_differentiable() -> None:
    detector, prediction = gfl_case.detector(), gfl_case.prediction("student")
    empty = [
        Target(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            ignore=torch.zeros(0, dtype=torch.bool),
            scores=None,
            image_id=0,
            size=(128, 128),
            original_size=(128, 128),
        )
        for _ in range(2)
    ]
    targets = detector.assign(prediction, empty)
    assert int(targets.avg_factor) == 2  # at least one an image
    losses = detector.loss(prediction, targets)
    assert losses["loss_bbox"] == 0 and losses["loss_dfl"] == 0 and losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(x.grad is not None for x in (*prediction.logits, *prediction.distribution))


def test_crowd_boxes_are_no_targets() -> None:
    detector, prediction = gfl_case.detector(), gfl_case.prediction("student")
    with_crowd = gfl_case.targets()
    with_crowd[0].ignore[0] = True
    index = detector.assign(prediction, with_crowd).assignment.gt_index[0]
    assert set(index.unique().tolist()) == {-1, 1}
