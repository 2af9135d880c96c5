"""The labels of a COCO file as a few columns: what training reads of it, in tens of bytes a box.

`plain_tables` makes them by the general reader, with every check and message; `compress.data.index` makes the same ones
from large files faster, and keeps them on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deploy.core.errors import UserError
from deploy.core.image import image_size
from deploy.validate.coco import images_without_size, read_annotations
from deploy.validate.labels import (
    MOST_OBJECTS,
    WHILE_TRAINING,
    label_notes,
    line,
    many_objects,
    objects_of_images,
)


@dataclass(frozen=True, eq=False)
class LabelTables:
    """Columns of images [i], in the order of the file, of the boxes [n] that can be learned from, image by image, and
    of images that hold objects [o], in the order in which the annotations name them."""

    category_ids: tuple[int, ...]
    """Ascending; the place in this tuple is the label."""
    categories: tuple[str, ...]
    """Their names."""
    unlabeled: tuple[int, ...]
    """Labels that `info.coverage` does not have."""
    dropped: Counter[str]
    """Counts of annotations that were left out, by reason."""
    notes: tuple[str, ...]
    """Lines of `deploy.validate.labels`, those that depend on nothing but the file."""

    image_ids: np.ndarray
    """int64 [i]; Python's integers (object) where one has more than 64 bits."""
    sizes: np.ndarray
    """int32 [i, 2]: (height, width) in pixels."""
    text: np.ndarray
    """uint8: the file names in UTF-8, one behind the other."""
    text_ends: np.ndarray
    """int64 [i], where each ends."""
    ends: np.ndarray
    """int64 [i], where the boxes of each image end."""
    objects: np.ndarray
    """int32 [i], boxes of each that are no crowd regions."""

    boxes: np.ndarray
    """float32 [n, 4], xyxy in pixels."""
    labels: np.ndarray
    """int32 [n]."""
    crowd: np.ndarray
    """bool [n]."""
    uncertain: np.ndarray | None
    """bool [n], regions of pseudo labels that are to be ignored; None: there are none."""
    scores: np.ndarray | None
    """float32 [n]; None: all are 1."""

    named_ids: np.ndarray
    """int64 [o], or object: ids of images, those that the file does not list too."""
    named_objects: np.ndarray
    """int64 [o], crowd regions aside."""
    named_most: np.ndarray
    """int64 [o], objects of the class that has most."""

    def name(self, row: int) -> str:
        """The image's `file_name`."""
        first = self.text_ends[row - 1] if row else 0
        return self.text[first : self.text_ends[row]].tobytes().decode("utf-8", "surrogatepass")

    def rows_of(self, row: int) -> slice:
        """The boxes of an image."""
        return slice(int(self.ends[row - 1]) if row else 0, int(self.ends[row]))

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """int64 [i], how many of an image's boxes are chosen, bool [n]."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        return np.diff(before[self.ends], prepend=0)

    def label_notes(self, max_detections: int) -> list[str]:
        """What `deploy.validate.labels.label_notes` says of the kinds WHILE_TRAINING."""
        many = (self.named_most > MOST_OBJECTS) | (self.named_objects > max_detections)
        if not many.any():
            return list(self.notes)
        place = int(many.argmax())
        image, count, most = (int(column[place]) for column in (self.named_ids, self.named_objects, self.named_most))
        first = many_objects(image, count, most, max_detections)
        assert first is not None, "it was chosen by the same limits"
        return [*self.notes, line(first, int(many.sum()))]


def plain_tables(annotations: Path, images: Path) -> tuple[LabelTables, bool]:
    """Read a file by `read_annotations`, and sizes that it does not say from the `images`. Also whether the tables
    depend on the file alone, and every id has 64 bits.

    Raises UserError as `read_annotations`, and for a file without categories, with an image id that repeats, or with a
    coverage or a score that cannot be.
    """
    document = read_annotations(annotations)
    without = images_without_size(document, str(annotations))
    for entry in without:
        entry["height"], entry["width"] = image_size(images / entry["file_name"])
    tables = tables_of(document, annotations)
    return tables, not without and tables.image_ids.dtype == tables.named_ids.dtype == np.int64


def tables_of(document: dict[str, Any], where: Path) -> LabelTables:
    """The columns of a document all of whose images have sizes. where: for messages."""
    category_ids, categories = classes_of(document["categories"], where)
    entries = document["images"]
    ids = [entry["id"] for entry in entries]
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UserError(f"{where}: images: id {repeated[0]} is used more than once; ids must be unique")
    labels = {value: i for i, value in enumerate(category_ids)}
    unlabeled = unlabeled_of(document.get("info"), labels, where)
    kept, dropped = _usable(document, labels, set(unlabeled), where)
    text, text_ends = texts([entry["file_name"] for entry in entries])
    rows = [kept.get(identifier, []) for identifier in ids]
    flat = [item for row in rows for item in row]
    crowd = np.array([row.crowd for row in flat], bool)
    uncertain = np.array([row.uncertain for row in flat], bool)
    scores = np.array([row.score for row in flat], np.float32)
    named = list(objects_of_images(document))
    return LabelTables(
        category_ids,
        categories,
        unlabeled,
        dropped,
        tuple(label_notes(document, kinds=set(WHILE_TRAINING) - {"many-objects"})),
        image_ids=_integers(ids),
        sizes=np.array([(entry["height"], entry["width"]) for entry in entries], np.int32).reshape(-1, 2),
        text=text,
        text_ends=text_ends,
        ends=np.cumsum([len(row) for row in rows], dtype=np.int64),
        objects=np.array([sum(not item.crowd for item in row) for row in rows], np.int32),
        boxes=torch.tensor([row.box for row in flat], dtype=torch.float32).reshape(-1, 4).numpy(),
        labels=np.array([row.label for row in flat], np.int32),
        crowd=crowd,
        uncertain=uncertain if uncertain.any() else None,
        scores=scores if (scores != 1).any() else None,
        named_ids=_integers([image for image, _, _ in named]),
        named_objects=np.array([count for _, count, _ in named], np.int64),
        named_most=np.array([most for _, _, most in named], np.int64),
    )


def classes_of(categories: Sequence[Mapping[str, Any]], where: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids, ascending, and names. Raises UserError where there are none."""
    if not categories:
        raise UserError(f"{where}: categories: the list is empty, there is nothing to detect")
    names = {category["id"]: category["name"] for category in categories}
    ids = tuple(sorted(names))
    return ids, tuple(names[identifier] for identifier in ids)


def unlabeled_of(info: Any, labels: Mapping[int, int], where: Path) -> tuple[int, ...]:
    """Labels that `info.coverage`, a list of category ids, does not have; none without it."""
    coverage = info.get("coverage") if isinstance(info, dict) else None
    if coverage is None:
        return ()
    if not isinstance(coverage, list) or not all(type(value) is int and value in labels for value in coverage):
        raise UserError(f"{where}: info.coverage: must be a list of ids of its categories, those that were looked for")
    return tuple(sorted(set(labels.values()) - {labels[value] for value in coverage}))


def texts(values: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Columns `text` and `text_ends`."""
    encoded = [value.encode("utf-8", "surrogatepass") for value in values]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(value) for value in encoded], dtype=np.int64)


# --- details --------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """An annotation: box xyxy in pixels; uncertain: a crowd region that is to be ignored (of pseudo labels)."""

    box: list[float]
    label: int
    crowd: bool
    uncertain: bool
    score: float


def _usable(
    document: dict[str, Any], labels: dict[int, int], nobody_looked_for: set[int], where: Path
) -> tuple[dict[int, list[_Row]], Counter[str]]:
    """Per image id the annotations to learn from; and how many fell out, and why."""
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in document["images"]}
    kept: dict[int, list[_Row]] = {}
    dropped: Counter[str] = Counter()
    for index, annotation in enumerate(document["annotations"]):
        x, y, w, h = annotation["bbox"]
        size = sizes.get(annotation["image_id"])
        label = labels.get(annotation["category_id"])
        if size is None:
            dropped["unknown image"] += 1
        elif label is None:
            dropped["unknown category"] += 1
        elif label in nobody_looked_for:
            dropped["category not in info.coverage"] += 1
        elif not (w >= 1 and h >= 1) or annotation.get("area", 1) <= 0:  # not (…): NaN counts as empty
            dropped["empty box"] += 1
        elif min(x + w, size[0]) <= max(x, 0) or min(y + h, size[1]) <= max(y, 0):
            dropped["outside the image"] += 1
        else:
            crowd = bool(annotation.get("iscrowd", 0))
            uncertain = crowd and bool(annotation.get("ignore", 0))
            score = annotation.get("score", 1.0)
            if type(score) not in (int, float) or not 0 <= score <= 1:
                raise UserError(f"{where}: annotations[{index}]: score must be a number from 0 to 1, found {score!r}")
            row = _Row([x, y, x + w, y + h], label, crowd, uncertain, score)
            kept.setdefault(annotation["image_id"], []).append(row)
    return kept, dropped


def _integers(values: list[int]) -> np.ndarray:
    try:
        return np.array(values, np.int64)
    except OverflowError:
        return np.array(values, object)
