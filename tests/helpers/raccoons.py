"""A folder of labelled photographs as people download it: Pascal VOC, small letters, and pictures without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COUNT, NEW = 20, 2
SIZES = ((96, 72), (72, 96), (96, 96))

XML = """<annotation><folder>images</folder><filename>{name}</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
<object><name>raccoon</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>
</annotation>
"""


def draw(folder: Path) -> None:
    """Write `raccoon/annotations/*.xml`, `raccoon/images/*.jpg`, one grey animal with a mask each, and `new/*.jpg`."""
    random = np.random.default_rng(3)
    images, labels, new = folder / "raccoon" / "images", folder / "raccoon" / "annotations", folder / "new"
    for place in (images, labels, new):
        place.mkdir(parents=True)
    for index in range(COUNT + NEW):
        width, height = SIZES[index % len(SIZES)]
        ground = random.integers(60, 160, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(ground).resize((width, height))
        side = int(random.integers(28, 44))
        x, y = int(random.integers(1, width - side)), int(random.integers(1, height - side))
        pen = ImageDraw.Draw(picture)
        pen.ellipse((x, y, x + side - 1, y + side - 1), fill=(225, 225, 230))
        pen.rectangle((x + 3, y + side // 3, x + side - 4, y + side // 2), fill=(15, 15, 15))
        name = f"raccoon-{index + 1}.jpg"
        picture.save((images if index < COUNT else new) / name, quality=95)
        if index < COUNT:
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + side, "ymax": y + side}
            text = XML.format(name=name, width=width, height=height, **corners)
            (labels / f"raccoon-{index + 1}.xml").write_text(text)
