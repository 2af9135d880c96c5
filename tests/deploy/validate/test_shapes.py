"""mAP by shape, against pycocotools, to which width over height is given as the area."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deploy.core.detection_table import DetectionTable
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.shapes import SHAPES, map_by_shape
from tests.helpers.coco_sets import A, Set, row, truth, varied_set


def official(case: Set) -> dict[str, float]:
    """mAP by shape of pycocotools, whose ranges of areas are those of shapes."""
    document, rows = case
    coco = COCO()
    objects = [
        {**entry, "id": n, "area": entry["bbox"][2] / entry["bbox"][3], "iscrowd": entry.get("iscrowd", 0)}
        for n, entry in enumerate(document["annotations"], start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.dataset = {**document, "annotations": objects}
        coco.createIndex()
        found = coco.loadRes([dict(entry) for entry in rows])
        for entry in found.anns.values():
            entry["area"] = entry["bbox"][2] / entry["bbox"][3]
        evaluation: Any = COCOeval(coco, found, "bbox")
        evaluation.params.areaRng = [[low, min(high, 1e10)] for low, high in SHAPES.values()]
        evaluation.params.areaRngLbl = list(SHAPES)
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]
    return {name: percent(precision[:, :, :, place]) for place, name in enumerate(SHAPES)}


def percent(values: np.ndarray) -> float:
    return float(values[values > -1].mean() * 100) if (values > -1).any() else math.nan


def test_it_is_that_of_pycocotools() -> None:
    for seed in range(5):
        case = varied_set(seed, images=25)
        found = map_by_shape(GroundTruth.of(case[0]), DetectionTable.from_rows(case[1]))
        assert {part.name: part.map for part in found} == pytest.approx(official(case), abs=1e-9, nan_ok=True)
        assert min(part.objects for part in found) >= 5, "a shape that hardly occurs is not tested"


def test_shapes_without_objects_and_boxes_without_a_side() -> None:
    labels = GroundTruth.of(truth({"bbox": A}, {"bbox": [0, 0, 9, 0]}, {"bbox": [50, 50, 0, 0]}))
    found = {part.name: part for part in map_by_shape(labels, DetectionTable.from_rows([row(A)]))}
    assert found["square"].map == pytest.approx(100) and found["wide"].objects == 1 and found["wide"].map == 0
    assert found["tall"].to_dict() == {"name": "tall", "objects": 0, "map": None}
