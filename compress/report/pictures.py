"""Photographs with boxes: ground truth, teacher, baseline and student side by side.

Public: `draw_pictures(document, photos)`, `shown_from(report)`, and for other sections `Photos` and what draws on them.
Each image is embedded once, as a downscaled JPEG; the panels of all sections reuse it and draw the boxes over it as
vectors in the pixels of the file.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from compress.manifest import BASELINE, STUDENT, TEACHER
from compress.report.document import Box, Picture, Report
from compress.report.gallery import KINDS
from compress.report.reading import Document
from compress.report.text import lower
from deploy.core.boxes import iou
from deploy.core.card import SHOWN_SCORE
from deploy.core.draw import COLORS
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.core.storage import is_file, place

LONGEST_SIDE = 640  # pixels of an embedded image
FULL_SIZE = 24  # pictures that are embedded so; more are smaller, so that all together take about as much room
MATCH_IOU = 0.5
_MOST_TAGS = 12  # more boxes than this in one panel: colours and tool tips only, no text on the picture
_PANELS = ("ground_truth", TEACHER, BASELINE, STUDENT)


@dataclass(frozen=True)
class Panel:
    title: str
    caption: str
    svg: Markup | None  # None: the caption says what is missing


@dataclass(frozen=True)
class DrawnPicture:
    """problem: why there is nothing to see. legend: CSS class and name of each class. kind, why: it is there."""

    name: str
    problem: str | None
    panels: list[Panel]
    legend: list[tuple[str, str]]
    kind: str = ""
    why: str = ""


class PhotoError(Exception):
    """The image cannot be shown; the message says why."""


class Photos:
    """The images of one page. Each is embedded where it is drawn first and referred to after that."""

    def __init__(self, run_dir: Path, many: int = 1) -> None:
        """many: images that will be embedded."""
        self._run_dir = run_dir
        self._longest = round(LONGEST_SIDE * min(1.0, (FULL_SIZE / max(many, 1)) ** 0.5))
        self._read: dict[Path, tuple[int, str, tuple[int, int]]] = {}  # path → number, data URI, size
        self._drawn: set[int] = set()

    def size(self, image: str) -> tuple[int, int]:
        """(width, height) of the upright file. Raises PhotoError."""
        return self._open(image)[2]

    def draw(self, image: str) -> Markup:
        """The image at (0, 0) in pixels of the file. Raises PhotoError."""
        number, uri, (width, height) = self._open(image)
        if number in self._drawn:
            return Markup('<use href="#photo{}"/>').format(number)
        self._drawn.add(number)
        return Markup('<image id="photo{}" href="{}" width="{}" height="{}" preserveAspectRatio="none"/>').format(
            number, uri, width, height
        )

    def _open(self, image: str) -> tuple[int, str, tuple[int, int]]:
        path = next((p for p in (self._run_dir / image, place(image)) if is_file(p, ask=False)), None)
        if path is None:
            raise PhotoError(f"The image {image} was not found when this page was written.")
        if path not in self._read:
            try:
                uri, size = _embed(path, self._longest)
            except UserError as error:
                reason = str(error).removeprefix(f"{path}: ")
                raise PhotoError(f"The image {image} could not be read ({reason}).") from None
            self._read[path] = (len(self._read), uri, size)
        return self._read[path]


def shown_from(report: Report) -> str:
    """Say from which score the detections of the pictures are shown, of each model where they differ."""
    roles = [role for role in _PANELS[1:] if any(getattr(picture, role) is not None for picture in report.pictures)]
    scores = {report.models.titles[role]: report.shown_score(role) for role in roles if role in report.models.titles}
    if len(set(scores.values())) < 2:
        return f"Detections with a score of at least {next(iter(scores.values()), SHOWN_SCORE):.3g}."
    words = ", ".join(f"{lower(title)} {score:.3g}" for title, score in scores.items())
    return f"Detections from the score of each model's best F1 on: {words}."


def draw_pictures(document: Document, photos: Photos) -> list[DrawnPicture]:
    """One entry for each picture of report.json, in its order."""
    return [_draw(picture, document, photos) for picture in document.report.pictures]


def _draw(picture: Picture, document: Document, photos: Photos) -> DrawnPicture:
    name = Path(picture.image).name
    try:
        width, height = photos.size(picture.image)
    except PhotoError as error:
        return DrawnPicture(name, str(error), [], [], picture.kind, picture.why)

    shown: dict[str, list[Box] | None] = {key: getattr(picture, key) for key in _PANELS}
    if picture.files:  # beside the student that it is compared with
        shown = {**{key: boxes for key, boxes in shown.items() if key != BASELINE}, **picture.files}
    drawn_boxes = [b for boxes in shown.values() for b in boxes or ()]
    kinds = class_kinds(drawn_boxes, document.report)
    panels: list[Panel] = []
    titles = {"ground_truth": "Ground truth", **document.report.models.titles}
    for key, boxes in shown.items():
        title = titles.get(key, key)
        if boxes is None:
            what = "No ground truth recorded." if key == "ground_truth" else f"No {key} detections recorded."
            panels.append(Panel(title, what, None))
            continue
        caption = _caption(key, boxes, picture, document.report)
        drawn = draw_boxes(boxes, document.report, kinds, width, height)
        alt = f"{name}, {title.lower()}: {caption}"
        panels.append(Panel(title, caption, photo_svg((width, height), alt, photos.draw(picture.image), drawn)))
    legend = [(kind, name) for name, kind in kinds.items()]
    return DrawnPicture(name, None, panels, legend, picture.kind, picture.why)


def filters(pictures: Sequence[DrawnPicture]) -> list[tuple[str, str, int]]:
    """What the page can show of its pictures: kind, title and how many; empty where there is nothing to choose."""
    count = Counter(picture.kind for picture in pictures)
    found = [(kind, title, count[kind]) for kind, title in KINDS.items() if count[kind]]
    return found if len(found) > 1 else []


def photo_svg(size: tuple[int, int], alt: str, *parts: Markup) -> Markup:
    """A drawing whose units are pixels of an image of `size` (width, height)."""
    return Markup('<svg class="photo" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        *size, alt, Markup("").join(parts)
    )


def class_kinds(boxes: Sequence[Box], report: Report) -> dict[str, str]:
    """CSS class of the colour of each class name that occurs, in the order of the report's classes: that of its place
    among them, in every picture and as deploy draws it. Names that are not among them come after those."""
    present = {report.class_name(b.label) for b in boxes}
    known = list(dict.fromkeys(report.classes))
    places = {name: place for place, name in enumerate([*known, *sorted(present.difference(known))])}
    return {name: f"k{place % len(COLORS)}" for name, place in places.items() if name in present}


def _embed(path: Path, longest: int) -> tuple[str, tuple[int, int]]:
    """A JPEG data URI with so many pixels on the longest side, and the (width, height) of the file in its upright
    orientation."""
    image = Image.fromarray(load_image(path))
    size = image.size
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), size


def draw_boxes(boxes: Sequence[Box], report: Report, kinds: dict[str, str], width: int, height: int) -> Markup:
    """Outlines in the colours of `kinds`, and names and scores as long as there is room for them."""
    parts = []
    font = width / 23  # a panel is about 240 CSS pixels wide: about 10.5 of them
    tags = len(boxes) <= _MOST_TAGS
    for b in sorted(boxes, key=lambda b: b.score or 0.0):
        x1, y1, x2, y2 = b.box
        label = report.class_name(b.label)
        text = label if b.score is None else f"{label} {b.score:.2f}"
        parts.append(
            Markup(
                '<rect class="halo" x="{0:.1f}" y="{1:.1f}" width="{2:.1f}" height="{3:.1f}"/>'
                '<rect class="box {4}" x="{0:.1f}" y="{1:.1f}" width="{2:.1f}" height="{3:.1f}">'
                "<title>{5}</title></rect>"
            ).format(x1, y1, max(x2 - x1, 0), max(y2 - y1, 0), kinds[label], text)
        )
        if tags:
            short = text if len(text) <= 18 else text[:8] + "…" + text[-6:]
            wide, tall = font * (0.58 * len(short) + 0.6), font * 1.3
            left = min(max(x1, 0), max(width - wide, 0))
            top = y1 - tall if y1 >= tall else min(y1, height - tall)
            parts.append(
                Markup(
                    '<rect class="tag {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="{:.1f}"/>'
                    '<text class="tagtext" x="{:.1f}" y="{:.1f}" font-size="{:.1f}">{}</text>'
                ).format(
                    kinds[label],
                    left,
                    top,
                    wide,
                    tall,
                    font * 0.2,
                    left + font * 0.3,
                    top + font,
                    font,
                    short,
                )
            )
    return Markup("").join(parts)


def _caption(key: str, shown: Sequence[Box], picture: Picture, report: Report) -> str:
    if key == "ground_truth":
        return f"{len(shown)} object{'' if len(shown) == 1 else 's'}"
    if picture.ground_truth is None:
        return f"{len(shown)} detection{'' if len(shown) == 1 else 's'}"
    found = count_matches(shown, picture.ground_truth, report)
    return f"{found} of {len(picture.ground_truth)} found, {len(shown) - found} extra"


def count_matches(detections: Sequence[Box], truth: Sequence[Box], report: Report) -> int:
    """Objects found: best score first, each takes the free object of its class with the highest IoU ≥ 0.5."""

    def overlap(a: Box, b: Box) -> float:
        return float(iou(np.asarray(a.box), np.asarray(b.box)))

    free = list(truth)
    for d in sorted(detections, key=lambda b: -(b.score or 0.0)):
        name = report.class_name(d.label)
        same = [t for t in free if report.class_name(t.label) == name and overlap(d, t) >= MATCH_IOU]
        if same:
            free.remove(max(same, key=lambda t: overlap(d, t)))
    return len(truth) - len(free)
