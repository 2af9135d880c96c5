"""A labelled set of which only some images keep their labels: what training with few labels is tried on.

    found = split_labels(Path("train.json"), 0.2, seed=0, labelled=Path("labelled.json"), unlabelled=Path("rest.json"))

Which images keep them is a function of the seed and the images' ids alone: it does not change with the machine, and a
larger fraction keeps all images of a smaller one and adds to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.files import write_json
from deploy.validate.coco import load_annotations


@dataclass(frozen=True)
class LabelSplit:
    """Counts of images with and without labels; names of the classes that are left without a label."""

    labelled: int
    unlabelled: int
    missing: tuple[str, ...]


def split_labels(annotations: Path, fraction: float, seed: int, *, labelled: Path, unlabelled: Path) -> LabelSplit:
    """Write two COCO files: the images that keep their labels, and the others, without any.

    Args:
        annotations: a COCO file.
        fraction: share of the images that keep their labels, 0 to 1; at least one image does if it is above 0.

    Raises:
        UserError: `annotations` cannot be read.
    """
    content = load_annotations(annotations)
    chosen = choose(content, fraction, seed)
    keeps = [row for row in content["images"] if row["id"] in chosen]
    rest = [row for row in content["images"] if row["id"] not in chosen]
    labels = [row for row in content["annotations"] if row["image_id"] in chosen]
    shared = {key: content[key] for key in ("info", "categories") if key in content}
    write_json(labelled, {**shared, "images": keeps, "annotations": labels})
    write_json(unlabelled, {**shared, "images": rest, "annotations": []})
    there = {row["category_id"] for row in labels if not row.get("iscrowd", 0)}
    missing = tuple(row["name"] for row in content["categories"] if row["id"] not in there)
    return LabelSplit(len(keeps), len(rest), missing)


def choose(content: Any, fraction: float, seed: int) -> set[int]:
    """Ids of the images that keep their labels.

    The images stand in an order that the seed draws. First comes, for every class from the rarest on, the first image
    that shows it, unless an image before does; then all others as they stand. The first n are taken.
    """
    if fraction == 0:
        return set()
    order = sorted((row["id"] for row in content["images"]), key=lambda image: _draw(seed, image))
    count = max(1, round(fraction * len(order)))
    first = _one_of_each_class(order, content["annotations"])
    taken = set(first)
    return set([*first, *(image for image in order if image not in taken)][:count])


# --- details --------------------------------------------------------------------------------------------


def _draw(seed: int, image: int) -> bytes:
    return hashlib.sha256(f"{seed}:{image}".encode()).digest()


def _one_of_each_class(order: Sequence[int], annotations: Sequence[Any]) -> list[int]:
    place = {image: index for index, image in enumerate(order)}
    images: dict[int, set[int]] = {}  # category → images that show it
    for row in annotations:
        if row["image_id"] in place and not row.get("iscrowd", 0):
            images.setdefault(row["category_id"], set()).add(row["image_id"])
    chosen: list[int] = []
    for _, shown_by in sorted(images.items(), key=lambda item: (len(item[1]), item[0])):
        if not shown_by.intersection(chosen):
            chosen.append(min(shown_by, key=place.__getitem__))
    return chosen
