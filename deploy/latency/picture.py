"""Latency by percentile as one SVG: a panel a scope, a line an artifact and batch size.

The horizontal axis is logarithmic in 1 - p, so that p90, p99 and p99.9 are equally far apart: a long tail is a line
that rises to the right. A line ends where the calls no longer support the percentile. Colours follow the reader's
light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from deploy.latency.results import Cell
from deploy.latency.statistics import BEYOND

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 34, 44
_TICKS = (50.0, 90.0, 95.0, 99.0, 99.9, 99.99)
_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#a6459b", "#8a6d00", "#c03028")
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.grid{stroke:#8884}.line{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def latency_picture(cells: Sequence[Cell]) -> str:
    """The SVG document. Cells of one scope share a panel."""
    panels = list(dict.fromkeys((cell.scenario, cell.scope) for cell in cells))
    parts, top = [], 0
    for panel in panels:
        mine = [cell for cell in cells if (cell.scenario, cell.scope) == panel]
        parts.append(f'<g transform="translate(0,{top})">{_panel(", ".join(panel), mine)}</g>')
        top += HEIGHT + 18 * len(mine)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(top, 1)}" role="img">'
        f"<title>Latency by percentile</title><style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


# ----------------------------------------------------------------------------------------------------


def _panel(title: str, cells: Sequence[Cell]) -> str:
    samples = [np.sort(np.concatenate([np.asarray(part) for part in cell.samples_ms])) for cell in cells]
    end = min(max(max(1 - BEYOND / max(map(len, samples)), 0.9), 0.5), 0.9999)
    curves = []
    for values in samples:
        last = min(end, max(1 - BEYOND / len(values), 0.5))
        shares = 1 - np.geomspace(0.5, 1 - last, 80)
        curves.append((shares, np.quantile(values, shares)))
    lowest = min(float(values[int(0.01 * len(values))]) for values in samples)
    highest = max(float(curve.max()) for _, curve in curves)
    y_ticks = _steps(0.0 if lowest < 0.5 * highest else lowest, highest)
    bottom, top = y_ticks[0], y_ticks[-1]

    def x_of(share: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * math.log(2 * (1 - share)) / math.log(2 * (1 - end))

    def y_of(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - bottom) / (top - bottom)

    parts = [f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>']
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for percent in _TICKS:
        if percent / 100 <= end + 1e-9:
            x = x_of(percent / 100)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">p{percent:g}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">ms</text>'
    )
    for index, (cell, (shares, curve)) in enumerate(zip(cells, curves, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        dash = f' stroke-dasharray="{4 + index // len(_COLOURS)} 3"' if index >= len(_COLOURS) else ""
        points = " ".join(f"{x_of(s):.1f},{y_of(v):.1f}" for s, v in zip(shares, curve, strict=True))
        parts.append(f'<polyline class="line" stroke="{colour}"{dash} points="{points}"/>')
        for name, found in cell.latency_ms.items():
            share = float(name[1:]) / 100
            if found.low is not None and found.high is not None and share <= end + 1e-9:
                low, high = (min(max(y_of(v), _TOP - 8), HEIGHT - _BOTTOM + 4) for v in (found.low, found.high))
                x = x_of(share)
                parts.append(f'<line stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        y = HEIGHT + 18 * index - 4
        parts.append(
            f'<line stroke="{colour}" stroke-width="2"{dash} x1="{_LEFT}" x2="{_LEFT + 24}" y1="{y}" y2="{y}"/>'
        )
        label = f"{cell.runner} ({cell.backend}), {cell.where.removeprefix(title + ', ')}"
        parts.append(f'<text x="{_LEFT + 32}" y="{y + 4}">{escape(label)}</text>')
    return "".join(parts)


def _steps(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-3)
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.floor(low / step)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]
