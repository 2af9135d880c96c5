"""The one painter of pictures, as SVG: a line of dots for each variant, or curves of one figure against another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, TOP = 700, 26, 56
BLUE, ORANGE, GREY = "#1f6f8b", "#c2410c", "#555"
COLOURS = ("#555", "#1f6f8b", "#2e7d32", "#7b3fa0", "#c2410c", "#b8860b", "#d81b60", "#111")
CURVES = 320  # height of the area of curves
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Line:
    """values: a dot each; mean: a diamond; interval: a bar behind them, cut at the edges."""

    label: str
    values: Sequence[float]
    mean: float | None = None
    interval: tuple[float, float] | None = None


def dots(title: str, legend: str, lines: Sequence[Line], *, signed: bool = False, unit: str = "") -> str:
    """The picture; its axis always has zero. signed: ticks say + and -. Raises ValueError without a line."""
    if not lines:
        raise ValueError(f"{title}: nothing to draw")
    ends = [x for line in lines for x in (*line.values, *([] if line.mean is None else [line.mean]))]
    margin = 0.05 * (max(0.0, *ends) - min(0.0, *ends)) or 1.0
    low, high = min(0.0, *ends) - (margin if signed else 0.0), max(0.0, *ends) + margin
    left, right = 30 + min(400, round(8 * max(len(line.label) for line in lines))), WIDTH - 40
    height = TOP + ROW * len(lines) + 40

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    parts = _head(title, legend, height)
    for value in _ticks(low, high):
        x, text = x_of(value), f"{value:+g}" if signed and value else f"{value:g}"
        colour = "#ddd" if value else "#333"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 34}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 16}" text-anchor="middle" fill="{GREY}">{text}{unit}</text>')
    for index, line in enumerate(lines):
        parts += _line(line, TOP + ROW * index + 8, left, x_of)
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class Curve:
    """points: (x, y, half the length of the bar behind it or None). joined: by a line, with dots; else diamonds."""

    label: str
    points: Sequence[tuple[float, float, float | None]]
    joined: bool = True


def curves(title: str, legend: str, x_label: str, found: Sequence[Curve]) -> str:
    """The picture; its x axis begins at zero. Raises ValueError without a point."""
    points = [point for curve in found for point in curve.points]
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    ends = [y + sign * (half or 0.0) for _, y, half in points for sign in (-1, 1)]
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    right, low, high = 1.05 * max(x for x, _, _ in points) or 1.0, min(ends) - margin, max(ends) + margin
    left, edge, top, height = 46, WIDTH - 170, TOP, TOP + CURVES + 50

    def x_of(value: float) -> float:
        return left + value / right * (edge - left)

    def y_of(value: float) -> float:
        return top + (high - value) / (high - low) * CURVES

    parts = _head(title, legend, height)
    for value in _ticks(0.0, right):
        x = x_of(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + CURVES}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + CURVES + 16}" text-anchor="middle" fill="{GREY}">{value:g}</text>')
    for value in _ticks(low, high):
        y = y_of(value)
        parts.append(f'<line x1="{left}" x2="{edge}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{GREY}">{value:g}</text>')
    parts.append(f'<text x="{edge}" y="{top + CURVES + 36}" text-anchor="end" fill="{GREY}">{escape(x_label)}</text>')
    for index, curve in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        placed = [(x_of(x), y_of(y), y_of(y - half) - y_of(y) if half else 0.0) for x, y, half in sorted(curve.points)]
        parts += _curve(curve, placed, colour, (edge + 18, top + 10 + 20 * index))
    return "\n".join([*parts, "</svg>\n"])


def _curve(
    curve: Curve, placed: Sequence[tuple[float, float, float]], colour: str, name_at: tuple[float, float]
) -> list[str]:
    parts = []
    if curve.joined:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for x, y, half in [*placed, (*name_at, 0.0)]:
        if half:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - half:.1f}" y2="{y + half:.1f}" stroke="{colour}" '
                'stroke-width="2" opacity="0.45"/>'
            )
        mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        parts.append(mark if curve.joined else f'<path d="M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z" fill="{colour}"/>')
    x, y = name_at
    parts.append(f'<text x="{x + 10:.1f}" y="{y + 4:.1f}">{escape(curve.label)}</text>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two ends, at most ten."""
    step = next((step for step in STEPS if (high - low) / step <= 10), STEPS[-1])
    return [k * step for k in range(-int(-low // step), int(high // step) + 1)]


def _head(title: str, legend: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="16" y="40" fill="{GREY}">{escape(legend)}</text>',
    ]


def _line(line: Line, y: int, left: int, x_of: Callable[[float], float]) -> list[str]:
    parts = [f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(line.label)}</text>']
    if line.interval is not None:
        low, high = map(x_of, line.interval)
        parts.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{BLUE}" stroke-width="2" opacity="0.45"/>'
        )
    parts += [f'<circle cx="{x_of(v):.1f}" cy="{y}" r="3.5" fill="{BLUE}" opacity="0.6"/>' for v in line.values]
    if line.mean is not None:
        parts.append(f'<path d="M{x_of(line.mean):.1f} {y - 7}l6 7l-6 7l-6 -7z" fill="{ORANGE}"/>')
    return parts
