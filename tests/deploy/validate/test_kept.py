"""What was found on labelled images, kept and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError
from deploy.validate.coco import evaluate_coco
from deploy.validate.kept import Kept, detections_file, keep_detections, keep_labels
from tests.helpers.coco_sets import varied_set


def test_kept_labels_and_detections_have_the_same_map(tmp_path: Path) -> None:
    document, rows = varied_set(0)
    table = DetectionTable.from_rows(rows)
    table = replace(table, boxes=table.boxes.astype(np.float32), scores=table.scores.astype(np.float32))
    document["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    keep_labels(tmp_path, document, tmp_path / "images")
    keep_detections(tmp_path, "student.onnx (cpu)", table)
    kept = Kept(tmp_path)
    assert kept and "student.onnx (cpu)" in kept and "teacher" not in kept
    found = evaluate_coco(kept.content, kept.table("student.onnx (cpu)"))
    assert found.to_dict() == evaluate_coco(document, table).to_dict() and found.map > 5
    assert kept.path(11) == tmp_path / "images" / "1.jpg" and "segmentation" not in kept.content["annotations"][0]
    np.testing.assert_array_equal(kept.table("student.onnx (cpu)").image_ids, table.image_ids)

    keep_labels(tmp_path / "elsewhere", document, tmp_path)
    assert Kept(tmp_path / "elsewhere").identity == kept.identity, "wherever the images lie"
    document["annotations"][0]["bbox"][0] += 1
    keep_labels(tmp_path / "other", document, tmp_path)
    assert Kept(tmp_path / "other").identity != kept.identity


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert not Kept(tmp_path)
    detections_file(tmp_path, "student").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"student\.npz: cannot be read"):
        Kept(tmp_path).table("student")
