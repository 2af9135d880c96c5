"""The curves of the trainings: mAP, losses, and what methods report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from compress.manifest import BASELINE, FINE_TUNED, STUDENT
from compress.report.charts import Series, line_chart
from compress.report.reading import Document, Metrics

DETECTION = "loss_"
"""Columns of the detector's own losses begin so; those of methods with the method's name."""
_KNOWN_COLUMNS = {"step", "epoch", "seconds", "lr", "loss", "grad_norm", "map", "map50", "map75"}
_LINE_COLOURS = 6  # classes .s0 … .s5 of the style sheet
_OF_GFL = {
    "loss_cls": "Classification (QFL)",
    "loss_bbox": "Box (GIoU)",
    "loss_dfl": "Distribution (DFL)",
}


@dataclass(frozen=True)
class Curve:
    """A chart. key: CSS class and name of each line."""

    title: str
    note: str
    svg: Markup
    key: list[tuple[str, str]]


def curves(document: Document) -> list[Curve]:
    """mAP and detection loss first, then the parts of the loss, then what the methods add."""
    metrics, models = document.metrics, document.report.models
    titles = models.titles
    compared = [role for role in (BASELINE, FINE_TUNED, STUDENT) if role in titles and role in metrics]
    roles = compared or [role for role in titles if role in metrics]
    drawn: list[Curve] = []

    def add(
        title: str, note: str, columns: Mapping[str, list[tuple[float, float]]], y_label: str, **options: Any
    ) -> None:
        colours = (f"s{index % _LINE_COLOURS}" for index in range(len(columns)))
        series = [
            Series(name.replace(".", "-") if name in titles else colour, points, name)
            for (name, points), colour in zip(columns.items(), colours, strict=True)
            if points
        ]
        if series:
            last = ", ".join(f"{s.label} ends at {s.points[-1][1]:.4g}" for s in series)
            chart = line_chart(series, title=f"{title} by step: {last}", y_label=y_label, **options)
            drawn.append(
                Curve(
                    title,
                    note,
                    chart,
                    [(s.kind, titles.get(s.label, s.label)) for s in series],
                )
            )

    teacher = models.teacher
    level = (f"teacher {teacher.map:.1f}", teacher.map) if teacher and teacher.map is not None else None
    add(
        "Validation mAP",
        ("Dotted: the teacher's final mAP." if level else "Of the checkpoints while training.")
        + (" At step 0: as it was cut." if models.is_pruned else ""),
        {role: _start(role, document) + metrics[role].columns.get("map", []) for role in roles},
        "mAP, percent",
        level=level,
        marks=True,
    )
    own = {a: _own_losses(metrics[a]) for a in roles}
    if any(own.values()) and len({frozenset(found) for found in own.values() if found}) == 1:
        sums = {a: _detection_loss(metrics[a], own[a]) for a in roles}
        add("Detection loss", "Distillation terms left out, so that the roles compare.", sums, "loss")
    else:
        add(
            "Training loss",
            "Everything that is minimised, distillation included.",
            {a: metrics[a].columns.get("loss", []) for a in roles},
            "loss",
        )
    columns = list(dict.fromkeys(column for found in own.values() for column in found))
    names = _OF_GFL if set(columns) == set(_OF_GFL) else {}
    for column in columns:
        title = names.get(column, f"Detection: {column.removeprefix(DETECTION)}")
        add(title, "", {a: metrics[a].columns.get(column, []) for a in roles}, "loss")
    student = metrics.get("student")
    if student is not None:  # what is not of the detector or of the loop is a method's
        single = [c for c in student.columns if c not in _KNOWN_COLUMNS and not c.startswith(DETECTION)]
        for group in _method_charts(single):
            lines = {name: student.columns[c] for name, c in group.lines.items()}
            far = _far_apart(list(lines.values()))
            note = group.note + " Logarithmic axis." * far
            add(group.title, note, lines, group.y_label, logarithmic=far)
            single = [c for c in single if c not in group.lines.values()]
        for column in single:
            add(f"Distillation: {column}", "", {"student": student.columns[column]}, "loss")
    return drawn


def _start(role: str, document: Document) -> list[tuple[float, float]]:
    """The mAP before any training, where it begins with the weights that a cut left."""
    pruned, pseudo = document.report.models.pruned, document.report.pseudo_labels
    again = role == STUDENT and pseudo is not None and pseudo.first_stage_map is not None
    if role not in (FINE_TUNED, STUDENT) or again or pruned is None or pruned.map is None:
        return []
    return [(0.0, pruned.map)]


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


def _own_losses(metrics: Metrics) -> list[str]:
    """Columns of the detector's own losses that hold something."""
    return [column for column, points in metrics.columns.items() if column.startswith(DETECTION) and points]


def _detection_loss(metrics: Metrics, columns: Sequence[str]) -> list[tuple[float, float]]:
    """The sum of the detection losses at the steps that have them all."""
    if not columns:
        return []
    parts = [dict(metrics.columns[column]) for column in columns]
    return [(step, sum(p[step] for p in parts)) for step in sorted(set.intersection(*(set(p) for p in parts)))]
