"""Which pictures are shown, and why; the colours of their classes; what the page can filter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from compress.report import build_report
from compress.report.document import Box, Report
from compress.report.gallery import KINDS, choose
from compress.report.pictures import FULL_SIZE, LONGEST_SIDE, Photos, class_kinds
from deploy.core.draw import COLORS
from deploy.core.errors import UserError
from deploy.validate.kept import Kept
from tests.helpers.kept_run import FILES, IMAGES, SHOWN, keep_run
from tests.helpers.report_pages import Page, full_report, write_run


def test_each_picture_is_there_for_a_reason(tmp_path: Path) -> None:
    found = choose(keep_run(tmp_path), SHOWN, FILES, 5)
    assert {entry["id"]: (entry["kind"], entry["why"]) for entry in found} == {
        0: ("worst", "Among the worst: 0 of 2 objects found, 1 extra"),
        2: ("best", "Among the best: 2 of 2 objects found, 0 extra"),
        4: ("teacher", "Teacher and student differ: 1 box that only one of them has"),
        5: ("file", "student.int8.onnx and the student differ: 1 box that only one of them has"),
        1: ("sample", "A sample: taken at even steps, whatever was found"),
    }
    assert [entry["kind"] for entry in found] == list(KINDS)
    worst, file = found[0], found[3]
    assert worst["ground_truth"] == [
        {"box": [20, 30, 60, 70], "label": "class 0"}, {"box": [200, 30, 240, 70], "label": "class 0"},
    ]  # fmt: skip
    assert worst["student"] == [{"box": [20, 200, 60, 260], "label": "class 0", "score": 0.7}]
    assert len(file["teacher"]) == 1, "at its own operating point"
    assert [box["score"] for box in file["files"]["student.int8.onnx"]] == [0.9, 0.6]


def test_as_many_as_asked_for_and_each_image_once(tmp_path: Path) -> None:
    kept = keep_run(tmp_path)
    for many in (1, 3, IMAGES, 100):
        ids = [entry["id"] for entry in choose(kept, SHOWN, FILES, many)]
        assert len(ids) == len(set(ids)) == min(many, IMAGES)
    assert choose(Kept(tmp_path / "nothing"), SHOWN, FILES, 5) == []


def test_the_page_shows_reasons_and_can_be_asked_for_more(tmp_path: Path) -> None:
    keep_run(tmp_path)
    report: dict[str, Any] = {**full_report(), "pictures": [], "classes": ["class 0", "class 1"]}
    report["artifacts"] = [{"file": file, "gate": "pass"} for file in FILES]
    html = build_report(write_run(tmp_path, report), 6).read_text(encoding="utf-8")
    page = Page(html)
    assert "Among the worst: 0 of 2 objects found, 1 extra." in page.text and html.count('class="card shot is-') == 6
    for kind in ("all", *KINDS):
        assert f'<input type="radio" name="why" id="why-{kind}"' in html
        assert kind == "all" or f"#pictures:has(#why-{kind}:checked) .shot:not(.is-{kind})" in html
    assert "script" not in page.tags and page.text.count("student.int8.onnx1 of 1 found, 1 extra") == 1
    html = build_report(tmp_path).read_text(encoding="utf-8")
    assert "No pictures were recorded." in html, "those of report.json"
    for many in (0, 201):
        with pytest.raises(UserError, match=rf"--pictures: from 1 to 200, got {many}"):
            build_report(tmp_path, many)
    for file in (tmp_path / "evaluation").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="holds no evaluation/ to choose from; run its recipe again"):
        build_report(tmp_path, 5)


def test_a_class_has_one_colour_that_of_its_label_everywhere() -> None:
    names = [f"class {n}" for n in range(len(COLORS) + 2)]
    report = Report.model_validate({"name": "a", "models": {}, "classes": names})

    def kinds(*labels: str | int) -> dict[str, str]:
        return class_kinds([Box(box=(0, 0, 1, 1), label=label) for label in labels], report)

    assert kinds("class 3") == {"class 3": "k3"} and kinds(3, "class 1") == {"class 1": "k1", "class 3": "k3"}
    assert kinds(names[-1]) == {names[-1]: "k1"} and kinds("b", "a") == {"a": "k2", "b": "k3"}
    page = (Path(__file__).parents[3] / "deploy/serve/page/view.js").read_text(encoding="utf-8")
    listed = re.search(r"const COLOURS = \[(.*?)\]", page, re.DOTALL)
    assert listed is not None and re.findall(r'"(#\w+)"', listed[1]) == list(COLORS), "the server's page"


def test_many_pictures_are_smaller(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((1280, 960)).convert("RGB").save(tmp_path / "a.png")
    sizes = []
    for many in (1, FULL_SIZE, 4 * FULL_SIZE):
        photos = Photos(tmp_path, many)
        assert photos.size("a.png") == (1280, 960)
        sizes.append(photos._longest)
    assert sizes == [LONGEST_SIDE, LONGEST_SIDE, LONGEST_SIDE // 2]
