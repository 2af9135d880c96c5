"""The report of a pruned student: what was won in the first lines, what is left of each layer, and sensitivities."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.report import build_report, summary_table
from compress.report.headline import first_lines
from compress.report.reading import parse_report
from tests.helpers.report_pages import Page, pruned_report, write_run

SPACE = "\N{NO-BREAK SPACE}"
LATENCY = {
    "asked": 5.0, "whole_ms": 8.2, "median_ms": 4.95, "interval_ms": [4.91, 5.02], "aa_ratio": [0.994, 1.007],
    "trials": [[0.683, 8.2], [0.3, 4.4], [0.36, 4.95]], "precision": "int8", "providers": ["cpu"],
    "note": "widths of <16>", "warnings": ["the machine was busy"],
}  # fmt: skip


def page_of(folder: Path, report: dict[str, Any]) -> tuple[str, Page]:
    html = build_report(write_run(folder, report)).read_text(encoding="utf-8")
    return html, Page(html)


def section(html: str, name: str) -> str:
    return html.split(f'<section id="{name}">')[1].split("</section>")[0]


def rows_of(html: str) -> list[list[str]]:
    """The cells of each table row, without tags."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def lines(change: dict[str, Any]) -> str:
    """The first lines of a report whose `models`, by role, and other keys are changed."""
    report = pruned_report()
    models = {**report["models"], **change.pop("models", {})}
    found = {role: figures for role, figures in models.items() if figures is not None}
    return first_lines(parse_report({**report, **change, "models": found})).replace(SPACE, " ")


def test_first_lines_say_what_was_won() -> None:
    assert lines({}) == (
        "The student keeps 49 % of the teacher's operations and 97 % of its mAP (73.9 of 76.5). Its file "
        "student.int8.onnx is 8.0 times as fast as the teacher in PyTorch (1.02 ms against 8.16 ms, medians of one "
        "image; in PyTorch the student is 1.6 times as fast) and loses 0.2 mAP in the conversion. The same small "
        "detector trained from scratch on the same labels reaches 21.0, pruned and fine-tuned on labels alone 71.4: "
        "distillation adds 2.5. One seed; mAP on 300 validation images."
    )


def test_first_lines_say_what_was_lost_and_leave_out_what_was_not_measured() -> None:
    def student(value: float | None) -> dict[str, Any]:
        return {"map": value, "gflops": 0.335, "params_m": 1.0}

    assert "labels alone 71.4: distillation costs 1.4." in lines({"models": {"student": student(70.0)}})
    assert "distillation makes no difference" in lines({"models": {"student": student(71.43)}})
    assert "labels reaches 21.0. One" in lines({"models": {"baseline.pruned": None}})
    assert "detector pruned and fine-tuned on labels alone reaches 71.4: " in lines({"models": {"baseline": None}})
    assert lines({"models": {"teacher": None}}).startswith("The pruned student reaches 73.9 mAP. Its file")
    for value in (0, None):
        teacher = {"map": value, "gflops": 0.683}
        begin = "The student keeps 49 % of the teacher's operations and reaches 73.9 mAP. Its"
        assert lines({"models": {"teacher": teacher}}).startswith(begin)
    assert lines({"models": {"student": student(None)}}).startswith("The student keeps 49 % of the teacher's oper")
    files = pruned_report()["artifacts"]
    assert "file student.int8.onnx answers in 1.02 ms (median) and loses" in lines({"artifacts": files[1:]})
    assert "medians of one image) and" in lines({"artifacts": [files[0], *files[2:]]})
    assert "file" not in lines({"artifacts": files[:2]}), "a model in PyTorch is no file"
    assert "No file passed its gate" in lines({"artifacts": [{**files[2], "gate": "fail"}]})
    assert "gains 0.3 mAP" in lines({"artifacts": [{**files[3], "map_drop": -0.3}]})
    other = {**pruned_report()["pruning"], "of": "another.safetensors"}
    assert lines({"pruning": other}).startswith("The student has 49 % of the teacher's operations and 97 % of its mAP")


@pytest.mark.parametrize(
    ("methods", "labelled", "says"),
    [
        (["fgd"], False, "distillation adds 2.5."),
        ([], True, "pseudo labels add 2.5."),
        (["fgd"], True, "distillation and pseudo labels add 2.5."),
        (None, False, "distillation adds 2.5."),
        (None, True, "the teacher adds 2.5."),
    ],
)
def test_first_lines_say_what_the_gain_is_of(methods: list[str] | None, labelled: bool, says: str) -> None:
    pseudo = {"labelled_images": 1, "images": 2, "labels": 3, "regions": 4}
    assert f"labels alone 71.4: {says}" in lines({"methods": methods, "pseudo_labels": pseudo if labelled else None})


def test_a_student_on_labels_alone_has_no_row_for_another(tmp_path: Path) -> None:
    report = pruned_report()
    del report["models"]["baseline.pruned"]
    html, _ = page_of(tmp_path, report)
    assert [row[0] for row in rows_of(section(html, "models"))[1:5]] == [
        "Teacher", "Pruned, not trained", "From scratch", "Student",
    ]  # fmt: skip


def test_page_compares_the_models_and_draws_their_curves(tmp_path: Path) -> None:
    for role, value in (("baseline", 21), ("baseline.pruned", 71), ("student", 73)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "metrics.csv").write_text(f"step,loss,map\n1,2.5,\n8,2.25,{value}\n")
    html, page = page_of(tmp_path, pruned_report())
    found = {row[0]: row[1:] for row in rows_of(section(html, "models"))}
    assert found["Model"] == ["mAP", "AP50", "AP75", "Params, M", "GFLOPs", "PyTorch, ms"]
    for title, value in (("Teacher", "76.5"), ("Pruned, not trained", "3.2"), ("From scratch", "21.0")):
        assert found[title][0] == value
    assert found["Pruned, labels alone"][0] == "71.4" and found["Student"][0] == "73.9"
    assert found["Student against the one on labels alone"][0] == "+2.5"
    assert found["Student against teacher"][3:] == ["2.2× smaller", "2.0× smaller", "1.6× as fast"]
    curves = section(html, "curves")
    assert "baseline.pruned ends at 71" in curves and "student ends at 73" in curves
    assert all(f'class="line {kind}"' in curves for kind in ("baseline", "baseline-pruned", "student"))
    starts = [re.search(rf'class="mark {kind}" [^>]*><title>[^<]*', curves) for kind in ("baseline-pruned", "baseline")]
    assert [start and start[0].split("step ")[1] for start in starts] == ["0, 3.25", "8, 21"]
    classes = section(html, "classes")
    assert "Pruned, labels alone" in classes and "not trained" not in classes
    assert "Pruned, labels alone" in page.text


def test_page_shows_what_is_left_of_each_layer(tmp_path: Path) -> None:
    html, page = page_of(tmp_path, pruned_report())
    part = section(html, "pruning")
    for text in (f"49.0{SPACE}%", f"0.335 of 0.683 GFLOPs; asked for 50{SPACE}%", "3 of 4", "3.2", "taylor"):
        assert text in page.text, text
    bars = re.findall(r'class="bar (whole|student)" x="\d+" y="[\d.]+" width="([\d.]+)"', part)
    assert [kind for kind, _ in bars] == ["whole", "student"] * 4
    shares = [float(left[1]) / float(whole[1]) for whole, left in zip(bars[::2], bars[1::2], strict=True)]
    assert shares == pytest.approx([24 / 32, 32 / 64, 1, 8 / 96], abs=0.001)
    assert re.findall(r'class="label heading"[^>]*>([^<]*)<', part) == ["backbone", "neck", "head"]
    assert "head.conv&lt;0&gt;: 8 of 96" in part and "conv<0>" not in part
    assert "Latency of the candidates" not in part


def test_page_says_that_a_budget_was_not_met_closely(tmp_path: Path) -> None:
    report = pruned_report()
    report["pruning"]["note"] = "30% of gflops stay where <50%> were asked for"
    assert "30% of gflops stay where &lt;50%&gt; were asked for." in section(page_of(tmp_path, report)[0], "pruning")


def test_only_what_was_taught_lacks_a_baseline(tmp_path: Path) -> None:
    report = pruned_report()
    del report["models"]["baseline.pruned"], report["models"]["baseline"]
    assert "No baseline:" in page_of(tmp_path, report | {"methods": ["fgd"]})[1].text
    assert "No baseline:" not in page_of(tmp_path, report | {"methods": []})[1].text


def test_page_shows_the_most_sensitive_layers_first(tmp_path: Path) -> None:
    html, _ = page_of(tmp_path, pruned_report())
    part = section(html, "pruning")
    rows = [row for row in rows_of(part) if row[0].startswith(("layer", "head"))]
    assert [row[0] for row in rows] == ["head.conv&lt;0&gt;", *(f"layer{index}" for index in range(6, -1, -1))]
    assert rows[0][1:] == ["96", "8", f"68.0 at 75{SPACE}%", f"60.0 at 50{SPACE}%", f"42.2 at 25{SPACE}%", "33.2"]
    assert rows[-1][1:] == ["–", "–", f"75.0 at 75{SPACE}%", f"74.0 at 50{SPACE}%", "– ", "1.5"]
    key = re.findall(r'<line class="line (s\d|rest)"[^>]*/></svg>([^<]*)', part)
    assert key[:2] == [("s0", "head.conv&lt;0&gt;"), ("s1", "layer6")] and key[6:] == [("rest", "2 other layers")]
    assert len(re.findall(r'<polyline class="line rest"', part)) == 2


def test_page_shows_the_latency_that_was_searched(tmp_path: Path) -> None:
    report = pruned_report()
    report["pruning"] |= {"budget": "latency_ms", "asked": 5, "whole": 8.2, "found": 4.95, "latency": LATENCY}
    del report["pruning"]["sensitivity"]
    html, page = page_of(tmp_path, report)
    for text in (
        f"of 8.2 ms, 60.4{SPACE}%; asked for 5 ms", "int8 file on cpu", "4.95 ms, 95 % interval 4.91 to 5.02",
        "0.994 to 1.007 times as long", "widths of <16>", "the machine was busy", "asked for 5 ms",
    ):  # fmt: skip
        assert text in page.text, text
    assert "Sensitivity" not in section(html, "pruning")


def test_an_unpruned_run_has_no_section(tmp_path: Path) -> None:
    report = pruned_report()
    models = {role: report["models"][role] for role in ("teacher", "baseline", "student")}
    html, page = page_of(tmp_path, {**report, "models": models, "pruning": None})
    assert 'id="pruning"' not in html and "#pruning" not in page.loads
    assert "Baseline" in page.text and "rom scratch" not in page.text


def test_summary_table_of_a_pruned_student_fits_80_columns() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(summary_table(pruned_report()))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    found = {line[:21].strip(): line[21:].split() for line in text.splitlines()}
    assert found["pruned, not trained"][:1] == ["3.2"] and found["from scratch"][:1] == ["21.0"]
    assert found["pruned, labels alone"] == ["71.4", "–", "–", "1.00", "0.34", "–", "–"]
    assert found["student.int8.onnx"] == ["73.7", "0.20", "–", "–", "–", "1.02", "2.50", "pass"]
