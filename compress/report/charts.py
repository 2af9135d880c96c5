"""Charts as inline SVG whose colours come from the page's style sheet, so they follow light and dark.

Public: `line_chart`, `scatter_chart`, `range_chart`, `kept_chart`. Each returns safe Markup: text that comes from
files goes through `Markup.format`, which escapes it. Coordinates are user units of the viewBox, WIDTH wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 48

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """`kind` is the CSS class that gives colour and dash: that of a model, s0 to s5 for anything else, or rest for
    lines that are not told apart."""

    kind: str
    points: Sequence[Point]
    label: str


@dataclass(frozen=True)
class Spot:
    """One labelled point of a scatter chart; `kind` has the CSS classes of its mark: pass, fail or notrun, and doubtful
    for an x that was not measured well."""

    label: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Range:
    """One row of a range chart: a bar to the first value, a whisker to the last, a tick at each between. doubtful:
    they were not measured well."""

    label: str
    values: Sequence[float]
    doubtful: bool = False


@dataclass(frozen=True)
class Kept:
    """One row of a chart of what is kept: so many of so many. `name` is the whole name, `label` the one to show."""

    label: str
    name: str
    whole: int
    left: int


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    level: tuple[str, float] | None = None,
    marks: bool = False,
    logarithmic: bool = False,
    from_zero: bool = True,
    x_end: float | None = None,
    most_points: int = 160,
) -> Markup:
    """Lines over a common x axis, y from 0 or from the lowest value. Longer series are drawn as means of equal runs of
    points.

    `level` is a labelled horizontal line of the teacher; `marks` draws each point; `logarithmic` is for values above 0;
    `x_end` is where the x axis ends, if not at the last value.
    """
    thinned = [Series(s.kind, thin(s.points, most_points), s.label) for s in series if s.points]
    xs = [x for s in thinned for x, _ in s.points]
    ys = [y for s in thinned for _, y in s.points] + ([level[1]] if level else [])
    x_end = max(max(xs), 1e-9) if x_end is None else x_end
    x_ticks = round_ticks(0, x_end)
    to_x = _scale(0, x_end, _LEFT, WIDTH - _RIGHT)
    if logarithmic:
        y_ticks = _few_log_ticks(min(ys), max(ys))
        to_y = _log_scale(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP)
        y_label += ", logarithmic"
    else:
        y_ticks = round_ticks(min([0, *ys] if from_zero else ys), max(*ys, 1e-9), 5)
        to_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = [_axes([t for t in x_ticks if t <= x_end], y_ticks, to_x, to_y, x_label, y_label)]
    if level:
        y = to_y(level[1])
        parts.append(
            Markup(
                '<line class="line teacher" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="note" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, WIDTH - _RIGHT, y, y, WIDTH - _RIGHT, y - 6 if y >= 15 else y + 15, level[0])
        )
    for s in thinned:
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in s.points)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(s.kind, path))
        if marks or len(s.points) == 1:
            parts += [
                Markup(
                    '<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="3.2">'
                    "<title>{}: {} {:g}, {:.4g}</title></circle>"
                ).format(s.kind, to_x(x), to_y(y), s.label, x_label, x, y)
                for x, y in s.points
            ]
    return _svg(parts, HEIGHT, title)


def scatter_chart(
    spots: Sequence[Spot],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[tuple[str, str, float]] = (),
) -> Markup:
    """Labelled points; the x axis is logarithmic where the values span more than a factor of 15.

    `levels` are horizontal lines (CSS class, label, y).
    """
    xs, ys = [s.x for s in spots], [s.y for s in spots] + [y for *_, y in levels]
    margin = max((max(ys) - min(ys)) * 0.15, 1.0)
    y_ticks = round_ticks(max(min(ys) - margin, 0), max(ys) + margin, 5)
    to_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    if min(xs) > 0 and max(xs) / min(xs) > 15:
        low, high = min(xs) * 0.7, max(xs) * 1.4
        x_ticks = [t for t in log_ticks(low, high) if low <= t <= high]
        to_x = _log_scale(low, high, _LEFT, WIDTH - _RIGHT)
        x_label += ", logarithmic"
    else:
        x_ticks = round_ticks(0, max(*xs, 1e-9) * 1.15)
        to_x = _scale(0, x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    parts = [_axes(x_ticks, y_ticks, to_x, to_y, x_label, y_label)]
    taken: list[tuple[float, float, float]] = []  # (left, right, baseline) of labels already placed
    for s in spots:
        taken.append((to_x(s.x) - 7, to_x(s.x) + 7, to_y(s.y) + 4))
    for role, label, value in sorted(levels, key=lambda item: item[2]):
        y = to_y(value)
        parts.append(
            Markup('<line class="line {}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                role, _LEFT, WIDTH - _RIGHT, y, y
            )
        )
        start = _LEFT + 6
        place = _free_baseline(start, start + 6.6 * len(label), (y - 5, y + 14), taken)
        parts.append(Markup('<text class="note" x="{}" y="{:.1f}">{}</text>').format(start, place, label))
    for s in sorted(spots, key=lambda s: -s.y):
        x, y = to_x(s.x), to_y(s.y)
        parts.append(_spot_mark(s, x, y))
        text = _shorten(s.label, 30)
        wide = 6.8 * len(text)
        right = x + 10 + wide <= WIDTH - _RIGHT
        left = x + 10 if right else max(x - 10 - wide, 2)
        places = tuple(y + 4 + d for d in (0, -14, 14, -28, 28, -42, 42, -56, 56))
        place = _free_baseline(left, left + wide, places, taken)
        anchor, text_x = ("start", left) if right else ("end", min(x - 10, WIDTH - 2))
        if abs(place - y - 4) > 10:
            parts.append(
                Markup('<line class="leader" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
                    x, y, text_x, place - 4
                )
            )
        parts.append(
            Markup('<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
                text_x, place, anchor, text
            )
        )
    return _svg(parts, HEIGHT, title)


def range_chart(ranges: Sequence[Range], *, title: str, x_label: str) -> Markup:
    """Horizontal rows from 0: bar to the first value, whisker with ticks up to the last."""
    row = 46
    height = _TOP + row * len(ranges) + _BOTTOM
    ticks = round_ticks(0, max(max(r.values) for r in ranges))
    to_x = _scale(0, ticks[-1], 14, WIDTH - _RIGHT)
    parts = [
        Markup(
            '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text class="tick" x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>'
        ).format(to_x(t), _TOP, height - _BOTTOM, height - _BOTTOM + 16, tick_text(t))
        for t in ticks
    ]
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(WIDTH / 2, height - 6, x_label)
    )
    for index, r in enumerate(ranges):
        y = _TOP + row * index
        middle = y + 30
        first, last = to_x(r.values[0]), to_x(r.values[-1])
        parts.append(Markup('<text class="label" x="14" y="{}">{}</text>').format(y + 15, _shorten(r.label, 52)))
        parts.append(
            Markup(
                '<rect class="bar {}" x="14" y="{}" width="{:.1f}" height="12" rx="2"/>'
                '<line class="whisker" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
            ).format(
                "doubtful" if r.doubtful else "student", middle - 6, max(first - 14, 1), first, last, middle, middle
            )
        )
        parts += [
            Markup('<line class="whisker" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                to_x(v), middle - 5, middle + 5
            )
            for v in r.values[1:]
        ]
    return _svg(parts, height, title)


def kept_chart(parts: Sequence[tuple[str, Sequence[Kept]]], *, title: str) -> Markup:
    """Rows under headings: a pale bar for the whole, over it the share of it that is left, both in numbers beside."""
    row, bars, wide = 20, 168, WIDTH - 92 - 168
    drawn, y = [], 4.0
    for heading, rows in parts:
        drawn.append(Markup('<text class="label heading" x="0" y="{}">{}</text>').format(y + 14, _shorten(heading, 40)))
        y += row + 2
        for kept in rows:
            words = f"{kept.left} of {kept.whole}"
            drawn.append(
                Markup(
                    '<g><title>{}: {}</title><text x="0" y="{}">{}</text>'
                    '<rect class="bar whole" x="{}" y="{}" width="{:.1f}" height="11" rx="2"/>'
                    '<rect class="bar student" x="{}" y="{}" width="{:.1f}" height="11" rx="2"/>'
                    '<text class="label" x="{}" y="{}" text-anchor="end">{}</text></g>'
                ).format(
                    *(kept.name, words, y + 13, _shorten(kept.label, 22)),
                    *(bars, y + 4, float(wide)),
                    *(bars, y + 4, max(wide * kept.left / kept.whole, 1)),
                    *(WIDTH, y + 13, words),
                )
            )
            y += row
        y += 8
    return _svg(drawn, y, title)


def _svg(parts: Sequence[Markup], height: float, title: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg>').format(
        WIDTH, height, title, title, Markup("").join(parts)
    )


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> Markup:
    parts = []
    for t in y_ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, WIDTH - _RIGHT, to_y(t), to_y(t), _LEFT - 7, to_y(t) + 4, tick_text(t))
        )
    for t in x_ticks:
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                to_x(t), HEIGHT - _BOTTOM + 18, tick_text(t)
            )
        )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 7, x_label
        )
    )
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup('<text class="axis up" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, y_label
        )
    )
    return Markup("").join(parts)


def _spot_mark(s: Spot, x: float, y: float) -> Markup:
    tip = f"{s.label}: {s.x:.4g} ms, mAP {s.y:.1f}"
    if s.kind.startswith("fail"):
        return Markup('<path class="spot {}" d="M{:.1f} {:.1f}l10 10m0 -10l-10 10"><title>{}</title></path>').format(
            s.kind, x - 5, y - 5, tip
        )
    return Markup('<circle class="spot {}" cx="{:.1f}" cy="{:.1f}" r="5.5"><title>{}</title></circle>').format(
        s.kind, x, y, tip
    )


def _free_baseline(
    left: float, right: float, places: Sequence[float], taken: list[tuple[float, float, float]]
) -> float:
    """The first of `places` where a label meets no other and stays inside; the first if there is none."""
    for place in places:
        inside = _TOP + 8 <= place <= HEIGHT - _BOTTOM - 3
        if inside and all(right < a or b < left or abs(place - y) >= 13 for a, b, y in taken):
            break
    else:
        place = places[0]
    taken.append((left, right, place))
    return place


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Means of equal runs of points, `most` of them; a shorter series as it is."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    runs = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    linear = _scale(math.log(low), math.log(high), start, end)
    return lambda value: linear(math.log(value))


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values from at or below `low` to at or above `high`, about `wanted` of them."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * wanted >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around `low` to `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5)]


def _few_log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, seven at most; also 2 and 5 times them where there are less than three."""
    powers = [10.0**p for p in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    if len(powers) < 3:
        return [t for t in log_ticks(low, high) if low <= t <= high]
    return powers[:: math.ceil(len(powers) / 7)]


def tick_text(value: float) -> str:
    """`20k`, `0.5`."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most // 2 - 1] + "…" + text[-(most // 2) :]
