"""The report: complete from a full run, honest from a partial one, self-contained, safe with odd names."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from compress.report import build_report, doubt_lines, summary_table
from compress.report.charts import log_ticks, round_ticks, thin
from compress.report.document import Artifact, Box, Figures, Models, Report
from compress.report.headline import first_lines, headline
from compress.report.pictures import count_matches
from compress.report.reading import parse_report
from deploy.core.errors import UserError
from tests.helpers.report_pages import HOSTILE, Page, full_report, pruned_report, write_run


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    Image.new("RGB", (1600, 1200), (90, 110, 120)).save(tmp_path / "photo.png")
    (tmp_path / "recipe.yaml").write_text("name: run\n# <script>alert(1)</script>\n", encoding="utf-8")
    for arm in ("baseline", "student"):
        (tmp_path / arm).mkdir()
        rows = ["step,epoch,seconds,lr,loss,loss_cls,loss_bbox,loss_dfl,bckd_cls,map"]
        rows += [f"{s},0,1,0.01,4,1,{2 - s / 1000},0.5,0.3,{30 if s % 50 == 0 else ''}" for s in range(400)]
        (tmp_path / arm / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return write_run(tmp_path, full_report())


def test_full_report_shows_every_part(full_run: Path) -> None:
    path = build_report(full_run)
    assert path == full_run / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for text in (
        "10.0× fewer parameters and 10.0× fewer operations",
        "45.0 mAP against the teacher's 50.0",
        "3.0 points above the same student trained from the labels alone",
        "Exported as student.onnx, it answers in 12.5 ms",  # not int8: it is faster but failed its gate
        "11 February 2026, 10:24 UTC",
        "1 of 3", "1 failed, 1 not run", "no GPU <here>", "5.25",
        "first step that differs: pixels: <b>turned</b>; differs most in images 7 (turned.png)",
        "Validation mAP", "Detection loss", "Distillation: bckd_cls",
        "1 of 2 found, 0 extra", "0 of 2 found, 0 extra",
        "The image gone.png was not found",
        "no ground truth or not measured",
        "cpu.model", "A & B", "name=<x>", "<script>alert(1)</script>",
    ):  # fmt: skip
        assert text in page.text, text
    assert html.count("data:image/jpeg;base64,") == 1  # one copy, four panels
    assert 'viewBox="0 0 1600 1200"' in html
    assert "No teacher" not in page.text and "No baseline:" not in page.text
    assert "Engines" not in page.text


def test_map_with_more_detections_is_shown_where_it_was_measured(full_run: Path) -> None:
    assert "mAP at" not in build_report(full_run).read_text(encoding="utf-8")
    report = full_report()
    report["models"]["teacher"] |= {"max_detections": 300, "map_at_max": 51.25, "mar_at_max": 60.0}
    report["artifacts"][0] |= {"max_detections": 300, "map_at_max": 46.75}
    page = Page(build_report(write_run(full_run, report)).read_text(encoding="utf-8"))
    assert page.text.count("mAP at 300") == 2  # a row of the models, a column of the files
    assert "51.2" in page.text and "46.8" in page.text


def test_engines_that_could_not_run_show_their_cards(full_run: Path) -> None:
    report = full_report()
    card = {
        "engine": "student.fp16.engine", "build_seconds": 41.6, "layers": None, "layers_missing": "not shown here",
        "machine": {"library": "TensorRT", "version": "10.13.3.9", "gpu": None, "platform": "Linux x86_64"},
        "options": {"batches": [1, 4, 8], "refit": None},
        "network": {"count": 40, "share": {"fp32": 0.05, "fp16": 0.95}},
    }  # fmt: skip
    idle = {"precision": "fp16", "size_mb": 4.25, "gate": "not run: no GPU"}
    report["artifacts"] += [
        {"file": "student.fp16.engine", **idle, "engine": card},
        {
            "file": "student.engine", **idle,
            "engine": {
                **card, "machine": {"library": "TensorRT", "version": "10.13.3.9", "gpu": "NVIDIA L4"},
                "options": {"batches": [2, 2, 2]}, "layers": {"count": 31, "share": {"fp32": 1.0}},
            },
        },
    ]  # fmt: skip
    html = build_report(write_run(full_run, report)).read_text(encoding="utf-8")
    artifacts, engines = (html.split("<h3>Engines</h3>")[part] for part in (0, 1))
    engines = engines.split("</section>")[0]
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", engines)[1:]]
    assert [re.sub(r"\|+", "|", row).strip("|") for row in rows] == [
        "student.fp16.engine|TensorRT 10.13.3.9|none|1 to 8, best at 4|95% fp16, 5% fp32|not shown here|42",
        "student.engine|TensorRT 10.13.3.9|NVIDIA L4|2|95% fp16, 5% fp32|31: 100% fp32|42",
    ]
    row = next(row for row in re.findall(r"<tr>.*?</tr>", artifacts) if ">student.fp16.engine<" in row)
    assert ">TensorRT<" in row and ">not run</span>" in row and ">no GPU</span>" in row and ">4.2<" in row
    console = Console(file=io.StringIO(), width=160)
    console.print(summary_table(report))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("student.fp16.engine" in line and "not run: no GPU" in line for line in lines)


def test_half_precision_says_what_stays_in_float32_and_what_a_cpu_hides(full_run: Path) -> None:
    report = full_report()
    half = {"images": 9, "largest": 12.5, "float32": {"head.cls.0": "its result reaches 9e+04"}}
    report["artifacts"].append({"file": "h.fp16.onnx", "precision": "fp16", "half": half, "note": "not <seen> here"})
    html = build_report(write_run(full_run, report)).read_text(encoding="utf-8")
    row = next(row for row in re.findall(r"<tr>.*?</tr>", html) if ">h.fp16.onnx<" in row)
    assert "in float32: head.cls.0 its result reaches 9e+04" in row and "not &lt;seen&gt; here" in row


def test_page_loads_nothing_from_outside(full_run: Path) -> None:
    html = build_report(full_run).read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads
    assert all(load.startswith(("#", "data:image/jpeg;base64,", "data:image/png;base64,")) for load in page.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html
    ids = set(re.findall(r'id="([^"]+)"', html))
    assert {load[1:] for load in page.loads if load.startswith("#")} <= ids


def test_text_from_files_is_escaped(full_run: Path) -> None:
    html = build_report(full_run).read_text(encoding="utf-8")
    assert "<b>&#34;" not in html and '<b>"cat' not in html
    assert "&lt;b&gt;&#34;cat&#34; &amp; &#39;dog&#39;&lt;/b&gt;" in html
    assert "<i>one" not in html and "<script" not in html and "<here>" not in html
    assert HOSTILE in Page(html).text


def test_minimal_report_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(build_report(write_run(tmp_path, {"models": {"student": {"map": 31.2}}})).read_text("utf-8"))
    for text in (
        tmp_path.name, "The student reaches 31.2 mAP.",
        "No teacher:", "No baseline:", "No artifacts:", "none in this run",
        "Latency was not measured", "No training curves", "AP by class was not recorded",
        "No pictures were recorded", "The environment was not recorded",
        "The commands of this run were not recorded", "holds no recipe.yaml",
    ):  # fmt: skip
        assert text in page.text, text
    assert "points above" not in page.text and "fewer" not in page.text


def test_empty_report_and_unmeasured_figures(tmp_path: Path) -> None:
    page = Page(build_report(write_run(tmp_path, {})).read_text("utf-8"))
    assert "This run has no student figures" in page.text
    artifact = '{"file": "a.onnx", "gate": "pass", "map": 3}'
    text = f'{{"name": "a", "models": {{"student": {{"map": NaN}}}}, "artifacts": [{artifact}]}}'
    (tmp_path / "report.json").write_text(text)
    page = Page(build_report(tmp_path).read_text("utf-8"))
    assert "mAP was not measured" in page.text
    assert "No latency: none of the artifacts was benchmarked" in page.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not found"),
        ("{", "report.json:1: not valid JSON"),
        ("[" * 100_000, "not a report"),
        ("[]", "expected an object"),
        ("{}", "report.json: name: is missing"),
        ('{"name": "a"}', "report.json: models: is missing"),
        ('{"name": "", "models": {}}', "report.json: name: "),
        ('{"name": "a", "models": {"student": {"map": "high"}}}', "models.student.map"),
        ('{"name": "a", "models": {}, "artifacts": [{"file": "a.onnx", "gate": "maybe"}]}', "artifacts.0.gate"),
        ('{"name": "a", "models": {}, "artifacts": [{"gate": "pass"}]}', "artifacts.0.file: is missing"),
        (
            '{"name": "a", "models": {}, "pictures": [{"image": "a", "student": [{"box": [1, 2], "label": 0}]}]}',
            "pictures.0.student.0.box",
        ),
    ],
)
def test_bad_report_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        build_report(tmp_path)
    assert "\n" not in str(error.value) and "report.json" in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [("step,loss\n1,abc\n", "metrics.csv:2: loss: 'abc'"), ("a,b\n1,2\n", "no column 'step'")],
)
def test_bad_metrics_name_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)):
        build_report(write_run(tmp_path, {}))


def test_metrics_with_few_columns_and_a_cut_last_line(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "metrics.csv").write_text("step,loss,map\n1,2.5,\n2,nan,\n2,2.25,\n3")
    html = build_report(write_run(tmp_path, {})).read_text("utf-8")
    assert "Training loss by step: student ends at 2.25" in html  # the row written last for step 2 counts
    assert "Detection loss" not in html and "Validation mAP" not in html


def test_unreadable_picture_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    report = {"pictures": [{"image": "bad.jpg", "ground_truth": []}]}
    assert (
        "The image bad.jpg could not be read" in Page(build_report(write_run(tmp_path, report)).read_text("utf-8")).text
    )


def test_headline_tells_a_loss_as_a_loss() -> None:
    models = Models(teacher=Figures(map=50, params_m=5), baseline=Figures(map=42), student=Figures(map=41, params_m=10))
    text = headline(Report(name="run", models=models, artifacts=[Artifact(file="a.onnx", gate="fail", map=41.0)]))
    assert "2.0× more parameters" in text and "1.0 points below" in text and "a.onnx" not in text


def test_a_latency_that_was_not_measured_well_is_marked_and_in_no_headline(tmp_path: Path) -> None:
    report = pruned_report()
    teacher, student, fp32, int8 = report["artifacts"]
    page = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8"))
    assert "is 8.0 times as fast as the teacher in PyTorch" in page.text and "not measured well" not in page.text
    assert "2 of 2" in page.text, "the student in PyTorch is what files are compared with, the teacher does not ship"

    why = "not stable after 6.0 s of warm-up"
    int8["latency_doubts"] = teacher["latency_doubts"] = [why]
    page = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8"))
    assert "Its file student.onnx answers in 1.91 ms (median)" in page.text and "times as fast as" not in page.text
    assert page.text.count(why) == 2 and "1.02 ?" in page.text and "8.16 ?" in page.text and "1.91 ?" not in page.text
    assert f"compress benchmark {tmp_path / 'student.int8.onnx'}" in page.text
    assert "student.int8.onnx (not measured well)" in page.text, "in the charts"

    fp32["latency_doubts"] = student["latency_doubts"] = ["other processes used 60% of the CPU"]
    page = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8"))
    assert "How fast student.onnx is was not measured well (other processes used 60% of the CPU)" in page.text
    assert "answers in" not in page.text
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(summary_table(report))
    lines = {line.split()[0]: line.split() for line in console.export_text().splitlines() if line.strip()}
    assert lines["student"][1:] == ["73.9", "–", "–", "1.00", "0.34", "5.10?", "–", "reference"]
    assert lines["teacher"][-2] == "8.16?" and "student.safetensors" not in lines
    assert doubt_lines(report, Path("runs/a")) == [
        f"latency not measured well (teacher (torch), student.int8.onnx): {why}",
        "latency not measured well (student (torch), student.onnx): other processes used 60% of the CPU",
        "when the machine is quiet: compress benchmark runs/a/student.int8.onnx runs/a/student.onnx",
    ]


def test_a_gain_stands_with_its_interval_and_noise_is_called_noise(tmp_path: Path) -> None:
    report = full_report()
    report["comparisons"] = [
        {"of": "student", "against": "baseline", "points": 3.0, "low": 1.2, "high": 4.9},
        {"of": "teacher", "against": "baseline", "points": 8.0, "low": 5.0, "high": 11.0},
        {"of": "student.onnx", "against": "student.safetensors", "points": -0.05, "low": -0.25, "high": 0.125},
    ]
    text = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8")).text
    assert "3.0 points above the same student trained from the labels alone (95\xa0% interval +1.2 to +4.9)." in text
    assert "noise" not in text.replace("cannot be told from noise. How much", "") and "nothing to teach" not in text
    assert "+3.0+1.2 to +4.9" in text and "0.05−0.12 to +0.25" in text, "a drop has the other sign"

    for row in report["comparisons"][:2]:
        row |= {"low": -0.5}
    html = build_report(write_run(tmp_path, report)).read_text(encoding="utf-8")
    text = Page(html).text
    assert "labels alone (95\xa0% interval −0.5 to +4.9, cannot be told from noise)." in text
    assert "These images cannot show whether the teacher has anything to teach: +8.0 over" in text
    assert "+3.0 over the baseline, cannot be told from noise" in text
    assert '<td class="">+3.0<small' in html and '<td class="good">+3.0<small' not in html

    report = {**pruned_report(), "comparisons": [
        {"of": "student", "against": "baseline.pruned", "points": 2.5, "low": -0.1, "high": 5.0},
        {"of": "teacher", "against": "baseline.pruned", "points": -0.2, "low": -2.0, "high": -0.1},
    ]}  # fmt: skip
    text = first_lines(parse_report(report))
    assert "distillation adds 2.5 (95\xa0% interval −0.1 to +5.0, cannot be told from noise)." in text
    assert "nothing to teach that these images show: −0.2 over" in text


def test_a_student_that_is_not_what_was_trained_fails_the_gate(tmp_path: Path) -> None:
    report = pruned_report()
    report["artifacts"][1] |= {"gate": "fail", "training_drop": 3.0, "reason": "first step that differs: pixels"}
    page = Page(build_report(write_run(tmp_path, report)).read_text(encoding="utf-8"))
    assert "the student itself fails against training" in page.text
    assert "it fails its own gate: first step that differs: pixels" in page.text


def test_count_matches_takes_each_object_once() -> None:
    report = Report(name="run", models=Models(), classes=["a", "b"])
    truth = [Box(box=(0, 0, 10, 10), label=0), Box(box=(20, 0, 30, 10), label=1)]
    twice = [Box(box=(0, 0, 10, 10), label="a", score=s) for s in (0.9, 0.8)]
    assert count_matches(twice, truth, report) == 1
    assert count_matches([Box(box=(20, 0, 30, 10), label="a", score=0.9)], truth, report) == 0  # wrong class
    assert count_matches([Box(box=(0, 0, 10, 5), label="a", score=0.9)], truth, report) == 1  # IoU = 0.5
    assert count_matches([Box(box=(0, 0, 10, 4.9), label="a", score=0.9)], truth, report) == 0


def test_ticks_cover_the_range_and_thinning_keeps_the_mean() -> None:
    for low, high in [(0, 1), (0, 0), (47.3, 58.1), (0, 4801), (0, 1e-4), (-3, 7)]:
        ticks = round_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
        assert ticks == sorted(set(ticks))
    assert {0.5, 1, 2, 5, 10, 20, 50} <= set(log_ticks(0.5, 60))
    points = [(float(i), float(i % 7)) for i in range(1000)]
    fewer = thin(points, 100)
    assert len(fewer) == 100
    assert sum(y for _, y in fewer) / 100 == pytest.approx(sum(y for _, y in points) / 1000)


def test_summary_table_has_every_row() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(summary_table(full_report()))
    text = console.export_text()
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert {"teacher", "baseline", "student", "student.onnx", "student.int8.onnx", "student.engine"} <= set(lines)
    for figure in ("45.0", "0.05", "12.50", "19.90", "pass"):
        assert figure in lines["student.onnx"]
    assert "50.00" in lines["teacher"] and "100.00" in lines["teacher"]
    assert "fail" in lines["student.int8.onnx"] and "not run: no GPU <here>" in lines["student.engine"]


def test_summary_table_without_teacher_and_with_markup_in_a_name() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(summary_table({"name": "run", "models": {}, "artifacts": [{"file": "[bold]a.onnx", "gate": "pass"}]}))
    text = console.export_text()
    assert "not in this run" in text and "[bold]a.onnx" in text


def test_losses_of_another_detector_are_its_own(tmp_path: Path) -> None:
    """Not those of a method; named as it names them; summed where all trainings have the same."""
    for role in ("student", "baseline"):
        (tmp_path / role).mkdir()
    run = write_run(tmp_path, full_report())
    (tmp_path / "student" / "metrics.csv").write_text(
        "step,loss,loss_vfl,loss_giou,fgd_fg,map\n1,9,2,3,4,\n2,8,2,2,4,5\n"
    )
    (tmp_path / "baseline" / "metrics.csv").write_text("step,loss,loss_vfl,loss_giou,map\n1,5,2,3,\n2,4,2,2,5\n")
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    for title in ("Detection: vfl", "Detection: giou", "Detection loss", "Distillation: fgd_fg"):
        assert title in text, title
    assert "Distillation: loss" not in text and "Training loss" not in text
    (tmp_path / "baseline" / "metrics.csv").write_text("step,loss,loss_cls,map\n1,5,2,\n2,4,2,5\n")
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "Training loss" in text and "Detection loss" not in text, "sums of other terms do not compare"
