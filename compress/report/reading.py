"""Documents of a run folder: report.json, the metrics.csv of each training, recipe.yaml.

Public: `read_document(run_dir)`, `parse_report(value)`. A figure of the wrong type is a `UserError` with the file and
the key.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.manifest import RunFolder
from compress.report.document import ROLES, Report
from deploy.core.errors import UserError, one_line


@dataclass(frozen=True)
class Metrics:
    """metrics.csv of one training by columns: `columns[name]` is a list of (step, value), empty cells left out."""

    columns: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Document:
    run_dir: Path
    report: Report
    metrics: dict[str, Metrics]  # of the models that have a metrics.csv
    recipe: str | None


def read_document(run_dir: Path) -> Document:
    """Read everything the report shows. Raises UserError for a missing or bad file."""
    folder = RunFolder(run_dir)
    path = folder.report
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; give the folder of a finished run (runs/<name>)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    try:
        value = json.loads(text, parse_constant=lambda _: None)  # NaN and Infinity: not measured
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); run the command again") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{path}: not a report ({one_line(error)})") from None
    metrics = {role: _read_metrics(folder.training(role).metrics) for role in ROLES}
    recipe = folder.recipe
    return Document(
        run_dir=run_dir,
        report=parse_report(value, source=str(path)),
        metrics={role: m for role, m in metrics.items() if m is not None},
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
    )


def parse_report(value: Any, source: str = "report.json") -> Report:
    """Check the content of a report.json. Raises UserError that names the first wrong key."""
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: expected an object at the top, got {type(value).__name__}")
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = "is missing" if first["type"] == "missing" else one_line(first["msg"])
        raise UserError(f"{source}: {key}: {problem}") from None


def _read_metrics(path: Path) -> Metrics | None:
    """Read the curves of a training; None where there are none. Of a step that was written twice, after a resume, the
    last value counts."""
    if not path.is_file():
        return None
    columns: dict[str, dict[float, float]] = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or ()):
            raise UserError(f"{path}:1: no column 'step'; the first line must name the columns")
        for row in rows:
            step = _number(row["step"], path, rows.line_num, "step")
            for name, cell in row.items():
                if step is None or name is None or name == "step":
                    continue
                number = _number(cell, path, rows.line_num, name)
                if number is not None:
                    columns.setdefault(name, {})[step] = number
    return Metrics({name: sorted(points.items()) for name, points in columns.items()})


def _number(cell: str | None, path: Path, line: int, column: str) -> float | None:
    if cell is None or not cell.strip():
        return None
    try:
        number = float(cell)
    except ValueError:
        raise UserError(f"{path}:{line}: {column}: {cell[:40]!r} is not a number") from None
    return number if math.isfinite(number) else None
