"""Section "Errors" of the page: what validation found, as a person reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.report import build_report
from compress.report.errors import MOST_CLASSES, errors_section
from compress.report.reading import parse_report
from deploy.core.detection_table import DetectionTable
from deploy.validate.analysis import analyse, image_slices
from deploy.validate.coco import evaluate_coco
from deploy.validate.ground_truth import GroundTruth
from tests.helpers.coco_sets import A, B, C, row, truth
from tests.helpers.report_pages import HOSTILE, Page, full_report, write_run


def looked_at(classes: int = 2) -> dict[str, Any]:
    """A row of report.json with what validation says: `disc` is found, the other class taken for it and missed."""
    names = ["disc", HOSTILE, *(f"class {n}" for n in range(2, classes))]
    boxes = [{"bbox": A}, {"bbox": B, "category_id": 1}, {"bbox": C, "category_id": 1, "image_id": 1}]
    rest = ({"bbox": [300, 9 * n, 8, 8], "category_id": n} for n in range(2, classes))
    document = truth(*boxes, *rest, images=range(2), categories=range(classes))
    for entry, name in zip(document["categories"], names, strict=True):
        entry["name"] = name
    document["images"][1]["slice"] = "<night>"
    rows = [row(A), row(B, 0.8), *(row([300, 9 * n, 8, 8], 0.9, category=n) for n in range(2, classes))]
    labels, table = GroundTruth.of(document), DetectionTable.from_rows(rows)
    found = analyse(labels, table, image_slices(labels, document["images"])).to_dict()
    metrics = evaluate_coco(document, rows).to_dict()
    sizes = {key: metrics[key] for key in ("map", "map_small", "map_medium", "map_large")}
    return {**full_report()["artifacts"][0], **sizes, "analysis": json.loads(json.dumps(found))}


def test_errors_slices_and_confused_classes_are_shown(tmp_path: Path) -> None:
    report = {**full_report(), "artifacts": [looked_at(), {"file": "student.engine", "gate": "not run: no GPU"}]}
    html = build_report(write_run(tmp_path, report)).read_text(encoding="utf-8")
    page = Page(html)
    for text in ("right box (IoU 0.5 or more), wrong class", "<night>", "mAP by size, shape and slice", HOSTILE):
        assert text in page.text, text
    assert 'href="#errors"' in html and "<night>" not in html
    section = errors_section(parse_report(report))
    assert section is not None and [file for file, _ in section.costs] == ["student.onnx"]
    (_, costs), (_, maps) = section.costs[0], section.maps[0]
    kinds = [kind for kind, _ in section.kinds]
    shown = {kind: cell for kind, cell in zip(kinds, costs, strict=True) if cell != ("0.0", "0")}
    # mended, half of the second class is found: 51 of 101 recalls, in one of two classes
    assert shown == {"Classification": ("25.2", "1"), "Missed": ("0.0", "1")}
    assert section.columns[4:] == [
        ("Wide", "0 objects"), ("Square", "3 objects"), ("Tall", "1 object"),
        ("0 to 4 objects", "2 images"), ("<night>", "1 image"),
    ]  # fmt: skip
    assert len(maps) == len(section.columns) and maps[4:6] == ["–", "50.0"] and maps[8] == "0.0"
    assert section.matrix is not None and section.matrix.columns == ["disc", HOSTILE, "not found"]
    counts = [(name, [text for text, _ in cells]) for name, cells in section.matrix.rows]
    assert counts == [("disc", ["1", "·", "·"]), (HOSTILE, ["1", "·", "1"]), ("no object", ["·", "·", ""])]


def test_files_that_lose_recall_are_shown_with_the_classes(tmp_path: Path) -> None:
    student = {**looked_at(), "file": "student.safetensors", "recall": {"disc": 0.8, HOSTILE: 0.5, "never seen": None}}
    fp32 = {**looked_at(), "recall": {"disc": 0.8, HOSTILE: 0.5, "never seen": None}}
    int8 = {**fp32, "file": "student.int8.onnx", "recall": {"disc": 0.85, HOSTILE: 0.375, "never seen": None}}
    report = {**full_report(), "artifacts": [student, fp32, int8], "recall_score": 0.27}
    section = errors_section(parse_report(report))
    assert section is not None and section.recall is not None
    assert section.recall.files == ["student.onnx", "student.int8.onnx"]
    assert section.recall.rows == [(HOSTILE, "50.0", [("0.0", ""), ("−12.5", "bad")])]
    text = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8")).text
    assert "a score of at least 0.27, the student's operating point" in text and "−12.5" in text
    report["artifacts"] = [student, fp32]
    assert "No file loses any." in Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8")).text


def test_of_many_classes_the_confused_pairs_are_named(tmp_path: Path) -> None:
    report = {**full_report(), "artifacts": [looked_at(MOST_CLASSES + 1)]}
    section = errors_section(parse_report(report))
    assert section is not None and section.matrix is None
    (pair,) = section.pairs
    assert (pair.object, pair.found, pair.count, pair.share) == (HOSTILE, "disc", 1, "50.0 %")
    page = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8"))
    assert "Found as" in page.text and "50.0 %" in page.text


def test_a_report_of_files_that_were_not_looked_at_has_no_such_section(tmp_path: Path) -> None:
    """Those of older versions."""
    page = build_report(write_run(tmp_path, full_report())).read_text(encoding="utf-8")
    assert 'id="errors"' not in page and "#errors" not in page.replace("#errors h3", "")
