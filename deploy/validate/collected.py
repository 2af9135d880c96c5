"""What a runner found in many pictures, in flat arrays: 24 bytes a detection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from deploy.core.detection_table import DetectionTable
from deploy.core.detections import Detections


class Collected(Mapping[int, Detections]):
    """Detections by image id, of one model whose classes have category ids. Arrays grow by doubling, so that large data
    sets lie in few large pieces of memory, which go back when they are freed."""

    def __init__(self) -> None:
        self._places: dict[int, slice] = {}
        self._model: Detections | None = None  # without rows: its classes
        self._boxes = _Column(np.float32, 4)
        self._scores = _Column(np.float32)
        self._labels = _Column(np.int32)

    def add(self, image_id: int, found: Detections) -> None:
        """Take in the detections of a picture."""
        if self._model is None:
            self._model = found[:0]
        start = len(self._scores)
        for column, values in ((self._boxes, found.boxes), (self._scores, found.scores), (self._labels, found.labels)):
            column.extend(values)
        self._places[image_id] = slice(start, len(self._scores))

    def extend(self, other: Collected) -> None:
        """Take in the detections of further pictures of the same model."""
        if self._model is None:
            self._model = other._model
        start = len(self._scores)
        for mine, theirs in ((self._boxes, other._boxes), (self._scores, other._scores), (self._labels, other._labels)):
            mine.extend(theirs.values())
        self._places |= {image: slice(start + rows.start, start + rows.stop) for image, rows in other._places.items()}

    def __getitem__(self, image_id: int) -> Detections:
        rows = self._places[image_id]
        assert self._model is not None, "it holds a picture"
        columns = self._boxes.values()[rows], self._scores.values()[rows], self._labels.values()[rows].astype(np.int64)
        return Detections(*columns, self._model.class_names, self._model.category_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def table(self) -> DetectionTable:
        """All of them as one table, which shares boxes and scores."""
        ids = () if self._model is None or self._model.category_ids is None else self._model.category_ids
        counts = [rows.stop - rows.start for rows in self._places.values()]
        images = np.repeat(np.fromiter(self._places, np.int64, len(self._places)), counts)
        categories = np.array(ids, np.int64)[self._labels.values()]
        return DetectionTable(images, categories, self._boxes.values(), self._scores.values(), corners=True)


class _Column:
    """An array [n] or [n, width] that grows."""

    def __init__(self, kind: type[np.generic], width: int | None = None) -> None:
        self._rest: tuple[int, ...] = () if width is None else (width,)
        self._all = np.empty((1024, *self._rest), kind)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def __getstate__(self) -> dict[str, object]:  # without the room to grow
        return {**self.__dict__, "_all": self.values()}

    def extend(self, values: np.ndarray) -> None:
        needed = self._used + len(values)
        if needed > len(self._all):
            larger = np.empty((max(needed, 2 * len(self._all)), *self._rest), self._all.dtype)
            larger[: self._used] = self.values()
            self._all = larger
        self._all[self._used : needed] = values
        self._used = needed

    def values(self) -> np.ndarray:
        return self._all[: self._used]
