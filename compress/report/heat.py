"""Heat maps of the teacher's uncertainty: the picture, its detections, and a heat map over the picture in grey.

Public: `draw_uncertainty(document, photos)`. One colour scale serves all pictures, so that they compare. The ramp
rises evenly in lightness, so it reads without colour too; it is transparent at 0, where the picture stays plain.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from compress.report.charts import round_ticks, tick_text
from compress.report.document import Report, Uncertainty
from compress.report.pictures import Panel, PhotoError, Photos, class_kinds, draw_boxes, photo_svg
from compress.report.reading import Document

RAMP = ((63, 0, 145), (138, 21, 146), (207, 48, 116), (255, 99, 60), (255, 175, 68), (252, 238, 12))
"""RGB at even steps: lightness 0.34 to 0.93 and hue 290° to 465° of OKLCH, chroma 0.2 or what sRGB holds."""

OPAQUE_FROM = 0.5  # share of the scale from which the heat hides most of the picture
MOST_OPAQUE = 0.9
LONGEST_SIDE = 320  # pixels of a heat map: it is smooth, the browser scales the rest
FLAT = 0.001  # standard deviations below this are not told apart from none


@dataclass(frozen=True)
class DrawnUncertainty:
    name: str
    problem: str | None
    panels: list[Panel]
    legend: list[tuple[str, str]]
    variance: str  # of the features by level, in words


@dataclass(frozen=True)
class UncertaintySection:
    pictures: list[DrawnUncertainty]
    how: str  # what was sampled
    scale: Markup  # the legend of the colours


def draw_uncertainty(document: Document, photos: Photos) -> UncertaintySection | None:
    """Draw the maps of report.json; None when it holds none."""
    entries = document.report.uncertainty
    if not entries:
        return None
    most = max(value for entry in entries for row in entry.values for value in row)
    ticks = round_ticks(0, max(most, FLAT), 4)
    return UncertaintySection(
        [_draw(entry, document.report, photos, ticks[-1]) for entry in entries], _how(entries), _legend(ticks)
    )


def _how(entries: Sequence[Uncertainty]) -> str:
    draws = sorted({(e.samples, e.rate) for e in entries})
    return " and ".join(f"{samples} samples at dropout rate {rate:g}" for samples, rate in draws)


def _draw(entry: Uncertainty, report: Report, photos: Photos, top: float) -> DrawnUncertainty:
    name = Path(entry.image).name
    try:
        size = photos.size(entry.image)
    except PhotoError as error:
        return DrawnUncertainty(name, str(error), [], [], "")
    boxes = entry.teacher
    kinds = class_kinds(boxes, report)
    found = f"{len(boxes)} detection{'' if len(boxes) == 1 else 's'}"
    values = entry.values
    most = max(max(row) for row in values)
    row = next(i for i, row in enumerate(values) if most in row)
    x, y = (round(i * step) for i, step in zip((values[row].index(most), row), entry.stride, strict=True))
    mean = sum(map(sum, values)) / sum(map(len, values))
    spread = f"largest {most:.3f}, mean {mean:.3f}"
    outlines = [
        Markup('<rect class="outline" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            b.box[0], b.box[1], max(b.box[2] - b.box[0], 0), max(b.box[3] - b.box[1], 0)
        )
        for b in boxes
    ]
    panels = [
        Panel("Picture", "", photo_svg(size, f"{name}, the picture", photos.draw(entry.image))),
        Panel(
            "Teacher's detections",
            found,
            photo_svg(
                size, f"{name}, the teacher: {found}", photos.draw(entry.image), draw_boxes(boxes, report, kinds, *size)
            ),
        ),
        Panel(
            "Uncertainty",
            spread,
            photo_svg(
                size,
                f"{name}, standard deviation of the teacher's best class score: {spread}; the largest at x {x}, y {y}",
                Markup('<g filter="url(#greyed)">{}</g>').format(photos.draw(entry.image)),
                _heat(values, entry.stride, top),
                *outlines,
            ),
        ),
    ]
    variance = ", ".join(
        f"{level} {'not measured' if value is None else f'{value:.3g}'}" for level, value in entry.variance.items()
    )
    return DrawnUncertainty(name, None, panels, [(kind, name) for name, kind in kinds.items()], variance)


def _heat(values: list[list[float]], stride: tuple[float, float], top: float) -> Markup:
    """The map as an image over the picture: a value lies in the middle of its cell."""
    repeated = [row + row[-1:] for row in values]  # one more row and column: the cells end half a stride early
    repeated.append(repeated[-1])
    height, width = len(repeated), len(repeated[0])
    image = Image.new("L", (width, height))
    image.putdata([min(round(255 * value / top), 255) for row in repeated for value in row])
    factor = max(1, round(LONGEST_SIDE / max(width, height)))
    image = image.resize((width * factor, height * factor), Image.Resampling.BILINEAR)
    colours = [_colour(i / 255) for i in range(256)]
    image = image.convert("P")
    image.putpalette([channel for rgb, _ in colours for channel in rgb])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=bytes(round(255 * alpha) for _, alpha in colours))
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Markup(
        '<image href="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" preserveAspectRatio="none"/>'
    ).format(uri, -stride[0] / 2, -stride[1] / 2, width * stride[0], height * stride[1])


def _colour(share: float) -> tuple[tuple[int, int, int], float]:
    """RGB and opacity at a share 0..1 of the scale."""
    place = share * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    low, high = RAMP[index], RAMP[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return (red, green, blue), MOST_OPAQUE * min(share / OPAQUE_FROM, 1)


def _legend(ticks: Sequence[float]) -> Markup:
    """The ramp over grey, as it lies over a picture, with its numbers."""
    width, height, left = 300, 14, 28  # left: half of the longest number, which is centred on the end
    stops = Markup("").join(
        Markup('<stop offset="{:.0%}" stop-color="rgb({},{},{})" stop-opacity="{:.2f}"/>').format(share, *rgb, alpha)
        for share in (i / 10 for i in range(11))
        for rgb, alpha in (_colour(share),)
    )
    numbers = Markup("").join(
        Markup(
            '<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
            '<text x="{0:.1f}" y="{3}" text-anchor="middle">{4}</text>'
        ).format(left + width * t / ticks[-1], height, height + 4, height + 17, tick_text(t))
        for t in ticks
    )
    return Markup(
        '<svg class="scale" viewBox="0 0 {} {}" role="img" aria-label="Colours from dark violet to yellow: standard '
        'deviation 0 to {}"><defs><linearGradient id="heat">{}</linearGradient></defs>'
        '<rect class="under" x="{}" width="{}" height="{}"/>'
        '<rect x="{}" width="{}" height="{}" fill="url(#heat)"/>{}</svg>'
    ).format(
        width + 2 * left, height + 22, tick_text(ticks[-1]), stops,
        left, width, height, left, width, height, numbers,
    )  # fmt: skip
