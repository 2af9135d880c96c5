"""Overlap of boxes: torchvision's figures, and what happens without an area."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from deploy.core.boxes import area, intersection, iou, pairwise_iou, share, xyxy


def boxes(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 100, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(0, 60, (count, 2))], -1)


def test_every_pair_equals_torchvision() -> None:
    a, b = boxes(40, 0), boxes(30, 1)
    wanted = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert (wanted > 0).mean() > 0.2
    np.testing.assert_allclose(pairwise_iou(a, b), wanted, rtol=1e-12)


def test_boxes_beside_each_other_are_the_diagonal_of_all_pairs() -> None:
    a, b = boxes(20, 2).astype(np.float32), boxes(20, 3).astype(np.float32)
    beside = iou(a, b)
    assert beside.dtype == np.float32
    np.testing.assert_array_equal(beside, np.diagonal(pairwise_iou(a, b)))


@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_without_an_area_there_is_no_ratio(empty: float) -> None:
    point = np.array([[3.0, 4.0, 3.0, 4.0]])
    assert iou(point, point, empty=empty).tolist() == [empty]
    assert share(np.zeros(2), np.array([0.0, 2.0]), empty=empty).tolist() == [empty, 0.0]


def test_a_square_half_covered() -> None:
    square, right = np.array([0.0, 0.0, 2.0, 2.0]), xyxy(np.array([1.0, 0.0, 2.0, 2.0]))
    assert right.tolist() == [1.0, 0.0, 3.0, 2.0]
    assert (area(square), intersection(square, right), float(iou(square, right))) == (4.0, 2.0, 2 / 6)
    assert pairwise_iou(square[None], np.empty((0, 4))).shape == (1, 0)
