"""Section "Operating point" of the page: where the F1 of each file is best, and what other scores give."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from compress.report.charts import Point, Series, line_chart
from compress.report.document import Artifact, Report
from compress.report.text import figure

MOST_FILES = 6
"""Curves in a chart: as many as there are colours."""


@dataclass(frozen=True)
class Operating:
    """first: the point of the first file, in words. rows: file, and score, F1, precision and recall of its point.
    precision, f1: charts over recall and over the score. key: CSS class and file of each of their lines."""

    first: str
    rows: list[tuple[str, list[str]]]
    precision: Markup
    f1: Markup
    key: list[tuple[str, str]]


def operating_section(report: Report) -> Operating | None:
    """Of the files that were validated; None where none was, or none found anything right."""
    found = [a for a in report.artifacts if a.operating_point is not None and a.analysis and a.analysis.curve]
    if not found:
        return None
    points = [(a.label, a.operating_point) for a in found if a.operating_point is not None]
    first, drawn = points[0][1], found[:MOST_FILES]
    spots = [(p.recall, p.precision, p.score, p.f1) for _, p in points]
    key = [(f"s{index}", a.label) for index, a in enumerate(drawn)]
    over_recall, over_score = [], []
    for (kind, file), a, (recall, precision, score, f1) in zip(key, drawn, spots, strict=False):
        over_recall += [Series(kind, _over_recall(a), file), Series(kind, [(recall, precision)], file)]
        over_score += [Series(kind, _over_score(a), file), Series(kind, [(score, f1)], file)]
    return Operating(
        first=f"{points[0][0]}: {first.in_words()}, on {first.images:,} image{'' if first.images == 1 else 's'}",
        rows=[(f, [f"{p.score:g}", *(figure(x, 3) for x in (p.f1, p.precision, p.recall))]) for f, p in points],
        precision=_chart(over_recall, "Precision and recall", "recall", "precision", spots[0][:2]),
        f1=_chart(over_score, "F1 by score", "score", "F1", spots[0][2:]),
        key=key,
    )


# --- details --------------------------------------------------------------------------------------------


def _over_recall(a: Artifact) -> list[Point]:
    return [(recall, precision) for _, precision, recall in _curve(a)]


def _over_score(a: Artifact) -> list[Point]:
    """F1 by score, lowest first."""
    return [(score, 2 * p * r / (p + r) if p + r else 0.0) for score, p, r in reversed(_curve(a))]


def _curve(a: Artifact) -> list[tuple[float, float, float]]:
    return a.analysis.curve if a.analysis else []


def _chart(series: list[Series], title: str, x_label: str, y_label: str, best: Point) -> Markup:
    longest = max(len(s.points) for s in series)
    words = f"{title}: best F1 of {series[0].label} at {x_label} {best[0]:.3g}, {y_label} {best[1]:.3g}"
    return line_chart(series, title=words, x_label=x_label, y_label=y_label, x_end=1.0, most_points=longest)
