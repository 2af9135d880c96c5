"""Detections of many pictures as columns: a row a detection, 36 bytes of it where boxes are float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deploy.core.errors import UserError

LARGEST_ID = 2**63 - 1
COLUMNS = ("image_ids", "category_ids", "boxes", "scores")


@dataclass(frozen=True)
class DetectionTable:
    """COCO results of any number of pictures. Rows of one picture need not lie together; where scores are equal, the
    earlier row ranks first.

    Raises ValueError for columns whose shapes do not fit each other.
    """

    image_ids: np.ndarray
    """int64 [n]."""
    category_ids: np.ndarray
    """int64 [n]."""
    boxes: np.ndarray
    """float [n, 4] in pixels of the picture: x, y, width, height, or corners."""
    scores: np.ndarray
    """float [n]."""
    corners: bool = False
    """Boxes are x1, y1, x2, y2."""

    def __post_init__(self) -> None:
        n = len(self.scores)
        shapes = [getattr(self, name).shape for name in COLUMNS]
        if shapes != [(n,), (n,), (n, 4), (n,)]:
            raise ValueError(f"columns are [n], [n], [n, 4], [n]; these are {', '.join(map(str, shapes))}")

    def __len__(self) -> int:
        return len(self.scores)

    def xywh(self, rows: np.ndarray) -> np.ndarray:
        """Boxes float64 [m, 4] of some rows as x, y, width, height."""
        boxes = self.boxes[rows].astype(np.float64)  # where the difference of two float32 is exact
        if self.corners:
            boxes[:, 2:] -= boxes[:, :2]
        return boxes

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> DetectionTable:
        """The table of COCO result rows `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`.

        Raises UserError, with the number of the row, for a field that is missing or of another kind.
        """
        n = len(rows)
        table = cls(np.empty(n, np.int64), np.empty(n, np.int64), np.empty((n, 4)), np.empty(n))
        for number, row in enumerate(rows):
            try:
                table.image_ids[number] = _id(row, "image_id")
                table.category_ids[number] = _id(row, "category_id")
                box = row["bbox"]
                if isinstance(box, str) or len(box) != 4:
                    raise ValueError(f"bbox must be four numbers [x, y, w, h], found {str(box)[:60]}")
                table.boxes[number] = [float(value) for value in box]
                table.scores[number] = float(row["score"])
            except KeyError as error:
                raise UserError(f"detection {number}: {error.args[0]} is missing") from None
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(f"detection {number}: {error}") from None
        return table

    @classmethod
    def join(cls, tables: Iterable[DetectionTable]) -> DetectionTable:
        """All rows of tables whose boxes have the same form, in their order; none of no tables."""
        parts = [part for part in tables if len(part)]
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4)), np.empty(0))
        if len({part.corners for part in parts}) > 1:
            raise ValueError("tables with corners and with sizes cannot be joined")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        return replace(parts[0], **joined)

    def check_finite(self) -> None:
        """Raise UserError, with the number of the row, for a score or box that is not finite."""
        bad = ~(np.isfinite(self.scores) & np.isfinite(self.boxes).all(1))
        if bad.any():
            number = int(bad.argmax())
            score, image = float(self.scores[number]), int(self.image_ids[number])
            what = f"bbox is {self.boxes[number].tolist()}" if math.isfinite(score) else f"score is {score}"
            raise UserError(f"detection {number} (image {image}): {what}; leave out what is not finite")


def _id(row: Mapping[str, Any], key: str) -> int:
    value = row[key]
    if isinstance(value, str | bool) or int(value) != value or abs(int(value)) > LARGEST_ID:
        raise ValueError(f"{key} must be an integer of 64 bits, found {value!r:.60}")
    return int(value)
