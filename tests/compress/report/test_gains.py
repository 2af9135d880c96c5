"""Comparisons and recalls of what a run kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.report.gains import compared, recalls
from deploy.core.detection_table import DetectionTable
from deploy.validate.coco import evaluate_coco
from deploy.validate.kept import Kept, keep_detections, keep_labels
from tests.helpers.coco_sets import A, B, C, row, truth, varied_set


def test_models_and_files_that_were_kept_are_compared(tmp_path: Path) -> None:
    document, rows = varied_set(0, images=30)
    keep_labels(tmp_path, document, tmp_path)
    fewer = rows[::6]
    for name, found in {"student": rows, "baseline": fewer, "student.safetensors": rows, "a.onnx": fewer}.items():
        keep_detections(tmp_path, name, DetectionTable.from_rows(found))
    found = compared(Kept(tmp_path), ["a.onnx", "student.safetensors", "b.engine"])
    assert [(entry["of"], entry["against"]) for entry in found] == [
        ("student", "baseline"), ("a.onnx", "student.safetensors"),
    ]  # fmt: skip
    lead = evaluate_coco(document, rows).map - evaluate_coco(document, fewer).map
    assert found[0]["points"] == pytest.approx(lead, abs=1e-3) and 0 < found[0]["low"] < lead < found[0]["high"]
    assert found[1]["high"] == pytest.approx(-found[0]["low"])
    assert compared(Kept(tmp_path / "nothing"), ["a.onnx"]) == []


def test_recall_is_of_what_is_shown(tmp_path: Path) -> None:
    boxes = [{"bbox": A}, {"bbox": B}, {"bbox": C, "category_id": 1}, {"bbox": C, "iscrowd": 1}]
    keep_labels(tmp_path, truth(*boxes, categories=range(3)), tmp_path)
    keep_detections(tmp_path, "a", DetectionTable.from_rows([row(A, 0.75), row(B, 0.25), row(C, 0.5, category=1)]))
    found = recalls(Kept(tmp_path), ["a", "missing"], 0.5)
    assert found == {"a": {"class 0": 0.5, "class 1": 1.0, "class 2": None}}
