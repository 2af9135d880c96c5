"""Small label files of other tools, and what was made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def picture(path: Path, size: tuple[int, int] = (80, 60), **kwargs: Any) -> None:
    """Write a black image of (width, height) with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **kwargs)


def text(path: Path, content: str) -> None:
    """Write a text file with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def boxes_by_name(path: Path) -> dict[str, list[tuple[str, list[float], int]]]:
    """(class name, [x, y, w, h], iscrowd) of every box, by file name."""
    document = json.loads(path.read_text())
    categories = {c["id"]: c["name"] for c in document["categories"]}
    result: dict[str, list[tuple[str, list[float], int]]] = {i["file_name"]: [] for i in document["images"]}
    names = {i["id"]: i["file_name"] for i in document["images"]}
    for a in document["annotations"]:
        result[names[a["image_id"]]].append((categories[a["category_id"]], a["bbox"], a["iscrowd"]))
    return result
