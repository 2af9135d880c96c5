"""results.csv: what is written is read again, what is broken is named, and the file of the repository is whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.lib import results
from benchmarks.lib.results import COLUMNS, Case, Row, cost_bar, is_met, put, read, stamped, write
from benchmarks.suites import SUITES
from deploy.core.errors import UserError

ORIGIN = {
    "suite": "latency",
    "date": "2030-01-02",
    "commit": "abc1234+",
    "code": "0123456789abcdef",
    "machine": "a processor, 2 CPUs",
    "versions": "python 3.12.1, torch 2.15.0",
    "command": "python -m benchmarks latency --seconds 5",
}


R18_AT_512 = "resnet18 at 512: end to end, fp32 over torch eager"
PSEUDO = "20 % of the labels, pseudo labels on the rest"


def rows(case: str, *values: float) -> list[Row]:
    return stamped(Case(case, [Row(f"v{i}", "time", value, "ms") for i, value in enumerate(values)]), ORIGIN)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    measured = Row('a, "b" | c', "time", 1.2345678912345, "ms", 1.0, 2.5, "quartiles", 7, 3, "<= 4", notes="größer; x")
    written = stamped(Case("one, two", [measured, Row("b", "count", 5000)]), ORIGIN, label="again", notes="quiet")
    assert (written[0].case, written[0].notes, written[1].notes) == ("one, two, again", "größer; x; quiet", "quiet")
    path = tmp_path / "results.csv"
    put(path, written)
    assert read(path) == [replace(written[0], value=1.23456789), written[1]], "nine digits"
    assert path.read_bytes().count(b"\n") == 3 and b"\r" not in path.read_bytes()


def test_a_case_is_replaced_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    other = [replace(row, suite="serve") for row in rows("first", 9)]
    for block in (rows("first", 1, 2), other, rows("second", 3), rows("first", 4)):
        put(path, block)
    assert [(row.suite, row.case, row.value) for row in read(path)] == [
        ("latency", "first", 4), ("latency", "second", 3), ("serve", "first", 9)
    ]  # fmt: skip


def test_what_could_not_be_measured_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    put(path, rows("c", 1))
    with pytest.raises(ValueError, match="latency, d, v0: time is nan"):
        put(path, rows("d", float("nan")))
    assert [row.case for row in read(path)] == ["c"]


def test_versions_of_another_interpreter() -> None:
    (row,) = stamped(Case("c", [Row("v", "time", 1)], versions="python 3.11"), ORIGIN)
    assert row.versions == "python 3.11" and row.command == ORIGIN["command"]


@pytest.mark.parametrize(
    ("bar", "value", "met"),
    [
        ("", 1.0, None),
        (">= 4", 4.0, True), (">= 4", 3.999, False),
        ("> 0", 0.0, False), ("> 0", 0.01, True),
        ("<= 0.5", 0.5, True), ("<= 0.5", 0.51, False),
        (cost_bar(0.1), 0.02, True), (cost_bar(0.1), 0.1, True), (cost_bar(0.1), 0.101, False),
        (cost_bar(0.1), -0.04, True), (cost_bar(0.1), -0.13, False),
    ],
)  # fmt: skip
def test_bars(bar: str, value: float, met: bool | None) -> None:
    """A cost below nothing by more than noise is no measurement, so it meets nothing."""
    assert is_met(Row("v", "m", value, bar=bar)) is met


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("value", "fast", "line 2: value is 'fast', which is not a number"),
        ("value", "", "line 2: value is not a number"),
        ("value", "nan", "line 2: value is not a number"),
        ("n", "1.5", "line 2: n is '1.5'"),
        ("low", "1", "low, high and spread go together"),
        ("bar", "about 4", "bar is 'about 4'"),
        ("bar", "<4", "bar is '<4'"),
        ("date", "yesterday", "date is 'yesterday'"),
        ("suite", "", "suite is empty"),
        ("command", "", "command is empty"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, column: str, text: str, message: str) -> None:
    path = tmp_path / "results.csv"
    write(path, rows("c", 1))
    line = dict(zip(COLUMNS, path.read_text().splitlines()[1].split(","), strict=False))
    assert column in line
    cells = ["latency", "c", "v0", "time", "1", "ms", "", "", "", "", "", "", "2030-01-02", "", "", "m", "", "x", ""]
    cells[COLUMNS.index(column)] = text
    path.write_text(f"{','.join(COLUMNS)}\n{','.join(cells)}\n")
    with pytest.raises(UserError) as caught:
        read(path)
    assert message in str(caught.value)


def test_other_files_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="the first line must be suite,case,"):
        read(path)
    path.write_text(f"{','.join(COLUMNS)}\nlatency,c\n")
    with pytest.raises(UserError, match="line 2: 2 columns; there are 19"):
        read(path)
    assert read(tmp_path / "none.csv") == []


def test_the_results_of_the_repository(tmp_path: Path) -> None:
    """Every row is whole and of a suite that there is, none is there twice, and writing changes nothing."""
    found = read()
    assert {row.suite for row in found} <= set(SUITES) and len(found) > 1000
    keys = [(row.suite, row.case, row.variant, row.metric, row.seed) for row in found]
    assert len(keys) == len(set(keys))
    write(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_bytes() == results.FILE.read_bytes()
    assert not [row for row in found if any(text in row.command for text in ("/work", "/tmp", "/root", "/home"))]


@pytest.mark.parametrize(
    ("suite", "case", "variant", "metric", "seed", "value"),
    [
        ("vs_mmdet", "100 boxes, allocator default", "ours assignment", "times as fast", None, 48.236),
        ("data_path", "allocator default", "ours, loader", "times as fast", None, 1.315),
        ("latency", "GFL-R18, random weights, 320 x 320, 2 threads", "onnx, end_to_end, batch 1", "p50", None, 92.4),
        ("quantized", "accuracy, bccd", "int8 cpu guided", "mAP drop", None, -0.195),
        ("quantized", "speed, 2 threads", R18_AT_512, "times as fast", None, 1.312),
        ("serve", "overload", "server", "p99", None, 3343.0),
        ("kernels", "cpu, 2 threads, allocator reuse", "mc_dropout: eager", "times as fast", None, 36.822),
        ("distill_gain", "cpu-methods", "FGD", "mAP", 0, 17.309),
        ("distill_gain", "quickstart", "distilled", "mAP", 0, 21.887),
        ("pseudo_gain", "cpu", "(b) the same and 2200 more images", f"gain over (a) {PSEUDO}", None, 9.788),
        ("qad", "quickstart-all-cpu", "int8 QAD", "mAP", 2, 18.519),
        ("pseudo_memory", "images of 64 x 64", "5000 images", "peak", None, 741.7),
        ("method_cost", "nano of nano2x, 8 images of 96", "fgd", "added time", None, 10.26),
        ("recipe", "bccd", "student", "mAP", None, 59.473),
    ],
)  # fmt: skip
def test_well_known_figures(suite: str, case: str, variant: str, metric: str, seed: int | None, value: float) -> None:
    """Figures that documents have named, as measured in November 2026; who measures one anew changes it here."""
    (row,) = results.of(read(), suite, case, variant=variant, metric=metric, seed=seed)
    assert row.value == pytest.approx(value, rel=1e-3) and row.date.startswith("2026-11-")
