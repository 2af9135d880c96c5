"""What is wrong with the labels of a COCO document, without looking at a picture.

    for finding in label_findings(document): ...        # `data check`: each one, with its place
    for line in label_notes(document): ...              # run, validate, pseudo-label: one line a kind

Errors make training fail, or let it learn or measure something wrong. Notes are handled, but worth knowing.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

TOLERANCE_PX = 1.0
"""A box may reach this far out of its image: exporters round."""
MOST_OBJECTS = 100
"""Detections that COCO's evaluation counts of a class in an image, and that an exported file gives by default."""

Level = Literal["error", "note"]

KINDS: dict[str, tuple[Level, str]] = {
    "no-categories": ("error", "there are no categories"),
    "no-images": ("error", "there are no images"),
    "no-annotations": ("error", "no image has an annotation"),
    "repeated-id": ("error", "ids are used more than once"),
    "missing-id": ("error", "annotations have no id"),
    "repeated-name": ("error", "category names are used more than once"),
    "repeated-file": ("error", "image files are listed more than once"),
    "unknown-category": ("error", "annotations are of a category that is not there"),
    "unknown-image": ("error", "annotations are of an image that is not there"),
    "bad-box": ("error", "boxes are empty, not finite, below one pixel or outside of their image"),
    "box-twice": ("error", "boxes are given twice: same image, category and box"),
    "id-gap": ("note", "category ids have gaps"),
    "empty-category": ("note", "categories have no box: classes that nothing teaches"),
    "empty-image": ("note", "images have no annotations"),
    "many-objects": ("note", "images hold more objects than detections are counted"),
    "no-size": ("note", "images had no width and height, which were read from their files"),
    # of the pictures, see compress.data.check
    "no-file": ("error", "image files are missing"),
    "unreadable": ("error", "files cannot be read as images"),
    "other-size": ("error", "files are of another size than the JSON says"),
    "shared": ("error", "images are in the other set as well"),
    "same-file": ("note", "files hold the same picture as another one"),
    "odd-pixels": ("note", "images have odd pixels"),
}
"""Every kind of finding: its level, and what is said of several."""

WHILE_TRAINING = ("box-twice", "empty-category", "many-objects")
"""Kinds that a training is told about: others stop it, or are counted as left out."""
WHEN_MEASURING = ("repeated-id", "unknown-category", "unknown-image", "bad-box", "box-twice", "many-objects")
"""Kinds that change mAP."""


@dataclass(frozen=True)
class Finding:
    """One finding. kind: a key of KINDS. where: its place in the document, such as `annotation 12`."""

    kind: str
    where: str
    message: str

    @property
    def level(self) -> Level:
        """error: training would fail, or learn or measure something wrong. note: handled, but worth knowing."""
        return KINDS[self.kind][0]


def label_findings(document: Mapping[str, Any], *, max_detections: int = MOST_OBJECTS) -> Iterator[Finding]:
    """Look at a COCO document (see `deploy.validate.coco.read_annotations`): categories, images, then annotations.

    Images without width and height are taken as they are. max_detections: what an exported file gives of an image.
    """
    yield from _categories(document)
    yield from _images(document)
    yield from _annotations(document)
    for image in objects_of_images(document):
        found = many_objects(*image, max_detections)
        if found is not None:
            yield found


def label_notes(
    document: Mapping[str, Any], *, kinds: Iterable[str] = KINDS, max_detections: int = MOST_OBJECTS
) -> list[str]:
    """One line for each of the kinds that is found: how many, and the first of them."""
    findings = label_findings(document, max_detections=max_detections)
    return summary(found for found in findings if found.kind in kinds)


def summary(findings: Iterable[Finding]) -> list[str]:
    """One line a kind, in the order of KINDS."""
    count: Counter[str] = Counter()
    first: dict[str, Finding] = {}
    for found in findings:
        count[found.kind] += 1
        first.setdefault(found.kind, found)
    return [line(first[kind], count[kind]) for kind in KINDS if kind in first]


def line(first: Finding, count: int) -> str:
    """Tell of `count` findings of a kind."""
    begins = f"{first.where}: {first.message}"
    return begins if count == 1 else f"{count} {KINDS[first.kind][1]}; the first: {begins}"


# The kinds of WHILE_TRAINING one by one, for those who have the labels as columns.


def empty_categories(categories: Iterable[Mapping[str, Any]], used: Container[int]) -> Iterator[Finding]:
    """used: ids of the categories that boxes have, in a document with boxes."""
    for row in categories:
        if row["id"] not in used:
            yield Finding("empty-category", f"category {row['id']}", f"{row['name']!r} has no box; nothing teaches it")


def box_twice(place: str, other: str) -> Finding:
    """place, other: of the box and of the first one like it, from `place_of`."""
    return Finding("box-twice", place, f"is {other} once more: same image, category and box")


def place_of(annotation: Mapping[str, Any], position: int) -> str:
    """An annotation by its id, or by its position in the list where it has none."""
    identifier = annotation.get("id")
    return f"annotations[{position}]" if identifier is None else f"annotation {identifier}"


def objects_of_images(document: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(image id, objects, most objects of one class) of every image that an annotation names, crowds aside, in the
    order in which the annotations do."""
    classes = Counter(
        (row["image_id"], row["category_id"]) for row in document["annotations"] if not row.get("iscrowd")
    )
    images: Counter[Any] = Counter()
    most: dict[Any, int] = {}
    for (image, _), count in classes.items():
        images[image] += count
        most[image] = max(count, most.get(image, 0))
    for image, count in images.items():
        yield image, count, most[image]


def many_objects(image: int, count: int, most: int, max_detections: int) -> Finding | None:
    """About an image as `objects_of_images` gives it; None: all its objects count."""
    said = []
    if most > MOST_OBJECTS:
        said.append(f"mAP counts {MOST_OBJECTS} detections of a class")
    if count > max_detections:
        said.append(f"an exported file gives deploy.max_detections, {max_detections}")
    if not said:
        return None
    return Finding("many-objects", f"image {image}", f"holds {count} objects; {', and '.join(said)}")


# ----------------------------------------------------------------------------------------------------


def _categories(document: Mapping[str, Any]) -> Iterator[Finding]:
    rows = document["categories"]
    if not rows:
        yield Finding("no-categories", "categories", "the list is empty, there is nothing to detect")
        return
    for identifier, count in _repeated(row["id"] for row in rows):
        yield Finding("repeated-id", f"category {identifier}", f"the id is used {count} times")
    for name, count in _repeated(row["name"] for row in rows):
        yield Finding("repeated-name", f"category {name!r}", f"the name is used {count} times")
    unique = sorted({row["id"] for row in rows})
    if unique[-1] - unique[0] + 1 != len(unique):
        gap = next(one + 1 for one, two in itertools.pairwise(unique) if two != one + 1)
        text = (
            f"ids {unique[0]}..{unique[-1]} are not contiguous, first gap at {gap}; labels are numbered by ascending id"
        )
        yield Finding("id-gap", "categories", text)
    if document["annotations"]:
        yield from empty_categories(rows, {row["category_id"] for row in document["annotations"]})


def _images(document: Mapping[str, Any]) -> Iterator[Finding]:
    rows = document["images"]
    if not rows:
        yield Finding("no-images", "images", "the list is empty")
    for identifier, count in _repeated(row["id"] for row in rows):
        yield Finding("repeated-id", f"image {identifier}", f"the id is used {count} times")
    for name, count in _repeated(row["file_name"] for row in rows):
        yield Finding("repeated-file", f"image {name!r}", f"the file is listed {count} times")
    if document["annotations"]:
        labelled = {row["image_id"] for row in document["annotations"]}
        for row in rows:
            if row["id"] not in labelled:
                yield Finding("empty-image", f"image {row['id']}", f"{row['file_name']} has no annotations")


def _annotations(document: Mapping[str, Any]) -> Iterator[Finding]:
    rows = document["annotations"]
    if not rows and document["images"]:
        yield Finding("no-annotations", "annotations", "the list is empty: no image has a box")
    sizes = {row["id"]: _known_size(row) for row in document["images"]}
    categories = {row["id"] for row in document["categories"]}
    for identifier, count in _repeated(row["id"] for row in rows if "id" in row):
        yield Finding("repeated-id", f"annotation {identifier}", f"the id is used {count} times")
    first: dict[tuple[Any, ...], int] = {}
    for position, row in enumerate(rows):
        image, category, box = row["image_id"], row["category_id"], row["bbox"]
        if row.get("id") is None:
            yield Finding("missing-id", _place(rows, position), "id is missing; COCO evaluation needs one")
        if category not in categories:
            yield Finding("unknown-category", _place(rows, position), f"category_id {category} is not in categories")
        size = sizes.get(image)
        if image not in sizes:
            yield Finding("unknown-image", _place(rows, position), f"image_id {image} is not in images")
        problem = None if _is_inside(box, size) else _box_problem(box, size)
        if problem is None and row.get("area", 1) <= 0:
            problem = f"area is {row['area']:g}; it is left out of training"
        if problem is not None:
            yield Finding("bad-box", _place(rows, position), problem)
        if not row.get("iscrowd", 0):
            other = first.setdefault((image, category, *box), position)
            if other != position:
                yield box_twice(_place(rows, position), _place(rows, other))


def _known_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height), where the document says them."""
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _place(rows: Any, position: int) -> str:
    return place_of(rows[position], position)


def _is_inside(box: Any, size: tuple[int, int] | None) -> bool:
    """Whether a box is beyond doubt: nearly all are, and a million is asked."""
    if size is None:
        return False
    x, y, w, h = box
    return bool(x >= 0 and y >= 0 and 1 <= w <= size[0] - x and 1 <= h <= size[1] - y)


def _box_problem(box: Any, size: tuple[int, int] | None) -> str | None:
    x, y, w, h = box
    shown = f"bbox [{x:g}, {y:g}, {w:g}, {h:g}]"
    if not all(math.isfinite(value) for value in box):
        return f"{shown} holds a value that is not finite"
    if w <= 0 or h <= 0:
        return f"{shown} is empty"
    if w < 1 or h < 1:
        return f"{shown} is less than one pixel wide or high; it is left out of training"
    if size is None:
        return None
    inside = f"the image of {size[0]}x{size[1]} pixels"
    if x >= size[0] or y >= size[1] or x + w <= 0 or y + h <= 0:
        return f"{shown} lies outside {inside}"
    out = max(-x, -y, x + w - size[0], y + h - size[1])
    return f"{shown} reaches {out:g} px out of {inside}" if out > TOLERANCE_PX else None


def _repeated(values: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(value, count) for value, count in Counter(values).items() if count > 1]
