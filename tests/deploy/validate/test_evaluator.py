"""The evaluator against the definition of mAP, in the cases where evaluators differ; its limits; its memory."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import threading
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deploy.core.card import OperatingPoint
from deploy.core.detection_table import DetectionTable
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.validate import average_precision
from deploy.validate.analysis import analyse, image_slices
from deploy.validate.coco import CocoMetrics, evaluate_coco
from deploy.validate.collected import Collected
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import score_curves
from deploy.validate.score_calibration import detection_ece
from tests.helpers import coco_definition
from tests.helpers.coco_sets import RLE, A, B, grid, random_set, row, truth

BACKENDS = ["faster", "pycocotools"]
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], float | None]] = {
    "ids from 0": (truth({"bbox": A}, {"bbox": B}), [row(A), row(B)], 100),
    "ids that repeat": (truth({"bbox": A, "id": 7}, {"bbox": B, "id": 7}), [row(A), row(B)], 100),
    "ids that are text": (truth({"bbox": A, "id": "a"}), [row(A)], 100),
    "equal scores, right first": (truth({"bbox": A}), [row(A), row(B)], 100),
    "equal scores, wrong first": (truth({"bbox": A}), [row(B), row(A)], 50),
    "the hundredth counts": (truth({"bbox": A}), [*[row(B)] * 99, row(A, 0.1)], 1),
    "the hundred and first does not": (truth({"bbox": A}), [*[row(B)] * 100, row(A, 0.1)], 0),
    "crowd with a box": (truth({"bbox": A}, {"bbox": B, "iscrowd": 1}), [row(A), row(B, 0.95), row(B, 0.99)], 100),
    "crowd with a mask": (
        truth({"bbox": A}, {"bbox": B, "iscrowd": 1, "segmentation": RLE}), [row(A, 0.5), row([210, 40, 9, 9])], 100,
    ),
    "only a crowd": (truth({"bbox": A, "iscrowd": 1}), [row(A)], None),
    "wrong beside a crowd": (truth({"bbox": A}, {"bbox": B, "iscrowd": 1}), [row([200, 30, 90, 90]), row(A, 0.5)], 50),
    "no detections": (truth({"bbox": A}), [], 0),
    "no objects": (truth(), [row(A)], None),
    "images without objects": (
        truth({"bbox": A}, images=range(3)), [row(A), row(B, 0.95, 1), row(B, 0.99, 2)], 100 / 3,
    ),
    "a class without objects": (truth({"bbox": A}, categories=range(2)), [row(A), row(A, 0.95, category=1)], 100),
    "no width": (truth({"bbox": A}, {"bbox": [60, 60, 0, 9]}), [row(A), row([60, 60, 0, 9])], 100 * 51 / 101),
    "negative area": (truth({"bbox": A}, {"bbox": B, "area": -1}), [row(A, 0.5), row(B)], 100),
    "ignore is not read": (truth({"bbox": A}, {"bbox": B, "ignore": 1}), [row(A)], 100 * 51 / 101),
    "every copy is another object": (truth({"bbox": A}, {"bbox": A}), [row(A)], 100 * 51 / 101),
    "two for one object": (truth({"bbox": A}, {"bbox": B}), [row(A), row(A, 0.8), row(B, 0.7)], None or -1.0),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_where_evaluators_differ_the_definition_decides(name: str, backend: Any) -> None:
    document, rows, wanted = CASES[name]
    defined = coco_definition.mean_precision(document, rows)
    if wanted is None or wanted >= 0:
        assert defined == (None if wanted is None else pytest.approx(wanted, abs=1e-9))
    found = evaluate_coco(document, rows, backend=backend).to_dict()
    assert found["map"] == (None if defined is None else pytest.approx(defined, abs=1e-9))


@pytest.mark.parametrize("seed", range(6))
def test_random_sets_score_as_the_definition_says(seed: int) -> None:
    document, rows = random_set(seed)
    for backend in BACKENDS:
        found = evaluate_coco(document, rows, max_detections=150, backend=backend).to_dict()
        for name, sizes in (
            ("map", coco_definition.ALL),
            ("map_small", coco_definition.SMALL),
            ("map_medium", coco_definition.MEDIUM),
            ("map_large", coco_definition.LARGE),
        ):
            wanted = coco_definition.mean_precision(document, rows, sizes=sizes)
            assert found[name] == (None if wanted is None else pytest.approx(wanted, abs=1e-9)), (backend, name)
        assert found["mar100"] == pytest.approx(coco_definition.mean_recall(document, rows), abs=1e-9)
        assert found["map_at_max"] == found["map"]


def test_order_of_images_and_size_of_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        document, rows = random_set(seed)
        whole = evaluate_coco(document, rows).to_dict()
        assert evaluate_coco({**document, "images": document["images"][::-1]}, rows).to_dict() == whole
        with monkeypatch.context() as small:
            small.setattr(average_precision, "ROWS", 3)
            small.setattr(average_precision, "PAIRS", 2)
            small.setattr(average_precision, "CELLS", 20)
            assert evaluate_coco(document, rows).to_dict() == whole


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_100_detections_have_figures_of_their_own(backend: Any) -> None:
    """110 of 115 objects are found: 100 of them count for COCO, 110 at 130, 105 at 105."""
    document, rows = truth(*({"bbox": box} for box in grid(115))), [row(box) for box in grid(110)]
    for limit, counted, recalls in ((130, 110, 96), (105, 105, 92)):  # recalls 0 to 0.95, and to 0.91
        found = evaluate_coco(document, rows, max_detections=limit, backend=backend)
        assert found.map == pytest.approx(100 * 87 / 101)
        assert found.mar100 == pytest.approx(100 * 100 / 115)
        assert (found.max_detections, found.mar_at_max) == (limit, pytest.approx(100 * counted / 115))
        assert found.map_at_max == pytest.approx(100 * recalls / 101)
        point = OperatingPoint(score=0.5, f1=0.7, precision=1, recall=0.6, class_scores=[None, 0.1 + 0.2], images=3)
        for metrics in (found, replace(found, operating_point=point)):
            assert CocoMetrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    usual = evaluate_coco(document, rows, max_detections=50)
    assert (usual.max_detections, usual.map_at_max, usual.best_map) == (None, None, usual.map)
    assert "map_at_max" not in usual.to_dict()


def test_the_most_crowded_image_is_found() -> None:
    document = truth(
        *({"bbox": box} for box in grid(150)), {"bbox": A, "category_id": 1}, images=range(3), categories=range(2)
    )
    assert GroundTruth.of(document).most_of_a_class() == 150
    document["annotations"][0]["iscrowd"] = 1
    assert GroundTruth.of(document).most_of_a_class() == 149
    assert GroundTruth.of(truth()).most_of_a_class() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_object_that_is_not_finite_is_found_by_nothing(backend: Any, value: float) -> None:
    document = truth({"bbox": A}, {"bbox": [value, 30, 40, 40]}, {"bbox": [20, 30, 40, 40], "area": value})
    found = evaluate_coco(document, [row(A), row(A, 0.8), row(A, 0.7)], backend=backend)
    assert found.map == pytest.approx(100 * 67 / 101)  # two of three objects


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": float("nan")}, "detection 1 (image 0): score is nan"),
        ({"score": float("-inf")}, "detection 1 (image 0): score is -inf"),
        ({"bbox": [1, 2, float("inf"), 4]}, "detection 1 (image 0): bbox is [1.0, 2.0, inf, 4.0]"),
        ({"bbox": [1, 2, 3]}, "detection 1: bbox must be four numbers [x, y, w, h], found [1, 2, 3]"),
        ({"bbox": [1, 2, 3, "wide"]}, "detection 1: could not convert string to float: 'wide'"),
        ({"image_id": "0"}, "detection 1: image_id must be an integer of 64 bits, found '0'"),
        ({"category_id": 2**70}, f"detection 1: category_id must be an integer of 64 bits, found {2**70}"),
        ({"image_id": -3}, "detection 1: image_id -3 is not in the annotations"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_scored_is_named(backend: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        evaluate_coco(truth({"bbox": A}), [row(A), {**row(B), **change}], backend=backend)
    assert "\n" not in str(error.value)


def test_a_row_without_a_field_and_an_id_beyond_64_bits() -> None:
    with pytest.raises(UserError, match="detection 0: score is missing"):
        evaluate_coco(truth({"bbox": A}), [{key: value for key, value in row(A).items() if key != "score"}])
    with pytest.raises(UserError, match="categories: id 1267650600228229401496703205376 does not fit 64 bits"):
        evaluate_coco({**truth(), "categories": [{"id": 2**100, "name": "c"}]}, [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_keep_their_output_and_their_figures(backend: Any) -> None:
    """What is printed meanwhile reaches the stream, and that is the same one afterwards."""
    document, rows = truth(*({"bbox": box} for box in grid(20))), [row(box) for box in grid(20)]
    figures = []

    def work() -> None:
        figures.append(evaluate_coco(document, rows, backend=backend).map)
        print("x")

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sys.stdout is stream
    assert sorted(stream.getvalue()) == ["\n"] * 8 + ["x"] * 8
    assert figures == [pytest.approx(100)] * 8


# --- columns ---------------------------------------------------------------------------------------------


def test_columns_and_rows_score_alike() -> None:
    document, rows = random_set(3)
    boxes = np.array([r["bbox"] for r in rows], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    collected = Collected()
    for image in (4, 0, 9):
        here = np.array([r["image_id"] == image for r in rows])
        labels = np.array([r["category_id"] for r in rows])[here]
        scores = np.array([r["score"] for r in rows])[here].astype(np.float32)
        found = Detections(boxes[here], scores, labels, ("a", "b"), (0, 1))
        collected.add(image, found)
        assert collected[image] == found
    assert list(collected) == [4, 0, 9]
    assert evaluate_coco(document, collected.table()).to_dict() == evaluate_coco(document, rows).to_dict()
    joined = DetectionTable.join(found.to_table(image) for image, found in collected.items())
    assert evaluate_coco(GroundTruth.of(document), joined).to_dict() == evaluate_coco(document, rows).to_dict()
    assert len(DetectionTable.join([])) == 0 and len(Collected().table()) == 0


def test_memory_grows_with_detections_and_not_with_images_times_classes() -> None:
    """tracemalloc counts what NumPy holds. Before, a picture took 120 kB, and a pair of image and class 1 kB."""
    rng = np.random.default_rng(0)
    images = 655  # 65,500 rows: just below a power of two, to which the columns grow
    document = truth({"bbox": A}, images=range(images), categories=range(3))
    found = Detections(
        rng.uniform(0, 50, (100, 4)).astype(np.float32), rng.random(100).astype(np.float32), rng.integers(0, 3, 100),
        ("a", "b", "c"), (0, 1, 2),
    )  # fmt: skip

    def everything(labels: GroundTruth, table: DetectionTable) -> None:
        """What `validate` asks of the detections of a file."""
        evaluate_coco(labels, table)
        detection_ece(labels, table)
        score_curves(labels, table, (0, 1, 2))
        analyse(labels, table, image_slices(labels, document["images"]))

    everything(GroundTruth.of(document), DetectionTable.from_rows([row(A)]))  # what NumPy imports on the way
    tracemalloc.start()
    try:
        collected = Collected()
        for image in range(images):
            collected.add(image, found)
        columns = GroundTruth.of(document)
        everything(columns, collected.table())
        dense = tracemalloc.get_traced_memory()[1]
        del collected, columns
        tracemalloc.reset_peak()
        document = truth({"bbox": A}, images=range(1000), categories=range(300))
        start = tracemalloc.get_traced_memory()[0]
        evaluate_coco(document, [row(A, image=n, category=n % 300) for n in range(1000)])
        sparse = tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()
    assert dense / images < 12e3
    assert sparse < 30e6  # 10 MB of it are the curves of 300 classes
