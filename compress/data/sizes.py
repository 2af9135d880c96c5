"""Sizes of the pictures of a COCO file, and of the objects in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def picture_sizes(document: Mapping[str, Any]) -> dict[Any, tuple[int, int]]:
    """(width, height) by id of the images whose size the file says."""
    return {
        row["id"]: (row["width"], row["height"])
        for row in document["images"]
        if all(isinstance(row.get(key), int) and row[key] > 0 for key in ("width", "height"))
    }


def object_shares(document: Mapping[str, Any], sizes: Mapping[Any, tuple[int, int]]) -> list[float]:
    """Side of each object, the root of its box's area, as a share of its picture's long side; smallest first.

    Crowds and boxes without an area are left out.
    """
    return sorted(
        math.sqrt(row["bbox"][2] * row["bbox"][3]) / max(sizes[row["image_id"]])
        for row in document["annotations"]
        if row["image_id"] in sizes and not row.get("iscrowd") and min(row["bbox"][2:]) > 0
    )
