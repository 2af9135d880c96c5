"""A first look at what a teacher of files finds: boxes that no detector gives say that its description is wrong.

A file is taken at its word, and a wrong word gives boxes all the same: offsets within a grid read as pixels, shares of
the picture read as pixels or the other way round, a far corner read as a size. Labels made so look like labels.

A box is impossible when it

- has its second corner before its first, or numbers that are not finite;
- lies wholly outside what the network saw;
- is smaller than a pixel of the network's input, in width and in height;
- lies within `CORNER` pixels of a corner of the network's input with all of it (an eighth of a side, if that is less).

A teacher is refused when more than `SHARE` of its first boxes are impossible, counted over at most `IMAGES` images and
from `BOXES` boxes on. A poor detector does not come near: its boxes lie wrong, but all over the picture and of the size
of objects. One that finds little says little, and is not judged.
"""

from __future__ import annotations

import numpy as np

from deploy.core.errors import UserError

CORNER = 8.0
SHARE = 0.9
IMAGES = 32
BOXES = 10

KINDS = (
    "have their second corner before the first",
    "lie outside the image",
    "are smaller than a pixel",
    f"lie within {CORNER:g} pixels of a corner",
)


class FirstLook:
    """Counts the boxes of the first images.

    Args:
        where: begins the message. remedy: ends it.
    """

    def __init__(self, where: str, remedy: str) -> None:
        self._where, self._remedy = where, remedy
        self._images, self._boxes, self._counts = 0, 0, np.zeros(len(KINDS), np.int64)

    def look(self, boxes: np.ndarray, size: tuple[int, int]) -> None:
        """Take in the boxes of one image.

        Args:
            boxes: [n, 4] xyxy in pixels of the network's input, as they came, not clipped.
            size: (height, width) of that input.

        Raises:
            UserError: nearly all boxes so far are impossible.
        """
        if self._images == IMAGES:
            return
        kinds = impossible(boxes, size)
        self._images, self._boxes = self._images + 1, self._boxes + len(boxes)
        self._counts += np.bincount(kinds[kinds >= 0], minlength=len(KINDS))
        if self._boxes >= BOXES and self._counts.sum() > SHARE * self._boxes:
            parts = [f"{count} {kind}" for count, kind in zip(self._counts, KINDS, strict=True) if count]
            raise UserError(
                f"{self._where}: of the first {self._boxes} boxes, in {self._images} image"
                f"{'s' if self._images > 1 else ''}, {' and '.join(parts)}: those are no objects; {self._remedy}"
            )


def impossible(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """For each box [n, 4] the first of `KINDS` that is true of it, or -1: int64 [n]."""
    height, width = size
    finite = np.isfinite(boxes).all(1)
    x1, y1, x2, y2 = np.where(finite[:, None], boxes, 0).astype(np.float64).T
    x, y = min(CORNER, width / 8), min(CORNER, height / 8)
    near_side, near_end = (x2 <= x) | (x1 >= width - x), (y2 <= y) | (y1 >= height - y)
    true = np.stack(
        (
            (x2 < x1) | (y2 < y1) | ~finite,
            (x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height),
            (x2 - x1 < 1) & (y2 - y1 < 1),
            near_side & near_end,
        )
    )
    return np.where(true.any(0), true.argmax(0), -1)
