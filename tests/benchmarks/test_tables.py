"""What the documents show is what the results say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tables as documents
from benchmarks.lib import results, tables
from benchmarks.lib.gains import SEPARATOR
from benchmarks.lib.results import ROOT, Row
from deploy.core.errors import UserError


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return documents.documents(results.read())


def test_documents_and_pictures_are_those_of_the_results(made: dict[Path, str]) -> None:
    old = [str(path.relative_to(ROOT)) for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert old == [], "older than results.csv or than the measured code; run: python -m benchmarks tables"
    assert len(made) > 15


def test_there_is_no_picture_without_results(made: dict[Path, str]) -> None:
    pictures = {path for path in made if path.suffix == ".svg"}
    assert pictures == set(results.RESULTS.glob("*.svg"))
    for path in pictures:
        ElementTree.fromstring(made[path])


def arm(name: str, *maps: float, settings: tuple[str, ...] = ()) -> list[Row]:
    return [
        Row(
            name, "mAP", value, seed=seed, notes=SEPARATOR.join(settings), suite="distill_gain", case="cpu-methods",
            date="2030-01-02", machine="a processor, 2 CPUs", command="python -m benchmarks distill_gain cpu",
        )
        for seed, value in enumerate(maps)
    ]  # fmt: skip


MADE_UP = [
    *arm("baseline", 19.6, 20.0, 20.4),
    *arm("inherit only", 20.6, 21.0, 21.4),
    *arm("BCKD+FGD", 23.6, 24.0, 24.4),
    *arm("FGD", 21.6, 22.5, 23.4, settings=("methods.fgd.weight=3", "a=b|c")),
    *arm("LD", 18.6, 19.0, 19.4),
]


def test_a_page_shows_the_arms_with_its_method() -> None:
    shown = documents.arms(MADE_UP, "fgd")
    # Gains of 2.0, 2.5 and 3.0: 2.5 ± 4.303 * 0.5 / sqrt(3).
    assert "| FGD | 22.50 ± 0.90 | +2.50 | +1.26 to +3.74 | `methods.fgd.weight=3` `a=b\\|c` |" in shown
    assert "| baseline | 20.00 ± 0.40 |  |  |" in shown and "| BCKD+FGD | 24.00 ± 0.40 | +4.00 |" in shown
    assert "| inherit only | 21.00 ± 0.40 | +1.00 |" in shown and "| LD |" not in shown and "Seeds 0, 1, 2:" in shown
    assert "`python -m benchmarks distill_gain cpu`, 2030-01-02; a processor, 2 CPUs." in shown
    assert documents.arms(MADE_UP, "dkd") == (
        "Not among the arms of `python -m benchmarks distill_gain cpu` of 2030-01-02."
    )
    everything = documents.arms(MADE_UP, None)
    assert all(f"| {row.variant} |" in everything for row in MADE_UP)
    assert "(../../benchmarks/results/distill_gain-cpu-methods.svg)" in everything
    assert documents.arms([], "fgd") == "Not measured yet: `python -m benchmarks distill_gain cpu`."


def test_curves_are_means_over_seeds() -> None:
    rows = [
        Row("baseline", metric, value + seed, seed=seed)
        for seed in (0, 1)
        for metric, value in (("mAP", 9.0), ("mAP after 1000 steps", 6.0), ("mAP after 500 steps", 3.0))
    ] + [Row("FGD", "mAP", 12.0, seed=0)]
    assert tables.curve_table(rows).splitlines()[::2] == [
        "| mAP after | 500 steps | 1000 steps | the end |",
        "| baseline | 3.50 ± 0.71 | 6.50 ± 0.71 | 9.50 ± 0.71 |",
    ]


def test_the_index_has_the_gain_of_every_method() -> None:
    assert [documents.gain_of(MADE_UP, name) for name in ("FGD", "BCKD", "LD", "DKD")] == [
        "+2.50", "+4.00 (BCKD+FGD)", "-1.00", "not measured"
    ]  # fmt: skip
    assert documents.gain_of([], "FGD") == "not measured"
    assert documents.arms([], None, "cpu-detr") == (
        "Not measured yet: `python -m benchmarks distill_gain cpu --table detr`."
    )
    index = documents.method_page(documents.INDEX, MADE_UP)
    assert re.search(r"^\| \[FGD\]\(fgd\.md\) \|.*\| \+2\.50 \|$", index, re.MULTILINE)
    assert re.search(r"^\| \[DKD\].*\| not measured \|$", index, re.MULTILINE)


def test_a_missing_place_is_named() -> None:
    text = "<!-- a -->\nold\n<!-- /a -->\n"
    assert documents.filled(text, "a", r"new \1") == "<!-- a -->\nnew \\1\n<!-- /a -->\n"
    with pytest.raises(UserError, match="there are 0 blocks <!-- b -->"):
        documents.filled(text, "b", "new")
    with pytest.raises(UserError, match="there are 2 blocks <!-- a -->"):
        documents.filled(text * 2, "a", "new")


def lines_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def speeds(case: str, *values: float, bar: str = ">= 2") -> list[Row]:
    return [Row(f"v{i}", "times as fast", value, "×", bar=bar, case=case) for i, value in enumerate(values)]


def test_a_value_that_misses_its_bar_is_bold() -> None:
    table = lines_of(tables.pivot([*speeds("one", 2.5, 1.999), *speeds("two", 1200)], lambda row: row.case))
    assert table[0] == ["", "one", "two", "bar"]
    assert table[2:] == [["v0", "2.50 ×", "1,200 ×", ">= 2"], ["v1", "**2.00 ×**", "", ">= 2"]]
    other = tables.pivot([*speeds("one", 2.5), *speeds("two", 2, bar="")], lambda row: row.case)
    assert lines_of(other)[0] == ["", "one", "two"], "no common bar, no column of bars"


def test_a_listing_names_the_case_where_there_are_several() -> None:
    row = replace(speeds("one", 2.5)[0], low=2.0, high=3.25, spread="quartiles")
    assert lines_of(tables.listing([row]))[2] == ["v0", "times as fast", "2.50 ×", "2 to 3.25 (quartiles)", ">= 2"]
    assert lines_of(tables.listing([row, *speeds("two", 1)]))[3] == [
        "two",
        "v0",
        "times as fast",
        "**1 ×**",
        "",
        ">= 2",
    ]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row("v", "mAP", 56.8714), "56.87"),
        (Row("v", "mAP drop", -0.004), "-0.00"),
        (Row("v", "share of a step", 0.0327), "3.3%"),
        (Row("v", "time", 0.092, "s"), "0.0920 s"),
        (Row("v", "time", 143.2, "ms"), "143 ms"),
        (Row("v", "time", 143.2, "ms", bar="<= 9", notes="x; busy: others used 20% of the CPUs"), "**143 ms (busy)**"),
        (Row("v", "p99", 3343.05, "ms"), "3,343 ms"),
        (Row("v", "count", 5000), "5,000"),
    ],
)
def test_cells(row: Row, text: str) -> None:
    assert tables.cell(row) == text


def students() -> Sequence[Row]:
    return [
        Row("(a) all", "mAP", 20.0, seed=0),
        Row("(a) all", "mAP", 10.0, seed=1),
        Row("(a) few", "mAP", 15.0, seed=0),
        Row("(a) few", "mAP", 15.0, seed=1),
        Row("(a) few", "share of (a) all", 75.0, "%", seed=0),
        Row("(a) few", "share of (a) all", 150.0, "%", seed=1),
        Row("(a) few", "share of (a) all", 100.0, "%", n=2, bar=">= 97"),
        Row("(b) more", "mAP", 14.0, seed=0),
        Row("(b) more", "gain over (a) few", -1.0, "points", seed=0),
        Row("(b) more", "gain over (a) few", -1.0, "points", n=1, bar="> 0"),
    ]


def test_students_and_what_they_are_compared_with() -> None:
    table = tables.student_table(students())
    assert "| (a) | all | 15.00 ± 7.07 |  |  |  |" in table
    assert "| (a) | few | 15.00 ± 0.00 | 100.0 % of *all* | 75.0 %, 150.0 % | ≥ 97 %: reached |" in table
    assert "| (b) | more | 14.00 | -1.00 over *few* | -1.00 | more: missed |" in table
    drawn = ElementTree.fromstring(tables.student_picture(students(), "title"))
    assert len(drawn.findall(".//{*}circle")) == 5


def test_files_by_seed() -> None:
    rows = [Row(name, "mAP", value, seed=seed) for name, value in (("float", 20.0), ("int8", 19.5)) for seed in (0, 1)]
    assert lines_of(tables.by_seed(rows))[2:] == [
        ["float", "20.00", "20.00 20.00", ""], ["int8", "19.50", "19.50 19.50", "-0.50"]
    ]  # fmt: skip


def test_an_old_figure_is_marked() -> None:
    row = replace(MADE_UP[0], code="now", commit="abc1234")
    assert tables.origin([row], "now").endswith(
        "at commit abc1234; a processor, 2 CPUs. Figures are of the code as it is."
    )
    assert tables.origin([row], "later").endswith("Figures are **older than the code**.")
    assert tables.origin(MADE_UP, "now").endswith("Figures are **older than the code, or of unknown age**.")


def test_pictures_of_gains() -> None:
    drawn = ElementTree.fromstring(tables.arm_picture(MADE_UP, "cpu-methods"))
    assert len(drawn.findall(".//{*}circle")) == 12
    assert any("cpu-methods: gain in mAP over the baseline (20.00)" in (text.text or "") for text in drawn.iter())


PRUNED = [
    *arm("keep 0.5 baseline", 40.0, 41.0, 42.0),
    *arm("keep 0.5 BCKD", 42.0, 43.5, 45.0),
    *arm("nano baseline", 10.0, 11.0, 12.0),
    *(
        Row(variant, metric, value, unit)
        for variant, *values in (("keep 0.5", 0.13, 1.5, 4.2), ("nano", 0.11, 1.25), ("teacher", 0.26, 2.5))
        for value, (metric, unit) in zip(
            values, (("GFLOPs", ""), ("int8 p50", "ms"), ("mAP before training", "")), strict=False
        )
    ),
    Row("teacher", "mAP", 50.0),
]


def test_pruned_students_and_those_that_were_built_small() -> None:
    table = lines_of(tables.pruned_table(PRUNED))
    assert table[2:] == [
        ["keep 0.5", "0.130", "1.50", "4.20", "labels alone", "41.00 ± 1.00", "", ""],
        # Gains of 2.0, 2.5 and 3.0: 2.5 ± 4.303 * 0.5 / sqrt(3).
        ["", "", "", "", "BCKD", "43.50 ± 1.50", "+2.50", "+1.26 to +3.74"],
        ["nano", "0.110", "1.25", "", "labels alone", "11.00 ± 1.00", "", ""],
        ["teacher", "0.260", "2.50", "", "", "50.00", "", ""],
    ]
    drawn = ElementTree.fromstring(tables.pruned_picture(PRUNED, "title", "int8 p50", "milliseconds"))
    texts = {text.text for text in drawn.iter() if text.text}
    assert {"labels alone", "BCKD", "nano, labels alone", "teacher, whole", "title: mAP against milliseconds"} <= texts
    assert len(drawn.findall("{*}polyline")) == 2, "a line a method of the pruned ones"
