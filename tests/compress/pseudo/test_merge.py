"""Merging what teachers found: the reference case of the methods, torchvision's NMS, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from compress.pseudo.merge import (
    NO_CLASS,
    Boxes,
    Merging,
    class_map,
    in_union,
    looked_for,
    merge,
    split,
    union_of,
)
from deploy.core.boxes import pairwise_iou
from deploy.core.errors import UserError
from tests.oracles import ORACLES

CASE = ORACLES["D_merge"]
NAMES = ("cat", "dog", "person")


def boxes_of(rows: list[list]) -> Boxes:
    return Boxes(
        np.array([box for box, _, _ in rows], np.float64).reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float64),
        np.array([NAMES.index(name) for _, _, name in rows], np.int64),
    )


def rows_of(found: Boxes) -> list[list]:
    return [
        [box, score, NAMES[label]]
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]


def merged(*teachers: Boxes, how: Merging = "nms", iou: float = 0.6) -> Boxes:
    return merge(teachers, how=how, iou_threshold=iou, counts=np.full(len(NAMES), len(teachers)))


TEACHERS = boxes_of(CASE["teacher1"]), boxes_of(CASE["teacher2"])


@pytest.mark.parametrize("tau", [0.4, 0.3])  # at .3 the second dog is a candidate, and suppressed
def test_reference_case(tau: float) -> None:
    kept, ignored = split(merged(*TEACHERS, iou=CASE["nms"]), np.full(3, tau), np.full(3, 0.2))
    assert rows_of(kept) == CASE["kept"]
    assert len(ignored) == 0


def test_reference_overlaps() -> None:
    cats = np.array([CASE["teacher1"][2][0], CASE["teacher2"][0][0]], np.float64)
    found = pairwise_iou(np.array([CASE["teacher1"][0][0]], np.float64), cats)
    np.testing.assert_allclose(found[0], CASE["iou_cat_pairs"], atol=1e-6)


def test_band_between_the_thresholds_is_ignored_and_each_class_has_its_own() -> None:
    found = boxes_of(
        [
            [[0, 0, 9, 9], 0.4, "cat"],
            [[20, 0, 29, 9], 0.39, "cat"],
            [[40, 0, 49, 9], 0.2, "cat"],
            [[60, 0, 69, 9], 0.19, "cat"],
            [[0, 0, 9, 9], 0.4, "dog"],
        ]
    )
    kept, ignored = split(found, np.array([0.4, 0.5, 0.4]), np.array([0.2, 0.1, 0.2]))
    assert rows_of(kept) == [[[0, 0, 9, 9], 0.4, "cat"]]
    assert [row[1:] for row in rows_of(ignored)] == [[0.39, "cat"], [0.2, "cat"], [0.4, "dog"]]


def test_fusion_of_the_reference_case() -> None:
    found = merged(*TEACHERS, how="wbf")
    cat = (
        np.array([10, 10, 50, 50]) * 0.9 + np.array([11, 10, 51, 51]) * 0.7 + np.array([12, 11, 52, 49]) * 0.45
    ) / 2.05
    dog = (np.array([60, 60, 90, 95]) * 0.55 + np.array([61, 58, 91, 93]) * 0.35) / 0.9
    assert [NAMES[label] for label in found.labels] == ["cat", "dog", "person"]
    np.testing.assert_allclose(found.boxes, [cat, dog, [100, 20, 140, 80]], rtol=1e-12)
    np.testing.assert_allclose(found.scores, [(0.9 + 0.7) / 2, (0.55 + 0.35) / 2, 0.8 / 2], rtol=1e-12)


def test_fusion_counts_only_teachers_that_look_for_the_class() -> None:
    found = merge(TEACHERS, how="wbf", iou_threshold=0.6, counts=np.array([2, 2, 1]))
    assert found.scores[NAMES.index("person") == found.labels].tolist() == [0.8]


@st.composite
def detections(draw: st.DrawFn, most: int = 8) -> Boxes:
    """Boxes on a coarse grid, so that overlaps and equal boxes happen; no two scores equal."""
    count = draw(st.integers(0, most))
    corners = st.tuples(*(st.integers(0, 12) for _ in range(2)), *(st.integers(1, 8) for _ in range(2)))
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (draw(corners) for _ in range(count))]
    scores = draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count, unique=True))
    labels = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return Boxes(
        np.array(boxes, np.float64).reshape(-1, 4), np.array(scores, np.float64) / 1000, np.array(labels, np.int64)
    )


def assert_same(a: Boxes, b: Boxes) -> None:
    np.testing.assert_allclose(a.boxes, b.boxes, rtol=1e-12)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-12)
    np.testing.assert_array_equal(a.labels, b.labels)


@settings(max_examples=60)
@given(st.lists(detections(), min_size=1, max_size=3), st.sampled_from(["nms", "wbf"]))
def test_order_of_teachers_does_not_matter(teachers: list[Boxes], how: Merging) -> None:
    assert_same(merged(*teachers, how=how), merged(*reversed(teachers), how=how))


@settings(max_examples=60)
@given(detections(most=16))
def test_one_teacher_is_its_own_nms(found: Boxes) -> None:
    boxes, scores, labels = (torch.from_numpy(x) for x in (found.boxes, found.scores, found.labels))
    keep = batched_nms(boxes, scores, labels, 0.6).numpy()
    alone = merged(found)
    assert_same(alone, found.where(keep))
    kept, ignored = split(alone, np.zeros(3), np.zeros(3))
    assert_same(kept, alone)
    assert len(ignored) == 0


def test_visible_parts_that_are_alike_become_one_label() -> None:
    """A teacher keeps two objects that reach out of the picture, [-50, 0, 50, 100] and [0, 0, 50, 100]; its boxes come
    here clipped, and a label that stands there twice would be learned twice."""
    found = merged(boxes_of([[[0, 0, 50, 100], 0.9, "dog"], [[0, 0, 50, 100], 0.8, "dog"]]))
    assert found.boxes.tolist() == [[0, 0, 50, 100]] and found.scores.tolist() == [0.9]


@settings(max_examples=60)
@given(st.lists(detections(), min_size=2, max_size=3), st.floats(0.1, 0.9))
def test_suppression_before_or_after_the_threshold_is_the_same(teachers: list[Boxes], tau: float) -> None:
    before = merged(*(found.where(found.scores >= tau) for found in teachers))
    assert_same(split(merged(*teachers), np.full(3, tau), np.zeros(3))[0], before)


def test_a_teacher_has_one_vote_in_a_fusion() -> None:
    """Its second box of the object moves the mean and adds nothing to the score."""
    box, near = [0, 0, 10, 10], [0, 0, 10, 12]
    found = merged(boxes_of([[box, 0.9, "dog"], [near, 0.6, "dog"]]), boxes_of([[box, 0.5, "dog"]]), how="wbf")
    np.testing.assert_allclose(found.scores, [(0.9 + 0.5) / 2])
    np.testing.assert_allclose(found.boxes, [[0, 0, 10, (0.9 * 10 + 0.6 * 12 + 0.5 * 10) / 2]])


@settings(max_examples=40)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_fusion_of_identical_boxes_is_that_box(scores: list[int]) -> None:
    box = [3.3, 4.7, 11.1, 9.9]
    found = merged(*(boxes_of([[box, score / 1000, "dog"]]) for score in scores), how="wbf")
    np.testing.assert_allclose(found.boxes, [box], rtol=1e-12)
    np.testing.assert_allclose(found.scores, [sum(scores) / 1000 / len(scores)], rtol=1e-12)


@settings(max_examples=40)
@given(st.lists(detections(), min_size=1, max_size=3))
def test_fusion_stays_inside_what_was_found(teachers: list[Boxes]) -> None:
    found = merged(*teachers, how="wbf")
    for label in set(found.labels.tolist()):
        of_class = found.where(found.labels == label)
        inputs = np.concatenate([one.boxes[one.labels == label] for one in teachers])
        assert (of_class.boxes >= inputs.min(0) - 1e-9).all() and (of_class.boxes <= inputs.max(0) + 1e-9).all()
        assert 0 < of_class.scores.max() <= max(one.scores.max(initial=0) for one in teachers)


def test_nothing_found_is_nothing() -> None:
    for how in ("nms", "wbf"):
        assert len(merged(boxes_of([]), boxes_of([]), how=how)) == 0


def test_classes_go_by_name_through_the_table() -> None:
    table = {"kitten": "cat", "bus": None}
    assert union_of([("kitten", "dog"), ("person", "cat", "bus")], table) == ["cat", "dog", "person"]
    labels = class_map(("bus", "person", "kitten"), NAMES, table, teacher="t.safetensors")
    assert labels == [NO_CLASS, 2, 0]
    found = in_union(Boxes(np.arange(12.0).reshape(3, 4), np.array([0.9, 0.8, 0.7]), np.array([2, 0, 1])), labels)
    assert rows_of(found) == [[[0, 1, 2, 3], 0.9, "cat"], [[8, 9, 10, 11], 0.7, "person"]]


@pytest.mark.parametrize(("table", "says"), [({}, "'bus' is not among"), ({"bus": "truck"}, "calls 'truck', is not")])
def test_a_class_without_a_place_is_an_error(table: dict[str, str | None], says: str) -> None:
    with pytest.raises(UserError, match=rf"t\.pth: its class 'bus'.*{says.removeprefix(chr(39) + 'bus' + chr(39))}"):
        class_map(("cat", "bus"), NAMES, table, teacher="t.pth")


def test_coverage_counts_each_teacher_once() -> None:
    assert looked_for([[0, 0, NO_CLASS], [0, 2]], 4).tolist() == [2, 0, 1, 0]
