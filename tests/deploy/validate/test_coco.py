"""COCO mAP: known answers, and inputs that are wrong or empty."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.core.errors import UserError
from deploy.validate.coco import evaluate_coco, read_annotations
from tests.helpers.coco_sets import varied_set


def test_perfect_detections_score_100_and_a_class_without_ground_truth_is_nan() -> None:
    dataset, _ = varied_set(1)
    for row in dataset["annotations"]:
        row["iscrowd"] = 0
    keys = ("image_id", "category_id", "bbox")
    results = [{**{key: row[key] for key in keys}, "score": 0.9} for row in dataset["annotations"]]
    metrics = evaluate_coco(dataset, results)
    assert metrics.map == pytest.approx(100.0)
    assert list(metrics.per_class) == ["class 0", "class 1", "class 2", "class 3"]
    assert math.isnan(metrics.per_class["class 3"])
    assert metrics.to_dict()["per_class"]["class 3"] is None
    json.dumps(metrics.to_dict(), allow_nan=False)


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_no_detections_score_zero(backend: Any) -> None:
    dataset, _ = varied_set(2)
    metrics = evaluate_coco(dataset, [], backend=backend)
    assert (metrics.map, metrics.map50, metrics.mar100, metrics.per_class["class 0"]) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(metrics.per_class["class 3"])


def test_arguments_stay_as_they_were_and_area_and_iscrowd_are_optional(tmp_path: Path) -> None:
    dataset, results = varied_set(3)
    for row in dataset["annotations"]:
        row["iscrowd"] = 0
    before = copy.deepcopy((dataset, results))
    full = evaluate_coco(dataset, results)
    assert (dataset, results) == before
    for row in dataset["annotations"]:
        del row["iscrowd"], row["area"]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(dataset))
    assert evaluate_coco(file, results).to_dict() == full.to_dict()


def test_wrong_inputs_are_one_line_errors(tmp_path: Path) -> None:
    dataset, results = varied_set(4)
    with pytest.raises(UserError, match="image_id 5 is not in the annotations"):
        evaluate_coco(dataset, [{**results[0], "image_id": 5}])
    with pytest.raises(UserError, match="category_id 99 is not in the annotations"):
        evaluate_coco(dataset, [{**results[0], "category_id": 99}])
    with pytest.raises(UserError, match="images: the list is empty"):
        evaluate_coco({**dataset, "images": []}, [])
    with pytest.raises(UserError, match="categories: the list is empty"):
        evaluate_coco({**dataset, "categories": []}, [])
    with pytest.raises(UserError, match="images: id 0 is used more than once"):
        evaluate_coco({**dataset, "images": [dataset["images"][0]] * 2}, [])
    with pytest.raises(UserError, match="categories: id 3 is used more than once"):
        evaluate_coco({**dataset, "categories": [dataset["categories"][-1]] * 2}, [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"{\n  ]", ":2: not valid JSON"),
        (b'{"images": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not COCO JSON"),
        (b"9" * 5000, "not COCO JSON"),
        (b"[]", "COCO JSON is an object"),
        (b"null", "COCO JSON is an object"),
        (b"{}", "categories: must be a list, found nothing"),
    ],
)
def test_a_file_that_is_no_coco_file_is_one_line(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "instances.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        evaluate_coco(file, [])
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("images", "id", None, "id is missing"),
        ("images", "id", "7", 'id must be an integer, found "7"'),
        ("images", "id", True, "id must be an integer, found true"),
        ("images", "file_name", None, "file_name is missing"),
        ("images", "file_name", 3, "file_name must be text, found 3"),
        ("categories", "id", None, "id is missing"),
        ("categories", "name", None, "name is missing"),
        ("annotations", "image_id", None, "image_id is missing"),
        ("annotations", "image_id", [1], "image_id must be an integer, found [1]"),
        ("annotations", "category_id", None, "category_id is missing"),
        ("annotations", "bbox", None, "bbox is missing"),
        ("annotations", "bbox", [1, 2, 3], "bbox must be four numbers [x, y, w, h], found [1, 2, 3]"),
        ("annotations", "bbox", [1, 2, 3, "4"], "bbox must be four numbers"),
        ("annotations", "bbox", 5, "bbox must be four numbers"),
        ("annotations", "bbox", [1, 2, 10**400, 4], "bbox must be four numbers [x, y, w, h], found [1, 2, 1000"),
        ("annotations", "area", 10**400, "area must be a number, found 1000"),
        ("annotations", "area", "big", 'area must be a number, found "big"'),
        ("annotations", "iscrowd", 2, "iscrowd must be 0 or 1, found 2"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_place(section: str, key: str, value: Any, says: str) -> None:
    """`None` stands for a key that is not there."""
    dataset, _ = varied_set(4)
    if value is None:
        del dataset[section][1][key]
    else:
        dataset[section][1][key] = value
    with pytest.raises(UserError, match=re.escape(f"annotations: {section}[1]: {says}")):
        evaluate_coco(dataset, [])


def test_entries_and_sections_of_the_wrong_kind() -> None:
    dataset, _ = varied_set(4)
    with pytest.raises(UserError, match=re.escape("images[0]: must be an object, found int")):
        evaluate_coco({**dataset, "images": [3]}, [])
    with pytest.raises(UserError, match="annotations: must be a list, found dict"):
        evaluate_coco({**dataset, "annotations": {}}, [])


def test_sizes_are_checked_where_they_are_needed(tmp_path: Path) -> None:
    dataset, _ = varied_set(4)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(dataset))
    assert read_annotations(file, sizes=True) == dataset
    for value in (0, 2.5, None):
        dataset["images"][2]["height"] = value
        file.write_text(json.dumps(dataset))
        assert read_annotations(file) == dataset
        with pytest.raises(UserError, match=re.escape("images[2]: height must be a positive integer")):
            read_annotations(file, sizes=True)
