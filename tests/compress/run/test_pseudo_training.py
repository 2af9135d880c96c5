"""What training makes of pseudo labels: scores, uncertain regions and classes that no teacher looked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compress.data.batch import Target
from compress.data.coco import CocoDetection
from compress.detectors.backbones import build_backbone
from compress.detectors.base import REG_MAX, STRIDES, DensePrediction
from compress.detectors.gfl import GFL
from deploy.core.errors import UserError

SIDE, K = 128, 3
GRIDS = [(SIDE // stride, SIDE // stride) for stride in STRIDES]


def document() -> dict[str, Any]:
    rows = [
        {"bbox": [10, 10, 20, 20], "category_id": 4, "score": 0.9},
        {"bbox": [60, 10, 20, 20], "category_id": 9, "score": 0.3, "iscrowd": 1, "ignore": 1},
        {"bbox": [30, 40, 10, 12], "category_id": 9},
        {"bbox": [5, 40, 10, 12], "category_id": 4, "iscrowd": 1},
    ]
    return {
        "info": {"coverage": [4, 9]},
        "categories": [{"id": number, "name": str(number)} for number in (9, 4, 2)],
        "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 60}],
        "annotations": [{"id": i, "image_id": 1} | row for i, row in enumerate(rows)],
    }


def dataset(folder: Path, content: dict[str, Any], *, lose: int | None = None, scores: bool = True) -> CocoDetection:
    """`lose`: the transform moves this box out of the image."""

    def transform(image: Tensor, boxes: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if lose is not None:
            boxes[lose] = 0
        return image, boxes, ignore

    (folder / "labels.json").write_text(json.dumps(content))
    Image.fromarray(np.zeros((60, 100, 3), np.uint8)).save(folder / "1.png")
    return CocoDetection(folder / "labels.json", folder, transform, scores=scores)


def test_they_are_read(tmp_path: Path) -> None:
    _, target = dataset(tmp_path, document())[0]
    assert target.scores is not None and target.uncertain is not None and target.unlabeled_classes is not None
    np.testing.assert_allclose(target.scores, [0.9, 0.3, 1, 1])
    assert target.ignore.tolist() == [False, True, False, True]
    assert target.uncertain.tolist() == [False, True, False, False]
    assert target.unlabeled_classes.tolist() == [0]  # category 2, the lowest id
    _, fewer = dataset(tmp_path, document(), lose=0)[0]
    assert fewer.scores is not None and fewer.uncertain is not None
    np.testing.assert_allclose(fewer.scores, [0.3, 1, 1])
    assert fewer.uncertain.tolist() == [True, False, False]
    for copy in (pickle.loads(pickle.dumps(target)), target.to("cpu")):
        assert torch.equal(copy.uncertain, target.uncertain) and torch.equal(
            copy.unlabeled_classes, target.unlabeled_classes
        )


def test_scores_only_on_demand(tmp_path: Path) -> None:
    assert dataset(tmp_path, document(), scores=False)[0][1].scores is None


def test_a_label_of_a_class_that_nobody_looked_for_is_left_out(tmp_path: Path) -> None:
    content = document()
    content["annotations"][2]["category_id"] = 2
    found = dataset(tmp_path, content)
    assert found.dropped == {"category not in info.coverage": 1}
    assert found[0][1].labels.tolist() == [1, 2, 1]


def test_ordinary_files_have_none_of_it(tmp_path: Path) -> None:
    content = document()
    content["info"] = {"coverage": [9, 2, 4]}
    for row in content["annotations"]:
        row.pop("ignore", None)
    _, target = dataset(tmp_path, content, scores=False)[0]
    assert (target.scores, target.uncertain, target.unlabeled_classes) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"info": {"coverage": [4, 5]}}, "info.coverage: must be a list of ids of its categories"),
        ({"info": {"coverage": "all"}}, "info.coverage: must be a list"),
        ({"score": 1.5}, r"annotations\[0\]: score must be a number from 0 to 1"),
    ],
)
def test_wrong_values_are_told(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    content = document()
    if "score" in change:
        content["annotations"][0] |= change
    else:
        content |= change
    with pytest.raises(UserError, match=says):
        dataset(tmp_path, content)


# ------------------------------------------------------------------------------------------------- the loss


def detector(classes: int) -> GFL:
    return GFL(classes, build_backbone("nano", weights="none"), neck_channels=32, head_depth=0)


def prediction(images: int, classes: int = K) -> DensePrediction:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(images, classes, h, w, generator=generator).requires_grad_() for h, w in GRIDS]
    sides = [torch.randn(images, 4 * (REG_MAX + 1), h, w, generator=generator) for h, w in GRIDS]
    return DensePrediction(logits, sides, STRIDES)


def target(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None, **more: Any) -> Target:
    ignore = more.get("uncertain", torch.zeros(len(boxes), dtype=torch.bool))
    sure = None if scores is None else torch.tensor(scores)
    return Target(torch.tensor(boxes), torch.tensor(labels), ignore, sure, 0, (SIDE, SIDE), (SIDE, SIDE), **more)


BOXES = [[8.0, 8.0, 70.0, 60.0], [40.0, 50.0, 120.0, 125.0]]


def test_a_class_nobody_looked_for_is_as_if_the_detector_had_none() -> None:
    full = prediction(1)
    model = detector(K)
    losses = model.loss(full, model.assign(full, [target(BOXES, [0, 1], unlabeled_classes=torch.tensor([2]))]))
    pair = DensePrediction([x.detach()[:, :2] for x in full.logits], full.distribution, STRIDES)
    smaller = detector(2)
    expected = smaller.loss(pair, smaller.assign(pair, [target(BOXES, [0, 1])]))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].detach(), value, rtol=1e-6, atol=0)


def test_each_image_has_its_own_coverage() -> None:
    both = prediction(2)
    model = detector(K)
    targets = [target(BOXES, [0, 1], unlabeled_classes=torch.tensor([2])), target(BOXES, [0, 2])]
    sum(model.loss(both, model.assign(both, targets)).values()).backward()  # type: ignore[union-attr]
    for logits in both.logits:
        assert logits.grad is not None
        assert (logits.grad[0, 2] == 0).all()
        assert (logits.grad[0, :2] != 0).all() and (logits.grad[1] != 0).all()


@pytest.mark.parametrize(
    "region",
    [[0.0, 0.0, 100.0, 96.0], [70.0, 14.0, 91.0, 30.0], [10.0, 8.0, 70.0, 62.0]],
    ids=["large, over the labels", "small", "on a label"],
)
def test_an_unsure_region_is_not_background(region: list[float]) -> None:
    """Its class has no loss where it would be positive were the region the only label; other classes have one, and so
    has what is positive for a label."""
    both = prediction(2)
    model = detector(K)
    labels = target([*BOXES, region], [0, 1, 1], uncertain=torch.tensor([False, False, True]))
    found = model.assign(both, [labels, target(BOXES, [0, 1])])
    plain = model.assign(both, [target(BOXES, [0, 1])] * 2)
    assert torch.equal(found.assignment.gt_index, plain.assignment.gt_index) and plain.unknown is None
    alone = model.assign(prediction(1), [target([region], [1])]).assignment.gt_index[0] == 0
    wanted = torch.zeros(2, K, len(alone), dtype=torch.bool)
    wanted[0, 1] = alone & (found.assignment.gt_index[0] < 0)
    sum(model.loss(both, found).values()).backward()  # type: ignore[union-attr]
    gradient = torch.cat([logits.grad.flatten(2) for logits in both.logits if logits.grad is not None], 2)
    assert torch.equal(gradient == 0, wanted)
    assert wanted.any() or region[3] == 62.0  # all of it belongs to the label


def test_regions_do_not_compete() -> None:
    """Two regions of two classes at one place: neither class is background there."""
    one, model = prediction(1), detector(K)
    region = [70.0, 14.0, 110.0, 50.0]
    both = target([region, region], [0, 2], uncertain=torch.tensor([True, True]))
    unknown = model.assign(one, [both]).unknown
    assert unknown is not None
    alone = model.assign(one, [target([region], [1])]).assignment.gt_index[0] == 0
    assert torch.equal(unknown[0], torch.stack((alone, torch.zeros_like(alone), alone))) and alone.any()


def test_scores_scale_the_quality_that_is_learned() -> None:
    """Gradient of a positive's class logit at a probability of one half: |s * iou - 1/2| decides its size and sign."""
    model, base = detector(K), prediction(1)
    flat = DensePrediction([torch.zeros_like(x).requires_grad_() for x in base.logits], base.distribution, STRIDES)
    gradients = []
    for scores in (None, [1.0, 1.0], [0.5, 0.0]):
        targets = model.assign(flat, [target(BOXES, [0, 1], scores)])
        by_level = torch.autograd.grad(model.loss(flat, targets)["loss_cls"], flat.logits)
        gradients.append(torch.cat([x[0].flatten(1) for x in by_level], 1))  # [K, A]
    assert torch.equal(gradients[0], gradients[1])
    index = targets.assignment.gt_index[0]
    assert (index == 0).any() and (index == 1).any()
    background = gradients[0][1, index == -1][0]  # target 0
    torch.testing.assert_close(gradients[2][1, index == 1], background.expand(int((index == 1).sum())))
    assert (gradients[2][0, index == 0] > gradients[0][0, index == 0]).all()
