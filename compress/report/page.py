"""report.json and the curves of a run → report.html, one file that loads nothing from anywhere.

Public: `build_report(run_dir)`. The words and figures are chosen in `headline`, `tables` and `curves`, the layout is
report.html.j2, the charts and photographs come from `charts` and `pictures`. What was not measured is said, never
filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.manifest import BASELINE, FINE_TUNED, TEACHER, RunFolder
from compress.report.charts import Range, Spot, range_chart, scatter_chart
from compress.report.curves import curves
from compress.report.document import IN_TORCH, ROLES, STUDENT_IN_TORCH, Artifact, Box, Models, Picture, Report
from compress.report.errors import errors_section
from compress.report.gallery import MOST, choose
from compress.report.headline import first_lines, tiles
from compress.report.heat import draw_uncertainty
from compress.report.operating import operating_section
from compress.report.pictures import MATCH_IOU, Photos, class_kinds, draw_pictures, filters, shown_from
from compress.report.pruning import pruning_section
from compress.report.reading import Document, read_document
from compress.report.tables import (
    artifact_row,
    class_table,
    engine_row,
    model_table,
    more_than_usual,
    pseudo_labels,
    reference_words,
)
from compress.report.text import date, flat, lower
from deploy.core.draw import COLORS
from deploy.core.errors import UserError
from deploy.core.files import write_text
from deploy.core.storage import shown
from deploy.validate.kept import Kept

DOUBT = " (not measured well)"
"""Stands behind the name of such a row."""


def build_report(run_dir: Path, pictures: int | None = None) -> Path:
    """Write `run_dir`/report.html from its report.json, metrics.csv files and recipe.yaml; return the path.

    pictures: how many are chosen anew from what the run kept; None: those of report.json.

    Raises UserError (one line) when report.json is missing or a file is malformed. Teacher, baseline,
    artifacts, curves and pictures may be absent: the page says what is missing.
    """
    run_dir = Path(run_dir)
    document = read_document(run_dir)
    if pictures is not None:
        document = replace(document, report=_with_pictures(document.report, run_dir, pictures))
    report = document.report
    photos = Photos(run_dir, len(report.pictures))
    drawn = draw_pictures(document, photos)
    html = (
        templates()
        .get_template("report.html.j2")
        .render(
            name=report.name,
            created=date(report.created),
            headline=first_lines(report),
            tiles=tiles(report),
            missing=_missing(document),
            table=model_table(report),
            pruned=report.models.is_pruned,
            pruning=pruning_section(report),
            pseudo=pseudo_labels(report),
            artifacts=[artifact_row(a, report.compared(a.file, STUDENT_IN_TORCH)) for a in report.files],
            reference=reference_words(report),
            timed=[artifact_row(a) for a in report.artifacts],
            intervals=bool(report.comparisons),
            doubtful=any(a.latency_doubts for a in report.artifacts),
            repeat=_repeat(report, run_dir),
            limit=more_than_usual(report.files),
            engines=[engine_row(a.file, a.engine) for a in report.artifacts if a.engine],
            trade=_trade_chart(report.models, report.artifacts),
            levels=any(f and f.map is not None for f in map(report.models.of, _levels(report.models))),
            latency=_latency_chart(report.artifacts),
            curves=curves(document),
            classes=class_table(report),
            operating=operating_section(report),
            errors=errors_section(report),
            pictures=drawn,
            filters=filters(drawn),
            colours=COLORS,
            colour_of=class_kinds([Box(box=(0, 0, 0, 0), label=name) for name in report.classes], report),
            uncertainty=draw_uncertainty(document, photos),
            shown_from=shown_from(report),
            match_iou=MATCH_IOU,
            environment=list(flat(report.environment)),
            commands=report.commands,
            recipe=document.recipe,
        )
    )
    path = RunFolder(run_dir).page
    write_text(path, html)
    return path


def templates() -> Environment:
    """The templates of pages."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _with_pictures(report: Report, run_dir: Path, many: int) -> Report:
    if not 1 <= many <= MOST:
        raise UserError(f"--pictures: from 1 to {MOST}, got {many}")
    shown = {role: report.shown_score(role) for role in ROLES}
    entries = choose(Kept(RunFolder(run_dir).evaluation), shown, [a.file for a in report.artifacts], many)
    if not entries:
        raise UserError(
            f"--pictures: {run_dir} holds no {RunFolder(run_dir).evaluation.name}/ to choose from; run its recipe again"
        )
    return report.model_copy(update={"pictures": [Picture.model_validate(entry) for entry in entries]})


def _missing(document: Document) -> list[str]:
    models, report = document.report.models, document.report
    words = []
    if models.teacher is None:
        words.append("No teacher: report.json holds no teacher figures, so nothing is compared with one.")
    taught = report.methods != [] or report.pseudo_labels is not None
    if taught and models.baseline is None and models.fine_tuned is None:
        words.append(
            "No baseline: the same student without distillation was not trained, so the gain from "
            "distillation is not known."
        )
    if models.student is None:
        words.append("No student: report.json holds no student figures.")
    if not report.files:
        words.append("No artifacts: nothing was exported, so there is neither a gate nor a latency.")
    elif all(a.p50 is None for a in report.artifacts):
        words.append("No latency: none of the artifacts was benchmarked.")
    return words


def _repeat(report: Report, run_dir: Path) -> str:
    """The command that measures the files again."""
    files = dict.fromkeys(shown(run_dir / a.file.partition(" ")[0]) for a in report.files if a.latency_doubts)
    return f"compress benchmark {' '.join(files)}" if files else ""


def _levels(models: Models) -> tuple[str, str]:
    """Models whose mAP is a line. A student from random weights is too far from a pruned one for one axis."""
    return TEACHER, FINE_TUNED if models.is_pruned else BASELINE


def _trade_chart(models: Models, artifacts: Sequence[Artifact]) -> Markup | None:
    spots = [
        Spot(
            a.label + " ?" * bool(a.latency_doubts),
            a.p50,
            a.map,
            {"pass": "pass", "fail": "fail"}.get(a.gate, "notrun") + " doubtful" * bool(a.latency_doubts),
        )
        for a in artifacts
        if a.p50 is not None and a.map is not None
    ]
    if not spots:
        return None
    drawn = {a.file for a in artifacts if a.p50 is not None and a.map is not None}
    levels = [
        (role.replace(".", "-"), f"{lower(models.titles[role])} {figures.map:.1f}", figures.map)
        for role in _levels(models)
        if (figures := models.of(role)) and figures.map is not None and IN_TORCH.get(role) not in drawn
    ]
    words = "; ".join(f"{s.label}: {s.x:.2f} ms, {s.y:.1f} mAP" for s in spots)
    return scatter_chart(
        spots,
        title=f"Accuracy against latency. {words}",
        x_label="median latency, ms",
        y_label="mAP, percent",
        levels=levels,
    )


def _latency_chart(artifacts: Sequence[Artifact]) -> Markup | None:
    ranges = []
    for a in artifacts:
        values = [v for v in a.latency_ms.model_dump().values() if v is not None] if a.latency_ms else []
        if values and a.p50 is not None:
            ranges.append(Range(a.label + DOUBT * bool(a.latency_doubts), values, bool(a.latency_doubts)))
    if not ranges:
        return None
    words = "; ".join(f"{r.label}: {r.values[0]:.2f} to {r.values[-1]:.2f} ms" for r in ranges)
    return range_chart(ranges, title=f"Latency percentiles. {words}", x_label="latency, ms")
