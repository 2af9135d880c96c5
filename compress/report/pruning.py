"""The section on pruning: what was asked for and found, what is left of each layer, and how sensitive the layers are.

Public: `pruning_section(report)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compress.report.charts import Kept, Series, kept_chart, line_chart
from compress.report.document import LayerSensitivity, PrunedLayer, Pruning, PruningLatency, Report, Sensitivity
from compress.report.headline import Tile
from compress.report.text import figure, percent

TOLD_APART = 6  # lines in colours of their own, classes .s0 … .s5 of the style sheet
ONE_COLUMN = 8  # layers that are drawn below each other; more stand in two columns


@dataclass(frozen=True)
class SensitivityRow:
    """values: for each of the section's shares the mAP and the share it is of, as text; dashes where the layer has no
    width near it."""

    name: str
    width: str
    left: str
    values: list[tuple[str, str]]
    lost: str


@dataclass(frozen=True)
class SensitivityPart:
    """picture: lines of all layers, those of `key` told apart. rows: the same in figures, the most sensitive layer
    first, at about `shares` of the channels."""

    images: str
    map: str
    picture: Markup
    key: list[tuple[str, str]]
    shares: list[str]
    rows: list[SensitivityRow]


@dataclass(frozen=True)
class LatencyPart:
    """picture: latency of each file that was timed; None: of too few. facts: by name. lines: what went wrong."""

    picture: Markup | None
    facts: list[tuple[str, str]]
    lines: list[str]


@dataclass(frozen=True)
class PruningSection:
    """note: where much less is left than asked for. widths: picture of the channels that are left, in one or two
    columns. latency, sensitivity: where measured."""

    tiles: list[Tile]
    note: str | None
    widths: list[Markup]
    latency: LatencyPart | None
    sensitivity: SensitivityPart | None


def pruning_section(report: Report) -> PruningSection | None:
    """What the page shows of `pruning` in report.json; None where it holds none."""
    found = report.pruning
    if found is None or not found.rows:
        return None
    return PruningSection(
        _tiles(report, found), found.note, _widths(found.rows), _latency(found.latency), _sensitivity(found)
    )


# --- details --------------------------------------------------------------------------------------------


def _tiles(report: Report, found: Pruning) -> list[Tile]:
    pruned, student = report.models.pruned, report.models.student
    cut = [row for row in found.rows if row.left < row.width]
    row = [
        _budget(found),
        Tile("Groups of channels", f"{len(cut)} of {len(found.rows)}", "", "lose some of their channels"),
    ]
    if pruned is not None and pruned.map is not None:
        after = "not measured after training" if student is None else f"{figure(student.map, 1)} after training"
        row.append(Tile("mAP before training", figure(pruned.map, 1), "", after))
    if found.importance:
        how = {"once": "in one cut", "iterative": "in several cuts"}.get(found.schedule, "")
        row.append(Tile("Importance", found.importance, "", ", ".join(filter(None, (f"shares: {found.shares}", how)))))
    return row


def _budget(found: Pruning) -> Tile:
    if found.budget == "max_map_drop":
        note = f"of {found.whole:.1f} on training images, not trained; asked for at most {found.asked:g} less"
        return Tile("mAP left", f"{found.found:.1f}", "", note)
    share = percent(found.found / found.whole, 1) if found.whole else "–"
    if found.budget == "latency_ms":
        note = f"of {found.whole:.3g} ms, {share}; asked for {found.asked:g} ms"
        return Tile("Latency, median", f"{found.found:.3g}", "ms", note)
    what, unit = {"gflops": ("Operations left", "GFLOPs"), "params": ("Parameters left", "M")}[found.budget]
    note = f"{found.found:.3g} of {found.whole:.3g} {unit}; asked for {percent(found.asked)}"
    return Tile(what, share, "", note)


def _widths(rows: Sequence[PrunedLayer]) -> list[Markup]:
    """Layers under the first part of their names; two columns of about the same height where there are many."""
    half = -(-len(rows) // 2) if len(rows) > ONE_COLUMN else len(rows)
    return [_column(rows[start : start + half]) for start in range(0, len(rows), half)]


def _column(rows: Sequence[PrunedLayer]) -> Markup:
    parts: dict[str, list[Kept]] = {}
    for row in rows:
        part, _, rest = row.name.partition(".")
        parts.setdefault(part, []).append(Kept(rest or part, row.name, row.width, row.left))
    words = "; ".join(f"{row.name} {row.left} of {row.width}" for row in rows)
    return kept_chart(list(parts.items()), title=f"Channels left. {words}")


def _latency(found: PruningLatency | None) -> LatencyPart | None:
    if found is None:
        return None
    runs = f"{found.precision} file" + (f" on {', '.join(found.providers)}" if found.providers else "")
    facts = [
        ("Timed", f"the exported {runs}, one image"),
        ("Asked for", f"{found.asked:g} ms"),
        ("Found", f"{found.median_ms:.3g} ms, 95 % interval {found.interval_ms[0]:.3g} to {found.interval_ms[1]:.3g}"),
        ("Whole detector", f"{found.whole_ms:.3g} ms"),
        ("Noise", f"the same file against itself: {found.aa_ratio[0]:.3f} to {found.aa_ratio[1]:.3f} times as long"),
        ("Detectors timed", f"{len(found.trials)}"),
    ]
    picture = None
    if len(found.trials) > 1:
        words = "; ".join(f"{gflops:.3g} GFLOPs {ms:.3g} ms" for gflops, ms in sorted(found.trials))
        picture = line_chart(
            [Series("student", sorted(found.trials), "file")],
            title=f"Latency of files against operations. {words}",
            x_label="GFLOPs",
            y_label="median latency, ms",
            level=(f"asked for {found.asked:g} ms", found.asked),
            marks=True,
        )
    return LatencyPart(picture, facts, [*([found.note] if found.note else []), *found.warnings])


def _sensitivity(found: Pruning) -> SensitivityPart | None:
    measured = found.sensitivity
    rows = [] if measured is None else sorted((row for row in measured.rows if row.points), key=_least_map)
    if measured is None or not rows:
        return None
    # The row with the most points names the columns; other rows have shares near these, or fewer.
    shares = [share for share, _ in max(rows, key=lambda row: len(row.points)).points]
    layers = {layer.name: layer for layer in found.rows}
    picture, key = _lines(measured, rows)
    return SensitivityPart(
        f"{measured.images:,}",
        f"{measured.map:.1f}",
        picture,
        key,
        [percent(share) for share in shares],
        [_row(measured, row, layers.get(row.name), shares) for row in rows],
    )


def _least_map(row: LayerSensitivity) -> float:
    return min(value for _, value in row.points)


def _lines(measured: Sensitivity, rows: Sequence[LayerSensitivity]) -> tuple[Markup, list[tuple[str, str]]]:
    """Lines of all rows, the first of them told apart and drawn last; and their key."""
    series = []
    for index, row in enumerate(rows):
        points = sorted([(100 * share, value) for share, value in row.points] + [(100.0, measured.map)])
        series.append(Series(f"s{index}" if index < TOLD_APART else "rest", points, row.name))
    words = "; ".join(f"{row.name} down to {_least_map(row):.1f}" for row in rows)
    chart = line_chart(
        series[::-1],
        title=f"mAP against the share of channels kept. {words}",
        x_label="channels kept, percent",
        y_label="mAP, percent",
        from_zero=False,
        marks=True,
    )
    key = [(s.kind, s.label) for s in series[:TOLD_APART]]
    return chart, key + [("rest", f"{len(rows) - TOLD_APART} other layers")] * (len(rows) > TOLD_APART)


def _row(
    measured: Sensitivity, row: LayerSensitivity, layer: PrunedLayer | None, shares: list[float]
) -> SensitivityRow:
    values = [("–", "")] * len(shares)
    for share, value in row.points:
        nearest = min(range(len(shares)), key=lambda index: abs(shares[index] - share))
        values[nearest] = f"{value:.1f}", f"at {percent(share)}"
    return SensitivityRow(
        row.name,
        str(layer.width) if layer else "–",
        str(layer.left) if layer else "–",
        values,
        figure(measured.map - _least_map(row), 1),
    )
