"""COCO mAP: the two evaluators agree, known answers, and inputs that are wrong or empty."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.coco_map import evaluate_coco
from deploy.errors import UserError


def random_case(seed: int, images: int = 25, classes: int = 4) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(images):
        for _ in range(int(rng.integers(0, 8))):
            x, y = rng.uniform(0, 400, 2)
            w, h = np.exp(rng.uniform(np.log(5), np.log(250), 2))
            category = int(rng.integers(0, classes - 1)) * 7 + 3  # the last class has no ground truth
            annotations.append(
                {
                    "id": len(annotations),  # from zero: an id that pycocotools would take for "no match"
                    "image_id": image * 11,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                noise = rng.normal(0, 0.08, 4) * [w, h, w, h]
                box = [x + noise[0], y + noise[1], max(w + noise[2], 1), max(h + noise[3], 1)]
                wrong = rng.random() < 0.2
                results.append(
                    {
                        "image_id": image * 11,
                        "category_id": int(rng.integers(0, classes)) * 7 + 3 if wrong else category,
                        "bbox": [float(v) for v in box],
                        "score": float(np.round(rng.random(), 2)),  # ties
                    }
                )
    dataset = {
        "images": [{"id": i * 11, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(images)],
        "categories": [{"id": k * 7 + 3, "name": f"class {k}"} for k in reversed(range(classes))],
        "annotations": annotations,
    }
    return dataset, results


@pytest.mark.parametrize("seed", range(5))
def test_the_default_evaluator_equals_pycocotools(seed: int) -> None:
    dataset, results = random_case(seed)
    fast = evaluate_coco(dataset, results).to_dict()
    reference = evaluate_coco(dataset, results, backend="pycocotools").to_dict()
    assert 1.0 < fast["map"] < 99.0
    assert fast.pop("per_class") == pytest.approx(reference.pop("per_class"), abs=1e-9)
    assert fast == pytest.approx(reference, abs=1e-9)


def test_figures_equal_the_summary_of_pycocotools(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dataset, results = random_case(9)
    for number, row in enumerate(dataset["annotations"], start=1):
        row["id"] = number
    reference = COCO()
    reference.dataset = {**copy.deepcopy(dataset), "info": {}}
    reference.createIndex()
    evaluation = COCOeval(reference, reference.loadRes(copy.deepcopy(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    metrics = evaluate_coco(dataset, results)
    found = [
        metrics.map,
        metrics.map50,
        metrics.map75,
        metrics.map_small,
        metrics.map_medium,
        metrics.map_large,
    ]
    np.testing.assert_allclose([*found, metrics.mar100], 100 * evaluation.stats[[0, 1, 2, 3, 4, 5, 8]], atol=1e-9)
    assert capsys.readouterr().out == ""


def test_perfect_detections_score_100_and_a_class_without_ground_truth_is_nan() -> None:
    dataset, _ = random_case(1)
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
    dataset, _ = random_case(2)
    metrics = evaluate_coco(dataset, [], backend=backend)
    assert (metrics.map, metrics.map50, metrics.mar100, metrics.per_class["class 0"]) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(metrics.per_class["class 3"])


def test_arguments_stay_as_they_were_and_area_and_iscrowd_are_optional(tmp_path: Path) -> None:
    dataset, results = random_case(3)
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
    dataset, results = random_case(4)
    with pytest.raises(UserError, match="image_id 5 is not in the annotations"):
        evaluate_coco(dataset, [{**results[0], "image_id": 5}])
    with pytest.raises(UserError, match="category_id 99 is not in the annotations"):
        evaluate_coco(dataset, [{**results[0], "category_id": 99}])
    with pytest.raises(UserError, match="cannot read the annotations"):
        evaluate_coco(tmp_path / "missing.json", [])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        evaluate_coco(tmp_path / "bad.json", [])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="no list 'images'"):
        evaluate_coco(tmp_path / "list.json", [])
    with pytest.raises(UserError, match="lists no images"):
        evaluate_coco({"images": [], "annotations": [], "categories": []}, [])
