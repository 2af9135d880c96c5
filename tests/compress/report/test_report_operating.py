"""Section "Operating point" of the page: the point in words, two charts, and what the pictures show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.report import build_report
from compress.report.operating import MOST_FILES, operating_section
from compress.report.reading import parse_report
from deploy.core.detection_table import DetectionTable
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import score_curves
from tests.helpers.coco_sets import grid, row, truth
from tests.helpers.report_pages import Page, full_report, write_run


def measured(files: int) -> dict[str, Any]:
    """Two of three objects are found before the first mistake, and the third never: F1 4/5 at a score of 0.35."""
    boxes = grid(9)
    found = [row(boxes[0], 0.352), row(boxes[1], 0.351), row(boxes[5], 0.2), row(boxes[6], 0.1)]
    document = truth(*({"bbox": box} for box in boxes[:3]))
    curves = score_curves(GroundTruth.of(document), DetectionTable.from_rows(found), [0])
    point = curves.point()
    assert point is not None
    report = full_report()
    one = {**report["artifacts"][0], "operating_point": point.model_dump(mode="json")}
    one["analysis"] = {"curve": curves.of_all.samples()}
    report["artifacts"] = [{**one, "file": f"<file {n}>"} for n in range(files)] + report["artifacts"][1:]
    report["models"]["student"]["operating_point"] = one["operating_point"]
    return report


def test_the_point_and_the_curves_are_shown(tmp_path: Path) -> None:
    report = measured(MOST_FILES + 1)
    html = build_report(write_run(tmp_path, report)).read_text(encoding="utf-8")
    page = Page(html)
    assert "<file 0>: best F1 0.800 at a score of 0.35 (precision 1.000, recall 0.667), on 1 image." in page.text
    assert 'href="#operating"' in html and "<file" not in html
    section = operating_section(parse_report(report))
    assert section is not None and len(section.rows) == len(section.key) + 1 == MOST_FILES + 1
    assert section.rows[0] == ("<file 0>", ["0.35", "0.800", "1.000", "0.667"])
    for chart, x, y in ((section.precision, 2 / 3, 1.0), (section.f1, 0.35, 0.8)):
        assert chart in html and chart.count("<polyline") == 2 * len(section.key)
        (left, top), (right, bottom) = _ends(chart)
        spot = re.search(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
        assert spot is not None
        place = float(spot[1]) - left, bottom - float(spot[2])
        assert abs(place[0] - x * (right - left)) < 1 and abs(place[1] - y * (bottom - top)) < 1


def test_pictures_begin_at_the_point_of_each_model(tmp_path: Path) -> None:
    plain, report = full_report(), measured(1)
    assert "Detections with a score of at least 0.3. Found:" in Page(_built(tmp_path, plain)).text
    text = Page(_built(tmp_path, report)).text
    assert "from the score of each model's best F1 on: teacher 0.3, baseline 0.3, student 0.35. Found:" in text


def test_without_a_point_there_is_no_section(tmp_path: Path) -> None:
    assert operating_section(parse_report(full_report())) is None
    assert 'id="operating"' not in _built(tmp_path, full_report())


def _built(folder: Path, report: dict[str, Any]) -> str:
    return build_report(write_run(folder, report)).read_text(encoding="utf-8")


def _ends(chart: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where x is 0 and y is 1, and where x is 1 and y is 0, from the axes' own numbers."""
    ticks = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([\d.]+)</text>', chart)
    across = {float(value): float(x) for x, _, anchor, value in ticks if anchor == "middle"}
    up = {float(value): float(y) - 4 for _, y, anchor, value in ticks if anchor == "end"}
    return (across[0], up[0] - (up[0] - up[max(up)]) / max(up)), (across[1], up[0])
