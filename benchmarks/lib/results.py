"""results.csv: one row a measurement, with what is needed to make it again.

A suite measures *cases*; a case has *variants* (an implementation, an arm, a file) and each variant *metrics*. The rest
of a row says when, on what and by which code it was measured. Measuring a case again replaces its rows.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILE = RESULTS / "results.csv"

SPREADS = ("", "quartiles", "range", "95 %", "p10 to p90")
"""What `low` and `high` are."""


@dataclass(frozen=True)
class Row:
    """One measurement. A suite gives the first part; `stamped` adds the second, which says where it comes from."""

    variant: str
    metric: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    spread: str = ""
    n: int | None = None  # repeats, requests or seeds behind the value
    seed: int | None = None
    bar: str = ""  # what is required of the value: see `is_met`
    notes: str = ""
    suite: str = ""
    case: str = ""
    date: str = ""  # of the measurement, YYYY-MM-DD
    commit: str = ""  # "+" at the end: with changes that were not committed
    code: str = ""  # fingerprint of the code that is measured: `benchmarks.lib.age`; empty when it was not recorded
    machine: str = ""
    versions: str = ""
    command: str = ""


COLUMNS = (
    "suite", "case", "variant", "metric", "value", "unit", "low", "high", "spread", "n", "seed", "bar", "date",
    "commit", "code", "machine", "versions", "command", "notes",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Rows of one case, as a suite yields them. versions: where it was measured by another interpreter."""

    name: str
    rows: list[Row]
    versions: str | None = None


def stamped(case: Case, origin: dict[str, str], label: str | None = None, notes: str = "") -> list[Row]:
    """The rows of a case with where they come from. origin: the columns from `suite` to `command` without `case`;
    label: added to the case's name; notes: added to those of every row."""
    columns: dict[str, Any] = {**origin, "case": case.name if label is None else f"{case.name}, {label}"}
    if case.versions is not None:
        columns["versions"] = case.versions
    return [replace(row, **columns, notes="; ".join(filter(None, (row.notes, notes)))) for row in case.rows]


def line(row: Row) -> str:
    """A row as a person reads it while a suite runs."""
    spread = "" if row.low is None else f"  ({row.low:.4g} to {row.high:.4g}, {row.spread})"
    seed = "" if row.seed is None else f", seed {row.seed}"
    met = {None: "", True: f"  bar {row.bar}: met", False: f"  bar {row.bar}: MISSED"}[is_met(row)]
    notes = f"  [{row.notes}]" if row.notes else ""
    return f"{row.case} | {row.variant}{seed} | {row.metric}: {row.value:.5g} {row.unit}{spread}{met}{notes}"


def is_met(row: Row) -> bool | None:
    """Whether the value is within the row's bar: `>= 4`, `> 0`, `<= 0.5` or `-0.05 to 0.1`. None without a bar."""
    if not row.bar:
        return None
    if match := _BOUND.fullmatch(row.bar):
        return _COMPARE[match[1]](row.value, float(match[2]))
    low, high = map(float, row.bar.split(" to "))
    return low <= row.value <= high


def cost_bar(most: float, noise: float = 0.05) -> str:
    """The bar of something that may cost at most the share `most`. Nothing costs less than nothing: a share below
    -`noise` says that the cases did not meet the same machine, and is no measurement."""
    return f"{-noise:g} to {most:g}"


_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_BOUND = re.compile(rf"(>=|>|<=) ({_NUMBER})")
_BAR = re.compile(rf"|(>=|>|<=) {_NUMBER}|{_NUMBER} to {_NUMBER}")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
}


def read(path: Path = FILE) -> list[Row]:
    """All rows of a results file; none where there is no file. Raises UserError with the line of a broken row."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if tuple(next(lines, ())) != COLUMNS:
            raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}")
        return [_row(path, lines.line_num, line) for line in lines]


def put(path: Path, rows: list[Row]) -> None:
    """Write the rows of one case into a results file, instead of those that it has of that case, at their place; a new
    case goes behind the last one of its suite."""
    suite, case = rows[0].suite, rows[0].case
    old = read(path)
    same = [i for i, row in enumerate(old) if (row.suite, row.case) == (suite, case)]
    of_suite = [i for i, row in enumerate(old) if row.suite == suite]
    at = same[0] if same else of_suite[-1] + 1 if of_suite else len(old)
    write(path, [*old[:at], *rows, *(row for row in old[at:] if (row.suite, row.case) != (suite, case))])


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a whole results file: numbers with nine digits, lines that end with a line feed.

    Raises ValueError for a value that is not finite: what could not be measured is no row.
    """
    rows = list(rows)
    for row in rows:
        if not math.isfinite(row.value):
            raise ValueError(f"{row.suite}, {row.case}, {row.variant}: {row.metric} is {row.value}")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(COLUMNS)
        for row in rows:
            values = asdict(row)
            lines.writerow([_text(values[column]) for column in COLUMNS])


def of(rows: Iterable[Row], suite: str, case: str | None = None, **wanted: Any) -> list[Row]:
    """The rows of a suite, or of one of its cases; wanted: values of further columns."""
    return [
        row
        for row in rows
        if row.suite == suite
        and case in (None, row.case)
        and all(getattr(row, column) == value for column, value in wanted.items())
    ]


# ----------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _row(path: Path, line: int, texts: list[str]) -> Row:
    where = f"{path}, line {line}"
    if len(texts) != len(COLUMNS):
        raise UserError(f"{where}: {len(texts)} columns; there are {len(COLUMNS)}")
    values: dict[str, Any] = dict(zip(COLUMNS, texts, strict=True))
    for column, kind in (("value", float), ("low", float), ("high", float), ("n", int), ("seed", int)):
        text = values[column]
        try:
            values[column] = kind(text) if text else None
        except ValueError:
            raise UserError(f"{where}: {column} is {text!r}, which is not a number") from None
    for column in ("suite", "case", "metric", "date", "command", "machine"):
        if not values[column]:
            raise UserError(f"{where}: {column} is empty")
    if values["value"] is None or not math.isfinite(values["value"]):
        raise UserError(f"{where}: value is not a number")
    if (values["low"] is None, values["high"] is None) != (not values["spread"],) * 2:
        raise UserError(f"{where}: low, high and spread go together")
    if values["spread"] not in SPREADS:
        raise UserError(f"{where}: spread is {values['spread']!r}; it is one of {', '.join(SPREADS[1:])}")
    if not _BAR.fullmatch(values["bar"]):
        raise UserError(f"{where}: bar is {values['bar']!r}; it is like '>= 4', '> 0', '<= 0.5' or '-0.05 to 0.1'")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", values["date"]):
        raise UserError(f"{where}: date is {values['date']!r}; it is YYYY-MM-DD")
    return Row(**values)


assert {field.name for field in fields(Row)} == set(COLUMNS)
