"""Intervals of an mAP: drawn sets against pycocotools on the same sets written out, and what an interval must say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploy.core.detection_table import DetectionTable
from deploy.validate.bootstrap import Matches, drawn_aps, draws, interval, mean_ap
from deploy.validate.coco import CocoMetrics, evaluate_coco
from deploy.validate.ground_truth import GroundTruth
from tests.helpers.coco_sets import A, B, Rows, Set, row, truth, varied_set


def without_ties(case: Set) -> Set:
    """Copies of an image take turns with each other where scores tie, which a count of them cannot know."""
    document, rows = case
    return document, [{**entry, "score": (n * 997 % 1009 + 1) / 1010} for n, entry in enumerate(rows)]


def written_out(case: Set, times: np.ndarray) -> Set:
    """The drawn set as a data set: each copy of an image under an id of its own, copies beside each other."""
    document, rows = case
    ids = np.unique([entry["id"] for entry in document["images"]]).tolist()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    detections: Rows = []
    for image, count in zip(ids, times.tolist(), strict=True):
        for _ in range(count):
            number = len(images)
            images.append({"id": number, "file_name": f"{number}.png", "width": 640, "height": 640})
            own = [entry for entry in document["annotations"] if entry["image_id"] == image]
            objects += [{**entry, "id": len(objects) + n, "image_id": number} for n, entry in enumerate(own)]
            detections += [{**entry, "image_id": number} for entry in rows if entry["image_id"] == image]
    return {**document, "images": images, "annotations": objects}, detections


def official(case: Set) -> CocoMetrics:
    return evaluate_coco(*case, backend="pycocotools")


def test_drawn_sets_have_the_map_that_pycocotools_gives_them() -> None:
    seen = 0
    for seed in range(4):
        case = without_ties(varied_set(seed, images=9))
        labels = GroundTruth.of(case[0])
        matches = Matches(labels, DetectionTable.from_rows(case[1]))
        for times in [np.ones(9, np.int64), *draws(9, 4, seed)]:
            wanted, found = official(written_out(case, times)), matches.ap(times)
            np.testing.assert_allclose(found, [wanted.per_class[name] for name in labels.names], atol=1e-9)
            assert mean_ap(found) == pytest.approx(wanted.map, abs=1e-9)
            seen += times.max() > 1
        assert matches.value().tolist() == pytest.approx(matches.ap(np.ones(9, np.int64)).tolist(), nan_ok=True)
    assert seen == 16, "sets with copies"


def test_a_crowd_that_counts_at_some_thresholds_only() -> None:
    """A detection that half lies in a crowd is no error at an IoU of 0.5, and is one at 0.95."""
    document = truth({"bbox": A}, {"bbox": B, "iscrowd": 1}, {"bbox": A, "image_id": 1}, images=range(2))
    case = document, [row([B[0] - 12, *B[1:]], 0.9), row(A, 0.8), row(A, 0.5, 1), row([400, 9, 20, 20], 0.6, 1)]
    matches = Matches(GroundTruth.of(document), DetectionTable.from_rows(case[1]))
    for times in ([1, 1], [2, 0], [0, 2], [3, 1]):
        wanted = official(written_out(case, np.array(times))).map
        assert mean_ap(matches.ap(np.array(times))) == pytest.approx(wanted, abs=1e-9), times


def test_draws_are_the_same_for_a_seed_and_shared_by_detectors() -> None:
    case = varied_set(0)
    labels, table = GroundTruth.of(case[0]), DetectionTable.from_rows(case[1])
    both = {name: Matches(labels, table) for name in "ab"}
    found = drawn_aps(both, 20, seed=3)
    np.testing.assert_array_equal(found["a"], found["b"])
    np.testing.assert_array_equal(found["a"], drawn_aps({"a": both["a"]}, 20, seed=3)["a"])
    assert mean_ap(found["a"]).std() > 0.5 and [len(counts) for counts in draws(5, 2)] == [5, 5]
    assert np.isnan(found["a"][:, -1]).all(), "a class without an object has no AP"


def test_an_interval_holds_zero_where_nothing_differs_and_not_where_much_does() -> None:
    document, rows = without_ties(varied_set(1, images=60))
    labels = GroundTruth.of(document)
    rng = np.random.default_rng(0)

    def detector(noise: float) -> Matches:
        moved = [{**entry, "bbox": [*(np.array(entry["bbox"]) + rng.normal(0, noise, 4)).clip(1)]} for entry in rows]
        return Matches(labels, DetectionTable.from_rows(moved))

    matches = {"good": detector(2), "as good": detector(2), "worse": detector(12)}
    drawn = drawn_aps(matches, 100)
    points = {name: float(mean_ap(each.value())) for name, each in matches.items()}
    alike, less = (
        interval(points[name] - points["good"], mean_ap(drawn[name]) - mean_ap(drawn["good"]))
        for name in ("as good", "worse")
    )
    assert alike.holds_zero and alike.low < alike.value < alike.high
    assert less.high < 0 and not less.holds_zero


def test_nothing_to_find_and_nothing_found() -> None:
    labels = GroundTruth.of(truth({"bbox": A}, categories=range(2)))
    empty = Matches(labels, DetectionTable.from_rows([]))
    np.testing.assert_array_equal(empty.value(), [0, np.nan])
    assert np.isnan(mean_ap(Matches(GroundTruth.of(truth()), DetectionTable.from_rows([row(A)])).value()))
    unknown = interval(1.0, np.array([np.nan]))
    assert (unknown.low, unknown.high) == (1.0, 1.0)
