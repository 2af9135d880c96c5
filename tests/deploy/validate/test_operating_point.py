"""The score of the best F1 against counting by hand, and against matching anew at every threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.core.card import OperatingPoint
from deploy.core.detection_table import DetectionTable
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import ScoreCurve, operating_point, score_curves
from tests.helpers.coco_sets import Rows, row, truth

Box = dict[str, Any]


def at(x: float) -> list[float]:
    return [x, 0, 10, 10]


def point_of(document: dict[str, Any], rows: Rows, ids: list[int]) -> OperatingPoint | None:
    table = DetectionTable.from_rows(rows)
    return operating_point(GroundTruth.of(document), table, ids)


def test_by_hand() -> None:
    document = truth({"bbox": at(0)}, {"bbox": at(50)}, {"bbox": at(20), "category_id": 2}, categories=range(4))
    found = [row(at(0), 0.9), row(at(1), 0.8), row(at(50), 0.7), row(at(90), 0.3), row(at(0), 0.6, category=1)]
    point = point_of(document, found, [2, 0, 1])
    # Of class 0 hit, second box on one object, hit, miss: F1 2/3, 2/4, 4/5, 4/6. Class 1 has no object, class 2 was not
    # found; with its object there are three, and at 0.7 two of three detections are right.
    assert point is not None and point.images == 1
    assert point.class_scores == [None, 0.7, None]
    assert (point.score, point.f1, point.precision, point.recall) == pytest.approx((0.7, 2 / 3, 2 / 3, 2 / 3))
    # Objects of a class that the detector does not know are not missed by it.
    alone = point_of(document, found[:4], [0])
    assert alone is not None and alone.class_scores == [0.7]
    assert (alone.f1, alone.recall) == pytest.approx((0.8, 1.0))
    assert point_of(document, found[-1:], [0, 1, 2]) is None and point_of(document, [], [0]) is None


def test_crowd_regions_count_neither_way() -> None:
    document = truth({"bbox": at(0)}, {"bbox": [40, 0, 60, 10], "iscrowd": 1})
    found = [row(at(50), 0.9), row(at(0), 0.8), row(at(34), 0.7), row(at(36), 0.95)]
    point = point_of(document, found, [0])
    # at(36) lies in the crowd by 6/10, at(34) by 4/10 only: one hit at 0.8, one miss at 0.7
    assert point is not None and (point.score, point.f1) == (0.8, 1.0)


NEIGHBOURS = [float(np.nextafter(np.float32(0.29), np.float32(x))) for x in (0, 1)]
SCORES = st.sampled_from([0.004, 0.25, 0.2512345, *NEIGHBOURS, float(np.float32(0.29)), 0.5, 1.0])
BOXES = st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([4, 6, 8]), st.just(6)).map(list)
OBJECTS = st.fixed_dictionaries(
    {"image_id": st.integers(0, 1), "category_id": st.integers(0, 2), "bbox": BOXES, "iscrowd": st.integers(0, 1)}
)
FOUND = st.tuples(BOXES, SCORES, st.integers(0, 1), st.integers(0, 1))


@settings(max_examples=150)
@given(st.lists(OBJECTS, max_size=6), st.lists(FOUND, max_size=8), st.sampled_from([np.float32, np.float64]))
def test_no_threshold_is_better(objects: list[Box], found: list[Any], kind: type[np.floating[Any]]) -> None:
    """The detector knows classes 0 and 1; class 2 is labelled."""
    document = truth(*objects, images=range(2), categories=range(3))
    rows = [row([float(v) for v in box], float(kind(score)), image, label) for box, score, image, label in found]
    table = DetectionTable.from_rows(rows)
    table = DetectionTable(table.image_ids, table.category_ids, table.boxes, table.scores.astype(kind))
    point = operating_point(GroundTruth.of(document), table, [0, 1])
    every = {score: _counts(objects, rows, score, {0, 1}) for score in {one["score"] for one in rows}}
    if point is None:
        assert not any(right for right, _, _ in every.values())
        return
    # the score as it is compared where detections are kept: of float32, or of Python's numbers
    for cut in (float(np.float32(point.score)), point.score):
        right, kept, wanted = _counts(objects, rows, cut, {0, 1})
        assert point.precision == pytest.approx(right / kept) and point.recall == pytest.approx(right / wanted)
        assert point.f1 == pytest.approx(2 * right / (kept + wanted))
    assert point.f1 == pytest.approx(max(_f1(*counts) for counts in every.values()))
    higher = [counts for score, counts in every.items() if score > point.score and counts != (right, kept, wanted)]
    assert all(_f1(*counts) < point.f1 - 1e-12 for counts in higher), "of equal ones the highest score counts"
    for label, score in enumerate(point.class_scores):
        alone = [_f1(*_counts(objects, rows, one, {label})) for one in every]
        best = max(alone, default=0.0)
        assert (score is None) == (best == 0)
        assert score is None or _f1(*_counts(objects, rows, score, {label})) == pytest.approx(best)


def test_a_cut_has_as_few_decimals_as_keep_the_same_detections() -> None:
    scores = np.array([0.9, 0.31279, 0.312341, 0.3123405, 0.25], np.float32)
    curve = ScoreCurve.of(scores, np.ones(5, bool), 5)
    cuts = [curve.cut(place) for place in range(5)]
    assert cuts == [0.89, 0.3127, 0.312341, 0.31, 0.25]  # float32 has 0.9 as 0.89999998, and 0.25 as it is
    assert [int((scores >= cut).sum()) for cut in cuts] == [1, 2, 3, 4, 5]
    close = ScoreCurve.of(np.array([0.29000002, 0.29], np.float32), np.ones(2, bool), 2)
    assert close.cut(0) == float(np.float32(0.29000002)), "in float32, 0.29 keeps both"


def test_of_equal_cuts_the_highest_counts() -> None:
    curve = ScoreCurve.of(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, False, True]), 2)
    assert curve.f1.tolist() == [2 / 3, 2 / 4, 2 / 5, 4 / 6] and curve.best() == 0


def test_a_long_curve_is_drawn_by_few_points_that_hold_the_best() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(5000) ** 4
    curve = ScoreCurve.of(scores, rng.random(5000) < scores, 2000)
    points = curve.samples()
    assert 100 < len(points) <= 203 and points == sorted(points, reverse=True)
    best = curve.best()
    assert best is not None
    assert max(2 * p * r / (p + r) for _, p, r in points) == pytest.approx(curve.f1[best], abs=1e-3)
    assert points[-1] == pytest.approx((0, curve.precision[-1], curve.recall[-1]), abs=1e-4)
    assert ScoreCurve.of(np.empty(0), np.empty(0, bool), 3).samples() == []


def test_scores_that_are_no_shares_have_no_point() -> None:
    document = truth({"bbox": at(0)})
    curves = score_curves(GroundTruth.of(document), DetectionTable.from_rows([row(at(0), 1.5)]), [0])
    assert curves.of_all.best() == 0 and curves.point() is None


# --- the definition ---------------------------------------------------------------------------------------


def _f1(right: int, kept: int, wanted: int) -> float:
    return 2 * right / (kept + wanted) if kept + wanted else 0.0


def _counts(objects: list[Box], rows: Rows, threshold: float, classes: set[int]) -> tuple[int, int, int]:
    """Right ones, those that count, and objects, with the detections of at least a score, one after the other."""
    wanted = [dict(one, free=True) for one in objects if one["category_id"] in classes]
    right = kept = 0
    for one in sorted(rows, key=lambda one: -one["score"]):
        if one["score"] < threshold or one["category_id"] not in classes:
            continue
        here = [o for o in wanted if all(o[key] == one[key] for key in ("image_id", "category_id"))]
        fits = [(_overlap(one, o), n) for n, o in enumerate(here) if o["free"] and not o["iscrowd"]]
        share, best = max(fits, default=(0.0, 0))
        if share >= 0.5:
            here[best]["free"] = False
            right, kept = right + 1, kept + 1
        elif not any(o["iscrowd"] and _overlap(one, o) >= 0.5 for o in here):
            kept += 1
    return right, kept, sum(not one["iscrowd"] for one in wanted)


def _overlap(found: Box, other: Box) -> float:
    """IoU; of a crowd the share of the box inside."""
    (x, y, w, h), (u, v, wide, tall) = found["bbox"], other["bbox"]
    both = max(0, min(x + w, u + wide) - max(x, u)) * max(0, min(y + h, v + tall) - max(y, v))
    return both / (w * h if other["iscrowd"] else w * h + wide * tall - both)
