"""The one painter of pictures: a line of dots for each variant, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, TOP = 700, 26, 56
BLUE, ORANGE, GREY = "#1f6f8b", "#c2410c", "#555"
STEPS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


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
    left, right = 30 + min(400, round(6.3 * max(len(line.label) for line in lines))), WIDTH - 40
    height = TOP + ROW * len(lines) + 40

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="16" y="40" fill="{GREY}">{escape(legend)}</text>',
    ]
    step = next((step for step in STEPS if (high - low) / step <= 10), STEPS[-1])
    for k in range(-int(-low // step), int(high // step) + 1):
        x, text = x_of(k * step), f"{k * step:+g}" if signed and k else f"{k * step:g}"
        colour = "#ddd" if k else "#333"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 34}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 16}" text-anchor="middle" fill="{GREY}">{text}{unit}</text>')
    for index, line in enumerate(lines):
        parts += _line(line, TOP + ROW * index + 8, left, x_of)
    return "\n".join([*parts, "</svg>\n"])


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
