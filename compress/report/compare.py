"""Runs side by side: `compare_runs(run_dirs, out)` writes one page, and returns what it says first.

The first run is what the others are held against. Where the runs kept what they found on the same validation images,
differences have paired intervals; where they did not, the page says why their mAP cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.config.yaml_document import Document as YamlDocument
from compress.manifest import STUDENT, RunFolder
from compress.report.document import Artifact, Figures, Report
from compress.report.page import templates
from compress.report.reading import Document, read_document
from compress.report.tables import Cell
from compress.report.text import figure, flat, milliseconds, signed
from deploy.core.draw import COLORS
from deploy.core.errors import UserError
from deploy.core.files import write_text
from deploy.core.storage import shown
from deploy.validate.bootstrap import TIMES, Interval, Matches, drawn_aps, interval, mean_ap
from deploy.validate.kept import Kept

NOT_THE_RECIPE = ("name", "runs")
"""Keys in which two runs differ anyway."""
MOVING = ("cpu.load_average", "cpu.load_average_after")
"""Facts of a machine that change from minute to minute."""
STUDENT_ROWS = (
    *(("AP50", "map50", 1), ("AP75", "map75", 1)),
    *(("parameters, M", "params_m", 2), ("GFLOPs", "gflops", 2)),
)
"""Title, key of the figures and digits."""
Table = list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Comparison:
    """What the page says. names: of the runs. lines: first, and what cannot be compared. models, files, classes,
    recipes, machines: rows of a name and a cell for each run; of classes with what each has more than the first."""

    names: list[str]
    lines: list[str]
    warnings: list[str]
    models: Table
    classes: Table
    files: list[tuple[str, Table]]
    recipes: Table
    machines: Table


def compare_runs(run_dirs: Sequence[Path], out: Path) -> list[str]:
    """Write the page; return its first lines. Raises UserError for less than two runs and for what `read_document`
    refuses."""
    if len(run_dirs) < 2:
        raise UserError("two runs or more can be compared")
    documents = [read_document(Path(run_dir)) for run_dir in run_dirs]
    found = comparison(documents)
    page = templates().get_template("compare.html.j2")
    write_text(out, page.render(found=found, colours=COLORS, filters=[]))
    return [*found.lines, *found.warnings]


def comparison(documents: Sequence[Document]) -> Comparison:
    """Compare runs with the first of them."""
    names = _names(documents)
    kept = [Kept(RunFolder(document.run_dir).evaluation) for document in documents]
    reports = [document.report for document in documents]
    lines, warnings = [], []
    gains: list[_Gain | None] = [None]
    for name, report, found in zip(names[1:], reports[1:], kept[1:], strict=True):
        why = _why_not(reports[0], report, kept[0], found, names[0], name)
        gain = None if why else _gain(kept[0], found)
        gains.append(gain)
        warnings += [why] if why else []
        lines.append(_first_line(names[0], name, reports[0], report, gain, comparable=why is None))
    files, timing = _files(reports, names)
    return Comparison(
        names=names,
        lines=lines,
        warnings=warnings + timing,
        models=_models(names, reports, gains),
        classes=_classes(reports, gains),
        files=files,
        recipes=_differing([_recipe(document) for document in documents]),
        machines=_differing([_machine(report) for report in reports]),
    )


# --- details --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gain:
    """What the student of a run has more than that of the first: mAP, and AP of each class; None: intervals are not
    known."""

    map: Interval
    classes: Mapping[str, Interval]


def _names(documents: Sequence[Document]) -> list[str]:
    """Names of the runs, or their folders where two have one name."""
    names = [document.report.name for document in documents]
    return names if len(set(names)) == len(names) else [shown(document.run_dir) for document in documents]


def _why_not(first: Report, other: Report, kept: Kept, found: Kept, name: str, second: str) -> str | None:
    """Why two mAP cannot be compared; None where they can."""
    start = f"{name} and {second} cannot be compared by mAP"
    if first.classes != other.classes:
        return f"{start}: their classes differ ({_classes_apart(first.classes, other.classes)})."
    for run, of in ((name, kept), (second, found)):
        if not of or STUDENT not in of:
            return f"{start}: {run} kept no detections (evaluation/); run its recipe again."
    if kept.identity == found.identity:
        return None
    one, two = ({entry["file_name"] for entry in of.content["images"]} for of in (kept, found))
    if one != two:
        return f"{start}: other validation images ({len(one):,} and {len(two):,}, {len(one & two):,} names in common)."
    return f"{start}: the labels of their validation images differ."


def _classes_apart(one: Sequence[str], two: Sequence[str]) -> str:
    if len(one) != len(two):
        return f"{len(one)} and {len(two)}"
    a, b = next((a, b) for a, b in zip(one, two, strict=True) if a != b)
    return f"{a} and {b}"


def _gain(kept: Kept, found: Kept) -> _Gain:
    matches = {"one": Matches(kept.truth, kept.table(STUDENT)), "two": Matches(found.truth, found.table(STUDENT))}
    drawn = drawn_aps(matches, TIMES)
    values = {name: each.value() for name, each in matches.items()}
    apart = drawn["two"] - drawn["one"]
    each = values["two"] - values["one"]
    classes = {
        name: interval(float(each[k]), apart[:, k]) for k, name in enumerate(kept.truth.names) if not np.isnan(each[k])
    }
    lead = float(mean_ap(values["two"]) - mean_ap(values["one"]))
    return _Gain(interval(lead, mean_ap(drawn["two"]) - mean_ap(drawn["one"])), classes)


def _words(found: Interval) -> str:
    return f"{signed(found.low, 1)} to {signed(found.high, 1)}"


def _first_line(name: str, second: str, first: Report, other: Report, gain: _Gain | None, *, comparable: bool) -> str:
    one, two = (report.models.student.map if report.models.student else None for report in (first, other))
    line = f"The student of {second} has {figure(two, 1)} mAP, that of {name} {figure(one, 1)}"
    if gain is None or not comparable:
        return f"{line}."
    noise = ", cannot be told from noise" if gain.map.holds_zero else ""
    return f"{line}: {signed(gain.map.value, 1)} (95\N{NO-BREAK SPACE}% interval {_words(gain.map)}{noise})."


def _models(names: Sequence[str], reports: Sequence[Report], gains: Sequence[_Gain | None]) -> Table:
    rows: Table = []
    for role, title in (("student", "Student"), ("teacher", "Teacher"), ("baseline", "Baseline")):
        models = [report.models.of(role) for report in reports]
        if any(models):
            rows.append((f"{title}, mAP", [Cell(figure(of.map if of else None, 1)) for of in models]))
        if role == STUDENT and any(gains):
            deltas = [_delta(None if gain is None else gain.map) for gain in gains]
            rows.append((f"Student's mAP against {names[0]}", deltas))
    students = [report.models.student or Figures() for report in reports]
    for title, key, digits in STUDENT_ROWS:
        rows.append((f"Student, {title}", [Cell(figure(getattr(of, key), digits)) for of in students]))
    counts = [report.validation_images for report in reports]
    rows.append(("Validation images", [Cell("–" if count is None else f"{count:,}") for count in counts]))
    return rows


def _delta(found: Interval | None) -> Cell:
    if found is None:
        return Cell("–")
    tone = "" if found.holds_zero else "good" if found.value > 0 else "bad"
    return Cell(signed(found.value, 1), tone, _words(found))


def _classes(reports: Sequence[Report], gains: Sequence[_Gain | None]) -> Table:
    """Classes, those that differ most from the first run first."""
    figures = [report.models.student.per_class if report.models.student else {} for report in reports]
    names = list(dict.fromkeys(name for of in figures for name in of))

    def most(name: str) -> float:
        values = [of.get(name) for of in figures]
        return max((abs(v - values[0]) for v in values[1:] if v is not None and values[0] is not None), default=-1.0)

    rows: Table = []
    for name in sorted(names, key=lambda name: -most(name)):
        cells = []
        for of, gain in zip(figures, gains, strict=True):
            found = None if gain is None else gain.classes.get(name)
            tone = "" if found is None or found.holds_zero else "good" if found.value > 0 else "bad"
            small = "" if found is None else f"{signed(found.value, 1)}, {_words(found)}"
            cells.append(Cell(figure(of.get(name), 1), tone, small))
        rows.append((name, cells))
    return rows


def _files(reports: Sequence[Report], names: Sequence[str]) -> tuple[list[tuple[str, Table]], list[str]]:
    """mAP, median latency and size of the files of any of the runs; and why latencies do not compare."""
    labels = list(dict.fromkeys(a.label for report in reports for a in [*report.files, *_torch(report)]))
    rows: dict[str, Table] = {"mAP": [], "Median latency, ms": [], "Size, MB": [], "Gate": []}
    for label in labels:
        found = [next((a for a in report.artifacts if a.label == label), None) for report in reports]
        rows["mAP"].append((label, [Cell(figure(a.map if a else None, 1)) for a in found]))
        rows["Median latency, ms"].append((label, [_time(a) for a in found]))
        rows["Size, MB"].append((label, [Cell(figure(a.size_mb if a else None, 1)) for a in found]))
        rows["Gate"].append((label, [Cell(a.gate if a else "–") for a in found]))
    lines = []
    machines = [(r.environment.get("cpu", {}).get("model"), _gpus(r)) for r in reports]
    for name, machine in zip(names[1:], machines[1:], strict=True):
        if machine != machines[0]:
            lines.append(f"Latencies of {names[0]} and {name} are of different machines and cannot be compared.")
    doubted = [name for name, r in zip(names, reports, strict=True) if any(a.latency_doubts for a in r.artifacts)]
    if doubted:
        lines.append(f"Latencies with ? were not measured well ({', '.join(doubted)}).")
    return [(title, table) for title, table in rows.items() if table], lines


def _torch(report: Report) -> list[Artifact]:
    return [row for role in report.models.titles if (row := report.in_torch(role)) is not None]


def _gpus(report: Report) -> list[Any]:
    return [gpu.get("name") for gpu in report.environment.get("gpus") or []]


def _time(a: Artifact | None) -> Cell:
    if a is None or a.p50 is None:
        return Cell("–")
    words = milliseconds(a.p50).removesuffix(" ms")
    return Cell(f"{words} ?", "doubt", "; ".join(a.latency_doubts)) if a.latency_doubts else Cell(words)


def _recipe(document: Document) -> dict[str, str]:
    if document.recipe is None:
        return {}
    content = YamlDocument(str(document.run_dir / "recipe.yaml")).read(document.recipe)
    return {key: text for key, text in flat(content) if key not in NOT_THE_RECIPE}


def _machine(report: Report) -> dict[str, str]:
    return {key: text for key, text in flat(report.environment) if key not in MOVING}


def _differing(values: Sequence[Mapping[str, str]]) -> Table:
    """Rows of the keys that are not the same everywhere."""
    keys = dict.fromkeys(key for of in values for key in of)
    rows = [(key, [of.get(key, "–") for of in values]) for key in keys]
    return [(key, [Cell(text) for text in texts]) for key, texts in rows if len(set(texts)) > 1]
