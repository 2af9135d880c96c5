"""Find what breaks training in a COCO dataset, before training does."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.validate.coco import read_annotations

TOLERANCE_PX = 1.0
"""A box may reach this far out of its image: exporters round."""


@dataclass(frozen=True)
class Problem:
    """One finding; `str` gives one line with file and id."""

    level: Literal["error", "note"]
    """error: training would fail or learn from wrong labels. note: handled, but worth knowing."""
    file: Path
    where: str
    """Place in the file, for example `annotation 12`."""
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.where}: {self.message}" + (" (note)" if self.level == "note" else "")


def check(annotations: Path, images: Path) -> list[Problem]:
    """Check a COCO file and decode every image it names.

    Returns the findings in the order categories, images, annotations.

    Raises:
        UserError: the file is no COCO JSON at all (see `deploy.validate.coco.read_annotations`).
    """
    document = read_annotations(annotations, sizes=True)
    images = Path(images)
    return [
        *_categories(Path(annotations), document),
        *_images(Path(annotations), images, document),
        *_annotations(Path(annotations), document),
    ]


def _categories(file: Path, document: dict[str, Any]) -> Iterator[Problem]:
    identifiers = [category["id"] for category in document["categories"]]
    if not identifiers:
        yield Problem("error", file, "categories", "the list is empty, there is nothing to detect")
        return
    for identifier, count in _repeated(identifiers):
        yield Problem("error", file, f"category {identifier}", f"the id is used {count} times")
    for name, count in _repeated(category["name"] for category in document["categories"]):
        yield Problem("error", file, f"category {name!r}", f"the name is used {count} times")
    unique = sorted(set(identifiers))
    if unique[-1] - unique[0] + 1 != len(unique):
        missing = sorted(set(range(unique[0], unique[-1])) - set(unique)) if unique[-1] < 10_000 else []
        shown = f", first gap at {missing[0]}" if missing else ""
        text = f"ids {unique[0]}..{unique[-1]} are not contiguous{shown}; labels are numbered by ascending id"
        yield Problem("note", file, "categories", text)


def _images(file: Path, folder: Path, document: dict[str, Any]) -> Iterator[Problem]:
    entries = document["images"]
    if not entries:
        yield Problem("error", file, "images", "the list is empty")
    for identifier, count in _repeated(entry["id"] for entry in entries):
        yield Problem("error", file, f"image {identifier}", f"the id is used {count} times")
    for name, count in _repeated(entry["file_name"] for entry in entries):
        yield Problem("error", file, f"image {name!r}", f"the file is listed {count} times")

    def look(entry: dict[str, Any]) -> Problem | None:
        path = folder / entry["file_name"]
        where = f"image {entry['id']}"
        try:
            height, width = load_image(path).shape[:2]
        except UserError as error:
            return Problem("error", path, where, str(error).removeprefix(f"{path}: "))
        if (height, width) != (entry["height"], entry["width"]):
            declared = f"{entry['width']}x{entry['height']}"
            return Problem("error", path, where, f"the file is {width}x{height} pixels, {file.name} says {declared}")
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
        for problem in pool.map(look, entries):
            if problem is not None:
                yield problem

    labelled = {annotation["image_id"] for annotation in document["annotations"]}
    for entry in entries:
        if entry["id"] not in labelled:
            yield Problem("note", file, f"image {entry['id']}", f"{entry['file_name']} has no annotations")


def _annotations(file: Path, document: dict[str, Any]) -> Iterator[Problem]:
    annotations = document["annotations"]
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in document["images"]}
    categories = {category["id"] for category in document["categories"]}
    for identifier, count in _repeated(a["id"] for a in annotations if "id" in a):
        yield Problem("error", file, f"annotation {identifier}", f"the id is used {count} times")
    for position, annotation in enumerate(annotations):
        identifier = annotation.get("id")
        where = f"annotations[{position}]" if identifier is None else f"annotation {identifier}"
        if identifier is None:
            yield Problem("error", file, where, "id is missing; COCO evaluation needs one")
        if annotation["category_id"] not in categories:
            yield Problem("error", file, where, f"category_id {annotation['category_id']} is not in categories")
        if annotation["image_id"] not in sizes:
            yield Problem("error", file, where, f"image_id {annotation['image_id']} is not in images")
        problem = _box_problem(annotation["bbox"], sizes.get(annotation["image_id"]))
        if problem is None and annotation.get("area", 1) <= 0:
            problem = f"area is {annotation['area']:g}; it is left out of training"
        if problem is not None:
            yield Problem("error", file, where, problem)


def _box_problem(box: list[float], size: tuple[int, int] | None) -> str | None:
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


def _repeated(values: Any) -> list[tuple[Any, int]]:
    return [(value, count) for value, count in Counter(values).items() if count > 1]
