"""What an mAP does not say: errors by kind, confused classes, and slices, against their definitions."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from deploy.core.detection_table import DetectionTable
from deploy.validate.analysis import analyse, confusion, image_slices
from deploy.validate.coco import evaluate_coco
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.tide import KINDS, TideErrors, tide_errors
from tests.helpers.coco_sets import A, B, Rows, Set, row, truth
from tests.helpers.tide_definition import confused, tide


def crowded_set(seed: int) -> Set:
    """Boxes that lie close together, so that every kind of error occurs; all overlaps and scores differ."""
    rng = np.random.default_rng(seed)
    boxes: list[dict[str, Any]] = []
    rows: Rows = []
    for image in range(6):
        here = []
        for _ in range(int(rng.integers(0, 7))):
            here.append([*rng.uniform(0, 80, 2), *rng.uniform(15, 60, 2)])
            boxes.append({"image_id": image, "category_id": int(rng.integers(3)), "bbox": here[-1]})
        for _ in range(int(rng.integers(0, 16))):
            near = (
                here[int(rng.integers(len(here)))] if here and rng.random() < 0.8 else [*rng.uniform(0, 200, 2), 30, 40]
            )
            moved = [*(np.array(near[:2]) + rng.normal(0, 6, 2)), *(np.array(near[2:]) * rng.uniform(0.7, 1.3, 2))]
            rows.append(row([float(value) for value in moved], float(rng.random()), image, int(rng.integers(4))))
    return truth(*boxes, images=range(6), categories=range(4)), rows


def errors(case: Set) -> TideErrors:
    document, rows = case
    found = tide_errors(GroundTruth.of(document), DetectionTable.from_rows(rows), 100)
    assert found is not None
    return found


def test_errors_are_those_of_the_definition() -> None:
    seen: Counter[str] = Counter()
    for seed in range(12):
        document, rows = crowded_set(seed)
        found = errors((document, rows))
        assert found.map50 == pytest.approx(evaluate_coco(document, rows).map50, abs=1e-9)
        for name, (points, count) in tide(document, rows).items():
            assert (name, found.errors[name].count) == (name, count), seed
            assert found.errors[name].points == pytest.approx(points, abs=1e-9), (seed, name)
            seen[name] += count
    assert min(seen[name] for name in KINDS) >= 5, f"a kind that hardly occurs is not tested: {seen}"


def test_each_kind_by_hand() -> None:
    """One of two objects is found, at an AP50 of 51 of 101 recalls; what is wrong beside it is of one kind."""
    two = truth({"bbox": A}, {"bbox": B, "category_id": 0}, categories=range(2))
    half, found = 100 * 51 / 101, row(A, 0.9)
    shifted = [B[0] + 20, *B[1:]]  # an IoU of 1/3
    cases = {
        "localization": (row(shifted, 0.5), 100 - half),
        "classification": (row(B, 0.5, category=1), 100 - half),
        "both": (row(shifted, 0.5, category=1), 0.0),
        "duplicate": (row(A, 0.95), 0.0),
        "background": (row([400, 400, 30, 30], 0.95), half / 2),
    }
    for name, (wrong, points) in cases.items():
        errors_found = errors((two, [found, wrong])).errors
        assert {kind: errors_found[kind].count for kind in KINDS if errors_found[kind].count and kind != "missed"} == {
            name: 1
        }
        assert errors_found[name].points == pytest.approx(points, abs=1e-9), name
        assert errors_found["missed"].count == (0 if name in ("localization", "classification") else 1)
    assert errors((two, [found])).errors["missed"].points == pytest.approx(100 - half)
    assert errors((two, [found])).in_words() == "missed 49.5"
    assert errors((two, [found, row(B)])).in_words() == "nothing"


def test_a_crowd_is_no_object_and_what_matches_it_is_no_error() -> None:
    document = truth({"bbox": A}, {"bbox": B, "iscrowd": 1})
    found = errors((document, [row(A), row(B, 0.95), row([210, 40, 9, 9], 0.7)]))
    assert {name: error.count for name, error in found.errors.items() if error.count} == {}
    assert (
        tide_errors(GroundTruth.of(truth({"bbox": B, "iscrowd": 1})), DetectionTable.from_rows([row(B)]), 100) is None
    )


def test_confused_classes_are_those_of_the_definition() -> None:
    for seed in range(12):
        document, rows = crowded_set(seed)
        found = confusion(GroundTruth.of(document), DetectionTable.from_rows(rows))
        assert Counter({(a, b): count for a, b, count in found}) == confused(document, rows)
        counts = [count for _, _, count in found]
        assert counts == sorted(counts, reverse=True) and len({(a, b) for a, b, _ in found}) == len(found)


def test_confusion_by_hand() -> None:
    document = truth({"bbox": A}, {"bbox": B, "iscrowd": 1}, {"bbox": [400, 0, 9, 9]}, categories=[5, 2])
    rows = [row(A, 0.9, category=2), row(A, 0.5, category=5), row(B, 0.7, category=2), row(A, 0.29, category=5)]
    found = confusion(GroundTruth.of(document), DetectionTable.from_rows(rows))
    assert sorted(found, key=str) == [("class 5", "class 2", 1), ("class 5", None, 1), (None, "class 5", 1)]
    labels, table = GroundTruth.of(document), DetectionTable.from_rows(rows)
    strict = analyse(labels, table, {}, score=0.9)
    assert sorted(strict.confusion, key=str) == [("class 5", "class 2", 1), ("class 5", None, 1)]
    assert strict.to_dict()["confusion_score"] == 0.9
    assert len(confusion(labels, table, 0.1)) == 3 and confusion(labels, table, 0.1)[0] == (None, "class 5", 2)


def test_slices_are_evaluated_alone() -> None:
    boxes = [*({"bbox": [20.0 * n, 0, 16, 16], "image_id": 7} for n in range(20)), {"bbox": A, "image_id": 3}]
    document = truth(*boxes, images=[3, 7, 9], categories=[0, 4])
    document["images"][0]["slice"], document["images"][2]["slice"], document["images"][1]["slice"] = "night", "day", 5
    rows = [row(A, 0.9, 3), row(B, 0.95, 9), *(row([20.0 * n, 0, 16, 16], 0.5, 7) for n in range(10))]
    labels, table = GroundTruth.of(document), DetectionTable.from_rows(rows)
    found = analyse(labels, table, image_slices(labels, document["images"]))
    assert [(part.name, part.images) for part in found.slices] == [
        ("0 to 4 objects", 2), ("15 or more objects", 1), ("day", 1), ("night", 1),
    ]  # fmt: skip
    for part, images in zip(found.slices, ([3, 9], [7], [9], [3]), strict=True):
        alone = {
            **document,
            "images": [entry for entry in document["images"] if entry["id"] in images],
            "annotations": [entry for entry in document["annotations"] if entry["image_id"] in images],
        }
        wanted = evaluate_coco(alone, [entry for entry in rows if entry["image_id"] in images]).map
        assert part.map == wanted or (part.map != part.map and wanted != wanted)
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["slices"][2] == {"name": "day", "images": 1, "map": None}
    assert list(written["errors"]) == [*KINDS, "false positives", "false negatives"]
    assert written["confusion"][0] == ["class 0", "class 0", 11]


def test_no_detections_and_no_objects() -> None:
    labels = GroundTruth.of(truth({"bbox": A}, categories=range(2)))
    nothing = DetectionTable.from_rows([])
    found = analyse(labels, nothing, {})
    assert found.errors is not None and found.errors.errors["missed"].count == 1
    assert found.confusion == [("class 0", None, 1)]
    empty = analyse(GroundTruth.of(truth()), nothing, {"all": np.ones(1, bool)})
    assert (empty.errors, empty.confusion) == (None, []) and empty.to_dict()["slices"][0]["map"] is None
