"""Twelve kinds of data sets that people bring, drawn small."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PICTURES = 6  # that are really drawn; more images of a set are links to these


@dataclass(frozen=True)
class Kind:
    """A data set. sizes: (width, height) of its pictures in turn. side: of objects, pixels. first_id: of classes."""

    images: int = 40
    val: int = 12
    sizes: Sequence[tuple[int, int]] = ((160, 120),)
    side: int = 30
    objects: int = 3
    classes: int = 3
    mode: str = "RGB"
    first_id: int = 1
    below: str = ""
    empty: int = 0  # every so many pictures have no object; 0: all have some


KINDS = {
    "one class": Kind(classes=1),
    "300 classes": Kind(classes=300, objects=9),
    "40 images": Kind(images=40, val=10),
    "9 images": Kind(images=9, val=3),
    "20,000 images": Kind(images=20_000, val=100, sizes=((96, 64),)),
    "tiny objects": Kind(sizes=((640, 480),), side=5, objects=8),
    "huge pictures": Kind(images=12, val=4, sizes=((4000, 3000),), side=400),
    "portrait": Kind(sizes=((120, 200),)),
    "mixed": Kind(sizes=((200, 100), (100, 200), (150, 150), (300, 90))),
    "grey, folders, ids from 7": Kind(mode="L", below="day/1", first_id=7),
    "crowded": Kind(sizes=((320, 320),), side=12, objects=200),
    "thumbnails, half of them empty": Kind(sizes=((40, 40),), side=14, objects=1, empty=2),
}


def draw(kind: Kind, folder: Path) -> tuple[Path, Path, Path]:
    """Write the set. Returns train.json, val.json and the folder of the images."""
    images = folder / "images"
    (images / kind.below).mkdir(parents=True)
    random = np.random.default_rng(0)
    drawn = [_picture(kind, random, kind.sizes[index % len(kind.sizes)]) for index in range(PICTURES)]
    files = [_saved(picture, images / kind.below / f"drawn{index}.jpg") for index, (picture, _) in enumerate(drawn)]
    written = []
    for name, count in (("train", kind.images), ("val", kind.val)):
        rows, boxes = [], []
        for index in range(count):
            file = Path(kind.below) / f"{name}_{index}.jpg"
            os.link(files[index % PICTURES], images / file)
            width, height = drawn[index % PICTURES][0].size
            rows.append({"id": index + 1, "file_name": str(file), "width": width, "height": height})
            for box in [] if kind.empty and index % kind.empty else drawn[index % PICTURES][1]:
                category = kind.first_id + len(boxes) % kind.classes
                boxes.append({"id": len(boxes) + 1, "image_id": index + 1, "category_id": category, "bbox": box,
                              "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        names = [{"id": kind.first_id + label, "name": f"thing {label}"} for label in range(kind.classes)]
        out = folder / f"{name}.json"
        out.write_text(json.dumps({"images": rows, "annotations": boxes, "categories": names}))
        written.append(out)
    return written[0], written[1], images


def _picture(kind: Kind, random: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, list[list[float]]]:
    """A picture of bright boxes on dark noise, and the boxes."""
    width, height = size
    coarse = random.integers(0, 90, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size).convert(kind.mode)
    pen = ImageDraw.Draw(picture)
    color: Callable[[], object] = (
        (lambda: int(random.integers(150, 256)))
        if kind.mode == "L"
        else (lambda: tuple(int(v) for v in random.integers(150, 256, 3)))
    )
    boxes = []
    for _ in range(kind.objects):
        x, y = random.integers(0, width - kind.side), random.integers(0, height - kind.side)
        pen.rectangle((x, y, x + kind.side - 1, y + kind.side - 1), fill=color())
        boxes.append([float(x), float(y), float(kind.side), float(kind.side)])
    return picture, boxes


def _saved(picture: Image.Image, file: Path) -> Path:
    picture.save(file)
    return file
