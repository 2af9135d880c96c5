"""The trade-off that a guided search found, as a table for the terminal and as an SVG picture."""

from __future__ import annotations

from html import escape

from rich.table import Table

from deploy.quantize.guided import GuidedResult, Trial

_SHOWN = 24  # layers; the rest hardly matters
_TEXT, _INK, _FAINT, _FLOAT, _INT8, _LIMIT = "#24292f", "#57606a", "#d0d7de", "#cf6a32", "#3572a5", "#b3261e"


def sensitivity_table(result: GuidedResult) -> Table:
    """A row a layer, most sensitive first. Without a sweep (the whole network met the budget): the trials only."""
    table = Table(title=_title(result))
    table.add_column("layer")
    for heading in ("score error", "box error", "kept in"):
        table.add_column(heading, justify="right")
    kept = set(result.chosen.float_layers) if result.chosen else set()
    for row in result.sensitivities:
        place = "float" if row.layer in kept else "int8" if result.chosen else "-"
        table.add_row(row.layer, f"{row.score_error:.2%}", f"{row.box_error:.2%}", place)
    return table


def trials_table(result: GuidedResult) -> Table:
    """A row a measured choice, in the order of measuring."""
    table = Table(title=f"mAP on the search split; float: {result.float_map:.2f}")
    for heading in ("layers in float", "mAP", "drop", "budget"):
        table.add_column(heading, justify="right")
    for trial in result.trials:
        verdict = "met" if trial.map_drop <= result.budget + 1e-9 else "missed"
        mark = " ←" if trial == result.chosen else ""
        table.add_row(
            f"{len(trial.float_layers)} of {result.layers}",
            f"{trial.map:.2f}",
            f"{trial.map_drop:+.2f}",
            verdict + mark,
        )
    return table


def trade_off_svg(result: GuidedResult) -> str:
    """Left: the error that each layer causes alone. Right: loss of mAP against the layers that stay in float."""
    rows = result.sensitivities[:_SHOWN]
    height = 90 + 16 * max(len(rows), 14)
    left = _bars(result, height) if rows else ""
    right = _scatter(result, 560 if rows else 60, height)
    width = 980 if rows else 480
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui,sans-serif" '
        f'font-size="11" fill="{_TEXT}" role="img"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="16" y="24" font-size="14" font-weight="600">{escape(_title(result))}</text>{left}{right}</svg>\n'
    )


# ----------------------------------------------------------------------------------------------------


def _title(result: GuidedResult) -> str:
    if result.chosen is None:
        return f"A budget of {result.budget:g} mAP points cannot be met"
    return (
        f"{len(result.chosen.float_layers)} of {result.layers} layers in float: "
        f"{result.chosen.map_drop:+.2f} mAP points lost, budget {result.budget:g}"
    )


def _bars(result: GuidedResult, height: int) -> str:
    rows = result.sensitivities[:_SHOWN]
    kept = set(result.chosen.float_layers) if result.chosen else set()
    largest = max(row.error for row in rows) or 1.0
    parts = [f'<text x="16" y="48" fill="{_INK}">Output error of a layer quantized alone (score + box)</text>']
    for index, row in enumerate(rows):
        y = 60 + 16 * index
        color = _FLOAT if row.layer in kept else _INT8
        long = max(1.0, 220 * row.error / largest)
        parts.append(
            f'<text x="196" y="{y + 10}" text-anchor="end">{escape(row.layer[-32:])}</text>'
            f'<rect x="204" y="{y}" width="{long:.1f}" height="12" fill="{color}"/>'
            f'<text x="{210 + long:.1f}" y="{y + 10}" fill="{_INK}">{row.error:.2%}</text>'
        )
    hidden = len(result.sensitivities) - len(rows)
    more = f"; {hidden} less sensitive layers are not shown" if hidden else ""
    parts.append(
        f'<text x="204" y="{height - 12}"><tspan fill="{_FLOAT}">■</tspan> float <tspan fill="{_INT8}">■</tspan> int8'
        f"{more}</text>"
    )
    return "".join(parts)


def _scatter(result: GuidedResult, x0: int, height: int) -> str:
    top, bottom, width = 70, height - 50, 380
    most = max((len(trial.float_layers) for trial in result.trials), default=1)
    drops = [trial.map_drop for trial in result.trials] + [result.budget, 0.0]
    low, high = min(drops), max(drops)
    span = (high - low) or 1.0

    def place(trial: Trial) -> tuple[float, float]:
        return x0 + width * len(trial.float_layers) / max(most, 1), y_of(trial.map_drop)

    def y_of(drop: float) -> float:
        return top + (bottom - top) * (high - drop) / span

    parts = [
        f'<text x="{x0 - 30}" y="48" fill="{_INK}">Loss of mAP (points) by layers kept in float</text>',
        f'<line x1="{x0}" x2="{x0}" y1="{top}" y2="{bottom}" stroke="{_FAINT}"/>',
        f'<line x1="{x0}" x2="{x0 + width}" y1="{bottom}" y2="{bottom}" stroke="{_FAINT}"/>',
        f'<line x1="{x0}" x2="{x0 + width}" y1="{y_of(result.budget):.1f}" y2="{y_of(result.budget):.1f}" '
        f'stroke="{_LIMIT}" stroke-dasharray="4 3"/>',
        f'<text x="{x0 + width}" y="{y_of(result.budget) - 4:.1f}" text-anchor="end" fill="{_LIMIT}">budget</text>',
        f'<text x="{x0}" y="{bottom + 16}" text-anchor="middle">0</text>',
        f'<text x="{x0 + width}" y="{bottom + 16}" text-anchor="middle">{most}</text>',
    ]
    for value in sorted({low, high}):
        parts.append(f'<text x="{x0 - 6}" y="{y_of(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for trial in result.trials:
        x, y = place(trial)
        chosen = trial == result.chosen
        color = _INT8 if trial.map_drop <= result.budget + 1e-9 else _LIMIT
        ring = f' stroke="{_TEXT}" stroke-width="2"' if chosen else ""
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if chosen else 4}" fill="{color}"{ring}/>')
    return "".join(parts)
