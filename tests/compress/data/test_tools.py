"""Exports of labelling tools become COCO files that are fit for training, with the boxes that were drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compress.data.check import check
from compress.data.convert.coco import coco_documents, read_coco
from compress.data.convert.coco_file import documents, write_documents
from compress.data.convert.voc import read_voc
from compress.data.convert.yolo import read_yolo
from tests.helpers.label_files import boxes_by_name, picture
from tests.helpers.tool_labels import EXPORTS


@pytest.mark.parametrize("tool", EXPORTS)
def test_exports_of_tools(tool: str, tmp_path: Path) -> None:
    export = EXPORTS[tool]
    source, out = export.write(tmp_path / "set"), tmp_path / "out.json"
    if export.layout == "coco":
        files = coco_documents(read_coco(source), out)
    else:
        files = documents(read_yolo(source) if export.layout == "yolo" else read_voc(source), out)
    (made,) = write_documents(files)
    found = {Path(name).as_posix(): boxes for name, boxes in boxes_by_name(out).items()}
    assert set(found) == {export.a, export.b} - {""} and found.get(export.b, []) == []
    (cat, cat_box, _), (dog, dog_box, _) = found[export.a]
    assert (cat, dog) == ("cat", "dog")
    assert cat_box == pytest.approx([0, 0, 64, 48], abs=0.002)
    assert dog_box == pytest.approx([8, 6, 16 if export.whole else 16.5, 24], abs=0.002)
    assert [str(p) for p in check(out, made.image_folder).problems if p.level == "error"] == []


@pytest.mark.parametrize("tool", [tool for tool, made in EXPORTS.items() if "val" in made.b or tool == "datumaro voc"])
def test_sets_of_tools(tool: str, tmp_path: Path) -> None:
    export = EXPORTS[tool]
    source, out = export.write(tmp_path / "set"), tmp_path / "made"
    if export.layout == "coco":
        files = coco_documents(read_coco(source), out)
    else:
        files = documents(read_yolo(source) if export.layout == "yolo" else read_voc(source), out)
    made = write_documents(files, allow_empty=True)
    assert [(file.out.name, file.images, file.annotations) for file in made] == [
        ("train.json", 1, 2),
        ("val.json", 1, 0),
    ]
    assert list(boxes_by_name(made[0].out)) == [export.a] and list(boxes_by_name(made[1].out)) == [export.b]


def test_names_of_servers_and_windows(tmp_path: Path) -> None:
    names = ["/data/local-files/?d=a.png", "/data/upload/3/b%20c.png", "images\\d.png", "x/e.png", "y/e.png"]
    for name in ("a.png", "b c.png", "images/d.png", "x/e.png", "y/e.png"):
        picture(tmp_path / name)
    rows = [{"id": n, "file_name": name, "width": 80, "height": 60} for n, name in enumerate(names)]
    (tmp_path / "set.json").write_text(json.dumps({"images": rows, "annotations": [], "categories": []}))
    found = read_coco(tmp_path / "set.json").splits[""]["images"]
    assert [row["file_name"] for row in found] == ["a.png", "b c.png", "images/d.png", "x/e.png", "y/e.png"]


def test_categories_without_boxes_can_be_dropped(tmp_path: Path) -> None:
    root = '"categories": [{"id": 0, "name": "all"}, '
    files = {name: text.replace('"categories": [', root) for name, text in EXPORTS["roboflow coco"].files.items()}
    source = replace(EXPORTS["roboflow coco"], files=files).write(tmp_path / "set")
    assert len(read_coco(source).splits["train"]["categories"]) == 3
    found = read_coco(source, drop_unused=True)
    for content in found.splits.values():
        assert [row["name"] for row in content["categories"]] == ["cat", "dog"]
    assert "1 categories without boxes are left out: all" in found.notes
