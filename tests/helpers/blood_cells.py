"""Labelled pictures as two pages of the documents begin with: BCCD's folders, and a folder of YOLO labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = {"RBC": (200, 60, 70), "WBC": (120, 70, 190), "Platelets": (70, 40, 120)}
SETS = {"train": 12, "val": 6, "test": 4}
WIDTH, HEIGHT = 160, 120

Box = tuple[str, int, int, int, int]
"""Class, x0, y0, x1, y1: pixels, x1 and y1 outside."""


def draw_voc(folder: Path) -> None:
    """Write `BCCD_Dataset/BCCD` with Annotations, JPEGImages and ImageSets/Main, as the data set is published."""
    root = folder / "BCCD_Dataset" / "BCCD"
    for below in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / below).mkdir(parents=True)
    random, number = np.random.default_rng(0), 0
    for name, count in SETS.items():
        stems = [f"BloodImage_{number + index:05}" for index in range(count)]
        number += count
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            picture, boxes = _picture(random)
            picture.save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
            objects = "".join(
                f"<object><name>{what}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
                f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
                for what, x0, y0, x1, y1 in boxes
            )
            (root / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height>"
                f"<depth>3</depth></size>{objects}</annotation>"
            )


def draw_yolo(folder: Path) -> None:
    """Write `dataset` with data.yaml, images and labels of train and val, and `photos` without labels."""
    root, random = folder / "dataset", np.random.default_rng(1)
    for name in ("train", "val"):
        (root / "images" / name).mkdir(parents=True)
        (root / "labels" / name).mkdir(parents=True)
        for index in range(SETS[name]):
            picture, boxes = _picture(random)
            picture.save(root / "images" / name / f"{name}{index}.jpg", quality=95)
            lines = [
                f"{list(CLASSES).index(what)} {(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT} "
                f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}"
                for what, x0, y0, x1, y1 in boxes
            ]
            (root / "labels" / name / f"{name}{index}.txt").write_text("\n".join(lines))
    names = ", ".join(CLASSES)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: [{names}]\n")
    (folder / "photos").mkdir()
    for index in range(2):
        _picture(random)[0].save(folder / "photos" / f"{index}.jpg")


def _picture(random: np.random.Generator) -> tuple[Image.Image, list[Box]]:
    """Two cells of each class on a pale ground with noise."""
    ground = random.integers(180, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(ground).resize((WIDTH, HEIGHT))
    pen = ImageDraw.Draw(picture)
    boxes = []
    for name, color in [*CLASSES.items()] * 2:
        side = int(random.integers(18, 40))
        x, y = int(random.integers(1, WIDTH - side)), int(random.integers(1, HEIGHT - side))
        pen.ellipse((x, y, x + side - 1, y + side - 1), fill=color)
        boxes.append((name, x, y, x + side, y + side))
    return picture, boxes
