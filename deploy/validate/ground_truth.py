"""Labels of a COCO document as columns, for what is computed on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from deploy.core.detection_table import LARGEST_ID
from deploy.core.errors import UserError

AREA = (0.0, 1e10)
"""Pixels of an object of any size, both ends included."""


@dataclass(frozen=True)
class GroundTruth:
    """Labelled objects, in the order of the document. Those of an image or category that it does not list are left
    out. A missing `area` is the box's, a missing `iscrowd` is 0. A box that is not finite has no area here, so that
    nothing finds it.

    Raises UserError for an id beyond 64 bits.
    """

    image_ids: np.ndarray
    """int64 [i], ascending."""
    category_ids: np.ndarray
    """int64 [k], ascending."""
    names: list[str]
    """Of the categories; two of one name are told apart by their id."""
    images: np.ndarray
    """int32 [n], the object's place in `image_ids`."""
    categories: np.ndarray
    """int32 [n], its place in `category_ids`."""
    boxes: np.ndarray
    """float64 [n, 4]: x, y, width, height in pixels."""
    areas: np.ndarray
    """float64 [n], as the document says."""
    crowd: np.ndarray
    """bool [n]."""

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> GroundTruth:
        """Read a document of the shape that `load_annotations` gives."""
        categories = sorted(document["categories"], key=lambda row: row["id"])
        image_ids = _ids("images", sorted(row["id"] for row in document["images"]))
        category_ids = _ids("categories", [row["id"] for row in categories])
        image_places = {number: place for place, number in enumerate(image_ids.tolist())}
        category_places = {number: place for place, number in enumerate(category_ids.tolist())}
        rows = [
            row
            for row in document["annotations"]
            if row["image_id"] in image_places and row["category_id"] in category_places
        ]
        n = len(rows)
        boxes = np.fromiter(chain.from_iterable(row["bbox"] for row in rows), np.float64, 4 * n).reshape(n, 4)
        areas = np.fromiter((row.get("area", row["bbox"][2] * row["bbox"][3]) for row in rows), np.float64, n)
        boxes[~np.isfinite(boxes).all(1)] = 0
        areas[~np.isfinite(areas)] = 0
        return cls(
            image_ids,
            category_ids,
            _names(categories),
            np.fromiter((image_places[row["image_id"]] for row in rows), np.int32, n),
            np.fromiter((category_places[row["category_id"]] for row in rows), np.int32, n),
            boxes,
            areas,
            np.fromiter((bool(row.get("iscrowd", 0)) for row in rows), np.bool_, n),
        )

    @property
    def counts(self) -> np.ndarray:
        """bool [n], the object counts where those of all sizes do: it is no crowd, and its area is one."""
        low, high = AREA
        return ~self.crowd & (self.areas >= low) & (self.areas <= high)

    def of_images(self, chosen: np.ndarray) -> GroundTruth:
        """The same with some of its images, bool [i], and their objects."""
        objects = chosen[self.images]
        places = np.cumsum(chosen, dtype=np.int32) - 1
        columns = {name: getattr(self, name)[objects] for name in ("categories", "boxes", "areas", "crowd")}
        return replace(self, image_ids=self.image_ids[chosen], images=places[self.images[objects]], **columns)

    def most_of_a_class(self) -> int:
        """Objects of one class in the image that holds most of them, crowds aside."""
        real = ~self.crowd
        pairs = self.images[real].astype(np.int64) * len(self.category_ids) + self.categories[real]
        return int(np.unique(pairs, return_counts=True)[1].max(initial=0))


def _ids(section: str, ids: list[int]) -> np.ndarray:
    for number in (ids[0], ids[-1]) if ids else ():
        if abs(number) > LARGEST_ID:
            raise UserError(f"annotations: {section}: id {number} does not fit 64 bits")
    return np.array(ids, np.int64)


def _names(categories: list[Mapping[str, Any]]) -> list[str]:
    names = [str(row["name"]) for row in categories]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({row['id']})" for name, row in zip(names, categories, strict=True)]
