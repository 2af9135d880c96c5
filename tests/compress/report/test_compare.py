"""Runs side by side: differences with intervals where they may be compared, and a reason where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress import cli
from compress.report.compare import comparison
from compress.report.reading import read_document
from deploy.core.detection_table import DetectionTable
from deploy.validate.coco import evaluate_coco
from deploy.validate.kept import keep_detections, keep_labels
from tests.helpers.coco_sets import varied_set
from tests.helpers.report_pages import HOSTILE, Page, full_report, write_run

CPU = {"cpu": {"model": "A & B", "load_average": [1.0]}, "gpus": None, "packages": {"torch": "2.0"}}


def run(folder: Path, name: str, share: int = 1, **changes: Any) -> Path:
    """A run whose student finds every `share`-th of what there is to find on the same images."""
    folder.mkdir()
    document, rows = varied_set(0, images=30)
    document["categories"].sort(key=lambda entry: entry["id"])
    keep_labels(folder / "evaluation", document, folder)
    table = DetectionTable.from_rows(rows[::share])
    keep_detections(folder / "evaluation", "student", table)
    found = evaluate_coco(document, table)
    report = {**full_report(), "name": name, "classes": list(found.per_class), "environment": CPU, "pictures": []}
    report["models"]["student"] = {"map": found.map, "per_class": {k: v for k, v in found.per_class.items() if v == v}}
    (folder / "recipe.yaml").write_text(f"name: {name}\nseed: 0\ntrain: {{steps: {100 * share}}}\nruns: {folder}\n")
    return write_run(folder, json.loads(json.dumps({**report, **changes})))


def test_two_runs_on_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run(tmp_path / "a", "first", 6), run(tmp_path / "b", "second <b>")
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(one), str(two), "--out", str(out)])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    found = comparison([read_document(one), read_document(two)])
    maps = [json.loads((folder / "report.json").read_text())["models"]["student"]["map"] for folder in (one, two)]
    line = f"The student of second <b> has {maps[1]:.1f} mAP, that of first {maps[0]:.1f}: +{maps[1] - maps[0]:.1f} (95"
    assert found.lines[0].startswith(line) and found.lines[0] in said and found.lines[0] in page.text
    assert "noise" not in found.lines[0] and not found.warnings and "<b>" not in html and f"comparison: {out}" in said
    rows = dict(found.models)
    assert rows["Student's mAP against first"][1].tone == "good" and rows["Student, mAP"][0].text == f"{maps[0]:.1f}"
    assert found.recipes == [("train.steps", found.recipes[0][1])]
    assert [cell.text for cell in found.recipes[0][1]] == ["600", "100"] and found.machines == []
    assert len(found.classes) == 3 and all(cells[1].small for _, cells in found.classes)
    lead = [abs(float(cells[1].text) - float(cells[0].text)) for _, cells in found.classes]
    assert lead == sorted(lead, reverse=True), "what differs most first"
    titles = [title for title, _ in found.files]
    assert titles == ["mAP", "Median latency, ms", "Size, MB", "Gate"]
    assert page.loads == [f"#{part}" for part in ("models", "classes", "files", "recipes", "machines")]


def test_equal_students_differ_by_noise(tmp_path: Path) -> None:
    documents = [read_document(run(tmp_path / name, "same name")) for name in "ab"]
    found = comparison(documents)
    assert found.names == [str(tmp_path / "a"), str(tmp_path / "b")], "folders where names are equal"
    assert "0.0 (95" in found.lines[0] and found.lines[0].endswith("interval 0.0 to 0.0, cannot be told from noise).")


def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    first = read_document(run(tmp_path / "a", "first"))
    classes = run(tmp_path / "b", "classes", classes=["class 3", HOSTILE])
    older = run(tmp_path / "c", "older")
    (older / "evaluation" / "student.npz").unlink()
    moved = run(tmp_path / "d", "moved", environment={**CPU, "cpu": {"model": "C"}})
    labels = json.loads((moved / "evaluation" / "labels.json").read_text())
    labels["annotations"][0]["bbox"][2] += 1
    (moved / "evaluation" / "labels.json").write_text(json.dumps(labels))
    fewer = run(tmp_path / "e", "fewer")
    labels["images"] = labels["images"][:20]
    (fewer / "evaluation" / "labels.json").write_text(json.dumps(labels))
    found = comparison([first, *map(read_document, (classes, older, moved, fewer))])
    start = "first and {} cannot be compared by mAP: "
    assert found.warnings[:4] == [
        start.format("classes") + "their classes differ (4 and 2).",
        start.format("older") + "older kept no detections (evaluation/); run its recipe again.",
        start.format("moved") + "the labels of their validation images differ.",
        start.format("fewer") + "other validation images (30 and 20, 20 names in common).",
    ]
    assert found.warnings[4] == "Latencies of first and moved are of different machines and cannot be compared."
    assert all(line.endswith(".") and "interval" not in line for line in found.lines)
    assert [key for key, _ in found.machines] == ["cpu.model"]


def test_doubtful_latencies_are_marked_and_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = full_report()["artifacts"]
    report[0]["latency_doubts"] = ["not stable"]
    documents = [read_document(run(tmp_path / "a", "a", artifacts=report)), read_document(run(tmp_path / "b", "b"))]
    found = comparison(documents)
    latencies = dict(dict(found.files)["Median latency, ms"])
    assert [cell.text for cell in latencies["student.onnx"]] == ["12.5 ?", "12.5"]
    assert found.warnings == ["Latencies with ? were not measured well (a)."]
    for arguments, words in (
        (["report", str(tmp_path / "a"), str(tmp_path / "b"), "--pictures", "3"], "--pictures: belongs to the report"),
        (["report", str(tmp_path / "a"), "--out", "x.html"], "--out: belongs to a comparison"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
