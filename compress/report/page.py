"""report.json and the curves of a run → report.html, one file that loads nothing from anywhere.

Public: `build_report(run_dir)`. The words and figures are chosen here, the layout is report.html.j2, the
charts and photographs come from `charts` and `pictures`. What was not measured is said, never filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report.charts import Range, Series, Spot, line_chart, range_chart, scatter_chart
from compress.report.document import ARMS, Artifact, Document, Figures, Metrics, Models, Report, read_document
from compress.report.heat import draw_uncertainty
from compress.report.pictures import MATCH_IOU, MIN_SCORE, Photos, draw_pictures
from deploy.core.files import write_text

DETECTION_LOSSES = ("loss_cls", "loss_bbox", "loss_dfl")
_KNOWN_COLUMNS = {
    *DETECTION_LOSSES, "step", "epoch", "seconds", "lr", "loss", "grad_norm", "map", "map50", "map75",
}  # fmt: skip
_LINE_COLOURS = 6  # classes .s0 … .s5 of the style sheet
_LOSS_NAMES = {
    "loss_cls": "Classification (QFL)",
    "loss_bbox": "Box (GIoU)",
    "loss_dfl": "Distribution (DFL)",
}


def build_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from its report.json, metrics.csv files and recipe.yaml; return the path.

    Raises UserError (one line) when report.json is missing or a file is malformed. Teacher, baseline,
    artifacts, curves and pictures may be absent: the page says what is missing.
    """
    run_dir = Path(run_dir)
    document = read_document(run_dir)
    report = document.report
    photos = Photos(run_dir)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = templates.get_template("report.html.j2").render(
        name=report.name,
        created=_date(report.created),
        headline=headline(report.models, report.artifacts),
        tiles=_tiles(report.models, report.artifacts),
        missing=_missing(document),
        arms=[arm for arm in ARMS if getattr(report.models, arm)],
        model_rows=_model_rows(report.models),
        pseudo=_pseudo_labels(report),
        artifacts=[_artifact_row(a) for a in report.artifacts],
        trade=_trade_chart(report.models, report.artifacts),
        levels=any(f and f.map is not None for f in (report.models.teacher, report.models.baseline)),
        latency=_latency_chart(report.artifacts),
        curves=_curves(document),
        classes=_class_rows(report.models),
        pictures=draw_pictures(document, photos),
        uncertainty=draw_uncertainty(document, photos),
        min_score=MIN_SCORE,
        match_iou=MATCH_IOU,
        environment=list(_flatten(report.environment)),
        commands=report.commands,
        recipe=document.recipe,
    )
    path = run_dir / "report.html"
    write_text(path, html)
    return path


# ---- the headline ------------------------------------------------------------------------------------------


def headline(models: Models, artifacts: Sequence[Artifact]) -> str:
    """What was compressed and by how much, in one to three sentences made only of measured figures."""
    teacher, baseline, student = models.teacher, models.baseline, models.student
    if student is None:
        return "This run has no student figures: there is nothing to compare yet."
    sentences = []
    sizes = []
    if teacher:
        for what, big, small in (
            ("parameters", teacher.params_m, student.params_m),
            ("operations", teacher.gflops, student.gflops),
        ):
            if big and small:
                sizes.append(f"{big / small:.1f}× fewer {what}" if big >= small else f"{small / big:.1f}× more {what}")
    kept = None
    if teacher and teacher.map and student.map is not None:
        kept = f"reaches {student.map:.1f} mAP against the teacher's {teacher.map:.1f}"
    if sizes and kept:
        sentences.append(f"The student has {' and '.join(sizes)}, and {kept}.")
    elif sizes:
        sentences.append(f"The student has {' and '.join(sizes)}; its mAP was not compared with the teacher's.")
    elif kept:
        sentences.append(f"The student {kept}.")
    elif student.map is not None:
        sentences.append(f"The student reaches {student.map:.1f} mAP.")
    else:
        sentences.append("The student's mAP was not measured.")
    if baseline and baseline.map is not None and student.map is not None:
        gain = student.map - baseline.map
        if round(gain, 1) == 0:
            sentences.append("It ends level with the same student trained from the labels alone.")
        else:
            word = "above" if gain > 0 else "below"
            sentences.append(f"That is {abs(gain):.1f} points {word} the same student trained from the labels alone.")
    best = _fastest(artifacts)
    if best and best.map is not None:
        sentences.append(f"Exported as {best.file}, it answers in {_ms(best.p50)} (median) at {best.map:.1f} mAP.")
    return " ".join(sentences)


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    unit: str
    note: str
    tone: str = ""  # CSS class of the note: good, bad or nothing


def _tiles(models: Models, artifacts: Sequence[Artifact]) -> list[Tile]:
    teacher, baseline = models.teacher or Figures(), models.baseline or Figures()
    student = models.student or Figures()
    tiles = [Tile("Student mAP", _text(student.map, 1), "", "not measured")]
    if student.map is not None:
        if baseline.map is not None:
            gain = student.map - baseline.map
            tone = "good" if gain > 0 else "bad"
            tiles[0] = Tile("Student mAP", _text(student.map, 1), "", f"{_signed(gain, 1)} over the baseline", tone)
        else:
            tiles[0] = Tile("Student mAP", _text(student.map, 1), "", "no baseline to compare with")
    for label, unit, big, small in (
        ("Parameters", "M", teacher.params_m, student.params_m),
        ("Compute", "GFLOPs", teacher.gflops, student.gflops),
    ):
        note = "not measured" if small is None else "no teacher to compare with"
        if big and small:
            note = f"{_text(big, 1)} {unit} in the teacher: {_ratio(big, small)}"
        tiles.append(Tile(label, _text(small, 2 if (small or 0) < 10 else 1), unit if small is not None else "", note))
    best = _fastest(artifacts)
    if best:
        tiles.append(Tile("Latency, median", _text(best.p50, 2), "ms", best.file))
    else:
        measured = any(a.p50 is not None for a in artifacts)
        tiles.append(Tile("Latency, median", "–", "", "no artifact passed its gate" if measured else "not measured"))
    passed = sum(a.gate == "pass" for a in artifacts)
    failed = sum(a.gate == "fail" for a in artifacts)
    idle = len(artifacts) - passed - failed
    if not artifacts:
        tiles.append(Tile("Accuracy gate", "–", "", "no artifact was exported"))
    else:
        words = [f"{failed} failed"] * bool(failed) + [f"{idle} not run"] * bool(idle)
        tone = "bad" if failed else "" if idle else "good"
        tiles.append(
            Tile(
                "Accuracy gate",
                f"{passed} of {len(artifacts)}",
                "passed",
                ", ".join(words) or "all passed",
                tone,
            )
        )
    return tiles


def _fastest(artifacts: Sequence[Artifact]) -> Artifact | None:
    """The lowest median among the artifacts that passed their gate."""
    timed = [(a.p50, index) for index, a in enumerate(artifacts) if a.gate == "pass" and a.p50 is not None]
    return artifacts[min(timed)[1]] if timed else None


def _missing(document: Document) -> list[str]:
    models, report = document.report.models, document.report
    words = []
    if models.teacher is None:
        words.append("No teacher: report.json holds no teacher figures, so nothing is compared with one.")
    if models.baseline is None:
        words.append(
            "No baseline: the same student without distillation was not trained, so the gain from "
            "distillation is not known."
        )
    if models.student is None:
        words.append("No student: report.json holds no student figures.")
    if not report.artifacts:
        words.append("No artifacts: nothing was exported, so there is neither a gate nor a latency.")
    elif all(a.p50 is None for a in report.artifacts):
        words.append("No latency: none of the artifacts was benchmarked.")
    return words


# ---- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    text: str
    tone: str = ""


def _model_rows(models: Models) -> list[tuple[str, dict[str, Cell]]]:
    """(metric, cells by column): the three arms, then the student against baseline and teacher."""
    rows = []
    for label, key, digits in (
        ("mAP", "map", 1),
        ("AP50", "map50", 1),
        ("AP75", "map75", 1),
        ("Params, M", "params_m", 2),
        ("GFLOPs", "gflops", 2),
    ):
        values = {arm: getattr(getattr(models, arm), key) if getattr(models, arm) else None for arm in ARMS}
        cells = {arm: Cell(_text(values[arm], digits)) for arm in ARMS}
        for other in ("baseline", "teacher"):
            mine, theirs = values["student"], values[other]
            if mine is None or theirs is None:
                cells["vs_" + other] = Cell("–")
            elif key.startswith("map"):
                cells["vs_" + other] = _delta(mine - theirs, judge=other == "baseline")
            elif theirs > 0 and mine > 0:
                cells["vs_" + other] = Cell("same" if mine == theirs else _ratio(theirs, mine))
            else:
                cells["vs_" + other] = Cell("–")
        rows.append((label, cells))
    return rows


def _pseudo_labels(report: Report) -> list[str]:
    """What teachers labelled, in sentences; empty where they did not."""
    found, student = report.pseudo_labels, report.models.student
    if found is None:
        return []
    teachers = ", ".join(found.teachers) or "teachers"
    images = f"{found.labelled_images:,} images with labels, and on {found.images:,} that {teachers} labelled"
    words = [
        f"The student was trained on {images}: {found.labels:,} boxes, and {found.regions:,} regions that are neither "
        "object nor background."
    ]
    if found.skipped:
        words.append(f"{found.skipped:,} images could not be read and were left out.")
    if found.first_stage_map is not None and student is not None and student.map is not None:
        words.append(
            f"Fine-tuning on the images with labels took it from {found.first_stage_map:.1f} to {student.map:.1f} mAP."
        )
    return words


def _artifact_row(a: Artifact) -> dict[str, Any]:
    latency = {
        name: _text(getattr(a.latency_ms, name) if a.latency_ms else None, 2) for name in ("p50", "p90", "p95", "p99")
    }
    word, _, why = a.gate.partition(":")
    return {
        "file": a.file,
        "backend": a.backend or "–",
        "precision": a.precision or "–",
        "size": _text(a.size_mb, 1),
        "map": _text(a.map, 1),
        "drop": _text(a.map_drop, 2),
        "agreement": "–" if a.agreement is None else f"{100 * a.agreement:.1f} %",
        "throughput": _text(a.throughput_ips, 0 if (a.throughput_ips or 0) >= 100 else 1),
        "gate": word,
        "why": why.strip(),
        "gate_class": {"pass": "pass", "fail": "fail"}.get(word, "notrun"),
        "timed": a.p50 is not None,
        **latency,
    }


def _class_rows(models: Models) -> list[dict[str, Any]]:
    """A row a class, best student AP first (the teacher's or baseline's where there is no student)."""
    per_class: dict[str, dict[str, float | None]] = {
        arm: figures.per_class for arm in ARMS if (figures := getattr(models, arm)) and figures.per_class
    }
    names = list(dict.fromkeys(name for figures in per_class.values() for name in figures))
    order = per_class.get("student") or next(iter(per_class.values()), {})

    def rank(name: str) -> float:
        value = order.get(name)
        return 1.0 if value is None else -value

    rows = []
    for name in sorted(names, key=rank):
        bars = [(arm, figures.get(name), _text(figures.get(name), 1)) for arm, figures in per_class.items()]
        mine, base = per_class.get("student", {}).get(name), per_class.get("baseline", {}).get(name)
        rows.append(
            {
                "name": name,
                "bars": bars,
                "delta": Cell("–") if mine is None or base is None else _delta(mine - base, judge=True),
            }
        )
    return rows


# ---- charts ------------------------------------------------------------------------------------------------


def _trade_chart(models: Models, artifacts: Sequence[Artifact]) -> Markup | None:
    spots = [
        Spot(a.file, a.p50, a.map, {"pass": "pass", "fail": "fail"}.get(a.gate, "notrun"))
        for a in artifacts
        if a.p50 is not None and a.map is not None
    ]
    if not spots:
        return None
    levels = [
        (arm, f"{arm} {figures.map:.1f}", figures.map)
        for arm in ("teacher", "baseline")
        if (figures := getattr(models, arm)) and figures.map is not None
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
            ranges.append(Range(a.file, values))
    if not ranges:
        return None
    words = "; ".join(f"{r.label}: {r.values[0]:.2f} to {r.values[-1]:.2f} ms" for r in ranges)
    return range_chart(ranges, title=f"Latency percentiles. {words}", x_label="latency, ms")


@dataclass(frozen=True)
class Curve:
    title: str
    note: str
    svg: Markup
    key: list[tuple[str, str]]  # CSS class and name of each line


def _curves(document: Document) -> list[Curve]:
    """mAP and detection loss first, then the parts of the loss, then what the methods add."""
    metrics = document.metrics
    arms: list[str] = [a for a in ("baseline", "student") if a in metrics] or [a for a in ARMS if a in metrics]
    curves = []

    def add(
        title: str, note: str, columns: Mapping[str, list[tuple[float, float]]], y_label: str, **options: Any
    ) -> None:
        colours = (f"s{index % _LINE_COLOURS}" for index in range(len(columns)))
        series = [
            Series(name if name in ARMS else colour, points, name)
            for (name, points), colour in zip(columns.items(), colours, strict=True)
            if points
        ]
        if series:
            last = ", ".join(f"{s.label} ends at {s.points[-1][1]:.4g}" for s in series)
            chart = line_chart(series, title=f"{title} by step: {last}", y_label=y_label, **options)
            curves.append(
                Curve(
                    title, note, chart, [(s.kind, s.label.capitalize() if s.label in ARMS else s.label) for s in series]
                )
            )

    teacher = document.report.models.teacher
    level = (f"teacher {teacher.map:.1f}", teacher.map) if teacher and teacher.map is not None else None
    add(
        "Validation mAP",
        "Dotted: the teacher's final mAP." if level else "Of the checkpoints while training.",
        {a: metrics[a].columns.get("map", []) for a in arms},
        "mAP, percent",
        level=level,
        marks=True,
    )
    sums = {a: _detection_loss(metrics[a]) for a in arms}
    if any(sums.values()):
        add("Detection loss", "Distillation terms left out, so that the arms compare.", sums, "loss")
    else:
        add(
            "Training loss",
            "Everything that is minimised, distillation included.",
            {a: metrics[a].columns.get("loss", []) for a in arms},
            "loss",
        )
    for column in DETECTION_LOSSES:
        add(_LOSS_NAMES[column], "", {a: metrics[a].columns.get(column, []) for a in arms}, "loss")
    student = metrics.get("student")
    if student is not None:  # whatever is not of the detector or of the loop is a method's
        single = [c for c in student.columns if c not in _KNOWN_COLUMNS]
        for group in _method_charts(single):
            lines = {name: student.columns[c] for name, c in group.lines.items()}
            far = _far_apart(list(lines.values()))
            note = group.note + " Logarithmic axis." * far
            add(group.title, note, lines, group.y_label, logarithmic=far)
            single = [c for c in single if c not in group.lines.values()]
        for column in single:
            add(f"Distillation: {column}", "", {"student": student.columns[column]}, "loss")
    return curves


def _far_apart(lines: Sequence[Sequence[tuple[float, float]]]) -> bool:
    """Several lines, all above 0, whose means are more than a factor of 15 apart."""
    drawn = [[y for _, y in points] for points in lines]
    means = [sum(ys) / len(ys) for ys in drawn]
    return len(drawn) > 1 and min(map(min, drawn)) > 0 and max(means) > 15 * min(means)


@dataclass(frozen=True)
class _Group:
    """Columns of one chart: name of the line → column."""

    title: str
    note: str
    y_label: str
    lines: dict[str, str]


def _method_charts(columns: Sequence[str]) -> list[_Group]:
    """The charts of `grad_<method>`, `scale_<method>` and `variance_<level>_<method>`, in this order."""
    norms = {c.removeprefix("grad_"): c for c in columns if c.startswith("grad_")}
    norms = {"detection": norms.pop("detection"), **norms} if "detection" in norms else norms
    scales = {c.removeprefix("scale_"): c for c in columns if c.startswith("scale_")}
    variances: dict[str, dict[str, str]] = {}
    for column in columns:
        kind, _, of = column.partition("_")
        level, _, method = of.partition("_")
        if kind == "variance" and method:
            variances.setdefault(method, {})[level.upper()] = column
    groups = [
        _Group("Gradient norms", "Of each loss at the student's pyramid, automatic weights included.", "norm", norms),
        _Group("Automatic weights", "The factor that weight: auto gives to a method.", "factor", scales),
    ]
    for method, levels in variances.items():
        note = f"Of the pyramid maps over the dropout samples of {method}, mean of a level."
        groups.append(_Group(f"Teacher's variance: {method}", note, "variance", dict(sorted(levels.items()))))
    return [group for group in groups if group.lines]


def _detection_loss(metrics: Metrics) -> list[tuple[float, float]]:
    """The sum of the detection losses at the steps that have them all."""
    parts = [dict(metrics.columns[c]) for c in DETECTION_LOSSES if c in metrics.columns]
    if len(parts) < len(DETECTION_LOSSES):
        return []
    return [(step, sum(p[step] for p in parts)) for step in sorted(set.intersection(*(set(p) for p in parts)))]


# ---- figures as text ---------------------------------------------------------------------------------------


def _date(text: str) -> str:
    """`11 February 2026, 10:24 UTC` from ISO 8601; any other text as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{moment.day} {moment:%B %Y, %H:%M %Z}".rstrip()


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else "−") + text


def _delta(value: float, *, judge: bool) -> Cell:
    text = _signed(value, 1)
    return Cell(text, ("good" if text[0] == "+" else "bad" if text[0] == "−" else "") if judge else "")


def _ratio(big: float, small: float) -> str:
    return f"{big / small:.1f}× smaller" if big >= small else f"{small / big:.1f}× larger"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Any:
    """(key, text) rows of a nested mapping; a list is one row."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple):
            yield prefix + str(key), ", ".join(str(i) for i in item) or "none"
        else:
            yield (
                prefix + str(key),
                "none" if item is None else "yes" if item is True else "no" if item is False else str(item),
            )
