"""The detections of one picture, the same type from a checkpoint, an exported file, an engine and a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from deploy.core.detection_table import DetectionTable
from deploy.core.draw import draw_boxes
from deploy.core.errors import UserError
from deploy.core.image import Picture, read_picture


@dataclass(frozen=True)
class Detection:
    """One box. `box` is xyxy in pixels of the picture; `label` indexes the model's class names.

    category_id: the data set's own id of the class; None where the model does not know it.
    """

    box: tuple[float, float, float, float]
    score: float
    label: int
    class_name: str
    category_id: int | None


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of one picture, highest score first. Iterates over `Detection`s; `d[d.scores > 0.5]` chooses.

    Raises ValueError for arrays whose shapes do not fit each other.
    """

    boxes: np.ndarray
    """float32 [n, 4] xyxy in pixels of the picture, turned upright as its EXIF data says."""
    scores: np.ndarray
    """float32 [n] in 0..1."""
    labels: np.ndarray
    """int64 [n], indices into `class_names`."""
    class_names: tuple[str, ...]
    """All classes of the model."""
    category_ids: tuple[int, ...] | None = None
    """The data set's own id of each class; None where the model does not know them."""
    path: Path | None = None
    """The file of the picture; None for pixels and bytes."""

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.labels.shape != (n,):
            shapes = ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in ("boxes", "scores", "labels"))
            raise ValueError(f"detections are boxes [n, 4], scores [n], labels [n]; these are {shapes}")

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        for box, score, label in rows:
            category = None if self.category_ids is None else self.category_ids[label]
            yield Detection(tuple(box), score, label, self.class_names[label], category)

    @overload
    def __getitem__(self, chosen: int) -> Detection: ...
    @overload
    def __getitem__(self, chosen: slice | np.ndarray | Sequence[int]) -> Detections: ...
    def __getitem__(self, chosen: Any) -> Detection | Detections:
        """One detection by its number; several by a slice, a mask or a list of numbers."""
        if isinstance(chosen, int | np.integer):
            return next(iter(self[[int(chosen)]]))
        if not isinstance(chosen, slice):
            chosen = np.asarray(chosen, dtype=None if len(chosen) else np.int64)
        return self._with(self.boxes[chosen], self.scores[chosen], self.labels[chosen])

    def __eq__(self, other: object) -> bool:
        """Equality of boxes, scores, labels and classes, to the bit; the file does not count."""
        if not isinstance(other, Detections):
            return NotImplemented
        arrays = ("boxes", "scores", "labels")
        same = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in arrays)
        return same and (self.class_names, self.category_ids) == (other.class_names, other.category_ids)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        where = "" if self.path is None else f" in {self.path.name}"
        listed = ", ".join(f"{found.class_name} {found.score:.2f}" for found in self[:5])
        return f"<{len(self)} detections{where}{': ' if len(self) else ''}{listed}{', …' if len(self) > 5 else ''}>"

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO result rows `{image_id, category_id, bbox: [x, y, width, height], score}` in pixels.

        category_ids: the id of each class; None: the model's own. Raises UserError when it has none.
        """
        table = self.to_table(image_id, category_ids)
        columns = table.category_ids.tolist(), table.xywh(np.arange(len(self))).tolist(), self.scores.tolist()
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(*columns, strict=True)
        ]

    def to_table(self, image_id: int, category_ids: Sequence[int] | None = None) -> DetectionTable:
        """The same as `to_coco` gives as columns."""
        ids = self.category_ids if category_ids is None else category_ids
        if ids is None:
            raise UserError("to_coco: the model does not know the category ids of its classes: give category_ids")
        if len(ids) != len(self.class_names):
            raise UserError(f"to_coco: {len(ids)} category_ids for {len(self.class_names)} classes")
        images = np.full(len(self), image_id, np.int64)
        categories = np.asarray(ids, np.int64)[self.labels]
        return DetectionTable(images, categories, self.boxes, self.scores, corners=True)

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, with the class names in its `data`. Raises UserError without that package."""
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise UserError("to_supervision: supervision is not installed: pip install supervision") from error
        names = np.array([self.class_names[label] for label in self.labels.tolist()], dtype=str)
        return supervision.Detections(
            xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data={"class_name": names}
        )

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row a detection: class_name, category_id, score, x1, y1, x2, y2 in pixels of the
        picture, path. Raises UserError without that package."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise UserError("to_pandas: pandas is not installed: pip install pandas") from error
        ids = [None] * len(self.class_names) if self.category_ids is None else self.category_ids
        columns: dict[str, Any] = {
            "class_name": [self.class_names[label] for label in self.labels.tolist()],
            "category_id": [ids[label] for label in self.labels.tolist()],
            "score": self.scores,
            **dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T, strict=True)),
        }
        return pandas.DataFrame(columns).assign(path=None if self.path is None else str(self.path))

    def to_fiftyone(self, size: tuple[int, int]) -> Any:
        """A `fiftyone.Detections`, whose boxes are shares of a picture of this (height, width). Raises UserError
        without that package."""
        try:
            import fiftyone
        except ModuleNotFoundError as error:
            raise UserError("to_fiftyone: fiftyone is not installed: pip install fiftyone") from error
        height, width = size
        corners = self.boxes.astype(np.float64) / (width, height, width, height)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        return fiftyone.Detections(
            detections=[
                fiftyone.Detection(label=found.class_name, bounding_box=box, confidence=found.score)
                for found, box in zip(self, boxes, strict=True)
            ]
        )

    def plot(self, picture: Picture | None = None, *, min_score: float = 0.0) -> Image.Image:
        """The picture with boxes, class names and scores drawn into it.

        picture: a file, its bytes, a PIL image or pixels uint8 [h, w, 3]; None: the file that was looked at.
        min_score: boxes below it are left out. Raises UserError when there is no picture, or it cannot be read.
        """
        source = self.path if picture is None else picture
        if source is None:
            raise UserError("plot: the detections are of pixels that were not kept: give the picture")
        drawn = Image.fromarray(read_picture(source))
        draw_boxes(drawn, list(self[self.scores >= min_score]))
        return drawn

    def _with(self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Detections:
        return Detections(boxes, scores, labels, self.class_names, self.category_ids, self.path)
