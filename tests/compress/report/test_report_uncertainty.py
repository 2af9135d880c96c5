"""The report's uncertainty maps and the charts of several lines: right colours, right place, said when absent."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from compress.data.batch import collate
from compress.data.coco import CocoDetection
from compress.data.synthetic import generate
from compress.data.transforms import eval_transform
from compress.detectors.backbones import build_backbone
from compress.detectors.gfl import GFL
from compress.distill.uncertainty import predictive_uncertainty
from compress.report import build_report
from compress.report.charts import round_ticks
from compress.report.curves import _method_charts
from compress.report.document import Report
from compress.report.heat import FLAT, MOST_OPAQUE, RAMP, _colour, _legend
from compress.run.samples import uncertainty_pictures
from deploy.core.errors import UserError
from tests.helpers.report_pages import HOSTILE, Page, full_report, write_run

ENTRY = {
    "image": "photo.png",
    "samples": 10,
    "rate": 0.15,
    "teacher": [
        {"box": [8, 8, 40, 40], "label": 1, "score": 0.9},
    ],
    "stride": [16, 8],
    "rows": ["0.0 0.0 0.0 0.0"] * 4 + ["0.0 0.0 0.2 0.0", "0.0 0.0 0.0 0.0"],
    "variance": {"P3": 1.25, "P4": None},
}


def run_with(folder: Path, *entries: dict[str, Any]) -> Path:
    Image.new("RGB", (64, 48), (90, 110, 120)).save(folder / "photo.png")
    return write_run(folder, {**full_report(), "pictures": [], "uncertainty": list(entries)})


def heat_of(html: str) -> tuple[Image.Image, list[float]]:
    """The drawn overlay and its x, y, width, height."""
    found = re.search(
        r'<image href="data:image/png;base64,([^"]+)" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', html
    )
    assert found is not None
    image = Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGBA")
    return image, [float(value) for value in found.groups()[1:]]


def test_the_section_shows_picture_detections_and_heat(tmp_path: Path) -> None:
    html = build_report(run_with(tmp_path, ENTRY)).read_text("utf-8")
    page = Page(html)
    for text in (
        "Where the teacher is uncertain",
        "10 samples at dropout rate 0.15",
        "1 detection",
        "largest 0.200, mean 0.008",
        "P3 1.25, P4 not measured",
    ):
        assert text in page.text, text
    assert HOSTILE in page.text and "<b>&#34;" not in html
    assert "photo.png, standard deviation of the teacher&#39;s best class score: largest 0.200, mean 0.008" in html
    assert "the largest at x 32, y 32" in html  # column 2 of 16 px, row 4 of 8 px
    assert "standard deviation 0 to 0.2" in html  # the legend's numbers
    assert html.count("data:image/jpeg;base64,") == 1
    assert {load[1:] for load in page.loads if load.startswith("#")} <= set(re.findall(r'id="([^"]+)"', html))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(re.findall(r'id="([^"]+)"', html))


def test_the_heat_lies_where_the_value_is(tmp_path: Path) -> None:
    image, (x, y, width, height) = heat_of(build_report(run_with(tmp_path, ENTRY)).read_text("utf-8"))
    assert (x, y) == (-8, -4) and x + width >= 64 and y + height >= 48  # covers the picture
    pixels = {(i, j): image.getpixel((i, j)) for i in range(image.width) for j in range(image.height)}
    peak = max(pixels, key=lambda place: (pixels[place][3], sum(pixels[place][:3])))  # type: ignore[index, misc]
    centre = [x + (peak[0] + 0.5) * width / image.width, y + (peak[1] + 0.5) * height / image.height]
    assert abs(centre[0] - 32) <= 8 and abs(centre[1] - 32) <= 4
    assert pixels[0, 0][3] == 0  # type: ignore[index]


def test_one_scale_for_all_pictures(tmp_path: Path) -> None:
    faint = {**ENTRY, "rows": ["0.02 0.02", "0.02 0.02"]}
    html = build_report(run_with(tmp_path, faint, ENTRY)).read_text("utf-8")
    image, _ = heat_of(html)
    wanted = _colour(round(255 * 0.1) / 255)
    assert image.getpixel((0, 0)) == (*wanted[0], round(255 * wanted[1]))
    assert html.count("data:image/jpeg;base64,") == 1  # the photograph is embedded once for both


def test_no_difference_at_all_is_drawn_as_none(tmp_path: Path) -> None:
    image, _ = heat_of(build_report(run_with(tmp_path, {**ENTRY, "rows": ["0 0", "0 0"]})).read_text("utf-8"))
    assert image.getextrema()[3] == (0, 0)


@pytest.mark.parametrize("maps", [{}, {"uncertainty": []}])
def test_reports_without_maps_still_render(tmp_path: Path, maps: dict[str, Any]) -> None:
    page = Page(build_report(write_run(tmp_path, {**full_report(), **maps})).read_text("utf-8"))
    assert "No uncertainty maps were recorded" in page.text and "Monte Carlo" not in page.text


def test_a_lost_picture_is_said(tmp_path: Path) -> None:
    html = build_report(run_with(tmp_path, {**ENTRY, "image": "gone.png"})).read_text("utf-8")
    assert "The image gone.png was not found" in Page(html).text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": ["0.1 0.2", "0.1"]}, "uncertainty.0.rows: Value error, row 1 has 1 values, row 0 has 2"),
        ({"rows": ["0.1 high"]}, "row 0 is not numbers"),
        ({"rows": ["0.1 nan"]}, "row 0 holds a value that is not a standard deviation"),
        ({"rows": ["0.1 -1"]}, "row 0 holds a value that is not a standard deviation"),
        ({"rows": []}, "uncertainty.0.rows"),
        ({"rows": [""]}, "row 0 has 0 values"),
        ({"stride": [0, 8]}, "uncertainty.0.stride.0"),
    ],
)
def test_a_map_that_is_none_is_one_line(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        build_report(run_with(tmp_path, {**ENTRY, **change}))


def test_the_ramp_rises_evenly_in_lightness() -> None:
    """CIE L* of the colours, from their definition."""

    def lightness(rgb: tuple[int, int, int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return float(116 * y ** (1 / 3) - 16)

    steps = [b - a for a, b in itertools.pairwise(lightness(rgb) for rgb in RAMP)]
    assert min(steps) > 10 and max(steps) < 20
    fine = [lightness(_colour(i / 100)[0]) for i in range(101)]
    assert all(b >= a - 0.5 for a, b in itertools.pairwise(fine))
    alphas = [_colour(i / 100)[1] for i in range(101)]
    assert alphas[0] == 0 and alphas[-1] == MOST_OPAQUE and alphas == sorted(alphas)


def test_entries_are_the_teachers_maps_in_pixels_of_the_files(tmp_path: Path) -> None:
    generate(tmp_path, train=1, val=6, size=64, classes=3, seed=0)
    val = CocoDetection(tmp_path / "val.json", tmp_path / "images", eval_transform(80, 80))  # padded to 96
    torch.manual_seed(0)
    teacher = GFL(3, build_backbone("nano", weights="none"), neck_channels=32, head_depth=0).eval()
    torch.nn.init.normal_(teacher.head.gfl_cls.weight, std=0.2)
    seen = []
    pictures = [{"id": val.image_ids[i], "image": str(val.path(i)), "kind": "best"} for i in (3, 0, 2, 1)]
    entries = uncertainty_pictures(val, teacher, 0.3, pictures, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(entries)) for i in range(4)]
    report = Report.model_validate({"name": "a", "models": {}, "uncertainty": json.loads(json.dumps(entries))})
    for entry in report.uncertainty:
        index = next(i for i in range(len(val)) if str(val.path(i)) == entry.image)
        found = predictive_uncertainty(teacher, collate([val[index]]).images)
        assert found.maps.shape == (1, 12, 12)
        torch.testing.assert_close(torch.tensor(entry.values), found.maps[0, :10, :10], rtol=0, atol=5.1e-5)
        assert entry.stride == (6.4, 6.4)  # 8 of the network's pixels
        assert list(entry.variance) == ["P3", "P4", "P5", "P6", "P7"]


def test_method_columns_share_charts() -> None:
    columns = [
        "bckd_cls", "grad_fgd", "grad_bckd", "scale_fgd", "variance_p4_fgd", "variance_p3_fgd", "variance_p3_bckd",
        "grad_detection",
    ]  # fmt: skip
    found = {group.title: group.lines for group in _method_charts(columns)}
    assert found == {
        "Gradient norms": {"detection": "grad_detection", "fgd": "grad_fgd", "bckd": "grad_bckd"},
        "Automatic weights": {"fgd": "scale_fgd"},
        "Teacher's variance: fgd": {"P3": "variance_p3_fgd", "P4": "variance_p4_fgd"},
        "Teacher's variance: bckd": {"P3": "variance_p3_bckd"},
    }
    assert list(found["Gradient norms"]) == ["detection", "fgd", "bckd"]  # the colours follow this order
    assert list(found["Teacher's variance: fgd"]) == ["P3", "P4"]
    assert not _method_charts(["bckd_cls"])


@pytest.mark.parametrize(("small", "logarithmic"), [("0.5", False), ("0.01", True), ("0", False)])
def test_lines_of_one_chart(tmp_path: Path, small: str, logarithmic: bool) -> None:
    (tmp_path / "student").mkdir()
    rows = ["step,loss,grad_detection,grad_fgd,fgd_fg", f"1,3,1,{small},0.5", f"2,2,2,{small},0.4"]
    (tmp_path / "student" / "metrics.csv").write_text("\n".join(rows) + "\n")
    html = build_report(write_run(tmp_path, {})).read_text("utf-8")
    assert "Gradient norms by step: detection ends at 2, fgd ends at " + small in html
    assert html.count('class="line s0" points') == html.count('class="line s1" points') == 1
    assert ("Logarithmic axis" in html) == logarithmic
    assert "Distillation: fgd_fg" in html and "Distillation: grad" not in html


def test_the_numbers_of_the_scale_are_not_cut() -> None:
    for top in (FLAT, 0.08, 0.25, 3):
        scale = _legend(round_ticks(0, top, 4))
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', scale)[1])  # type: ignore[index]
        numbers = re.findall(r'<text x="([\d.]+)"[^>]*>([\d.e-]+)<', scale)
        assert len(numbers) >= 3
        for x, text in numbers:
            half = 6.6 * len(text) / 2  # at 11.5 pixels a digit is at most that wide
            assert half <= float(x) <= width - half, (top, text)
