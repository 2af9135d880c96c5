"""A COCO JSON with what some detector found, as a teacher: it looks images up instead of looking at them.

Two forms. A list of results, `[{"image_id", "category_id", "bbox", "score"}, …]`, as every COCO evaluation takes it:
images and categories are known by id alone, so the images must come from the COCO file that the ids belong to, and the
names of the categories from the data. Or a whole document with `images`, `categories` and scored `annotations`, as
`compress pseudo-label` writes it: images are known by file name, so they may be those of a folder; where it says their
`width` and `height`, they must have that size. Regions to ignore (`iscrowd`) count as what they are, boxes with a lower
score.

An id or a name that stands for two images, one of the training and one of the validation set, says nothing about
either: `covers` refuses it.

The file is read as a whole; after that boxes lie in memory as flat arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.detectors.base import Capability, Detector, ImageDetections
from compress.teachers.base import Preprocessing, Sample, View, final
from compress.teachers.first_look import BOXES, SHARE
from deploy.core.card import SCORE_THRESHOLD
from deploy.core.errors import LocalUserError, UserError
from deploy.core.files import sha256_of
from deploy.core.shown import some
from deploy.core.storage import fetch


class ResultsTeacher:
    """Teacher in a file of results.

    Args:
        path: the JSON file.
        categories: names by category id, needed for a list of results.

    Raises:
        UserError: not such a file; a row without a field, or with a category that has no name.
    """

    capabilities = frozenset({Capability.BOXES})
    detector: Detector | None = None
    view = View.NAME
    preprocessing: Preprocessing | None = None
    settings: Mapping[str, Any]

    def __init__(self, path: Path, categories: Mapping[int, str] | None = None) -> None:
        self.file, self._path = path.name, path
        content = _read(path)
        self.sha256 = sha256_of(path)
        self._by_name = isinstance(content, dict)
        self._asked: dict[int | str, Path] = {}
        self._sizes: dict[str, tuple[int, int]]
        if isinstance(content, dict):
            images = _section(path, content, "images", {"id": int, "file_name": str}, _SIZE)
            keys = {row["id"]: row["file_name"] for row in images}
            self._sizes = {
                row["file_name"]: (row["height"], row["width"]) for row in images if row.keys() >= _SIZE.keys()
            }
            if len(set(keys.values())) < len(images):
                raise UserError(f"{path}: images: two have the same id or file_name, so they cannot be told apart")
            named = {row["id"]: row["name"] for row in _section(path, content, "categories", {"id": int, "name": str})}
            rows = _section(path, content, "annotations", _ROW)
        else:
            if categories is None:
                raise UserError(
                    f"{path}: a list of results knows its categories by id alone; give the COCO file with their names "
                    "(--categories)"
                )
            keys, named, rows = {}, dict(categories), _checked(path, "", content, _ROW)
            self._sizes = {}
        ids = sorted(named)
        self.class_names: tuple[str, ...] | None = tuple(named[number] for number in ids)
        # The names come from the data, so which ids they have belongs to the settings.
        self.settings = {} if self._by_name else {"categories": {str(number): named[number] for number in ids}}
        label = {number: index for index, number in enumerate(ids)}
        self._places: dict[int | str, list[int]] = {keys[number]: [] for number in keys}
        self._boxes = np.empty((len(rows), 4), np.float32)
        self._scores = np.empty(len(rows), np.float64)
        self._labels = np.empty(len(rows), np.int64)
        for index, row in enumerate(rows):
            where = f"{path}: {'annotations' if self._by_name else ''}[{index}]"
            if row["category_id"] not in label:
                raise UserError(f"{where}: category_id {row['category_id']} has no name; known ids are {some(ids)}")
            key = keys.get(row["image_id"]) if self._by_name else row["image_id"]
            if key is None:
                raise UserError(f"{where}: image_id {row['image_id']} is not among the images")
            box = row["bbox"]
            if len(box) != 4 or not all(isinstance(side, int | float) and math.isfinite(side) for side in box):
                raise UserError(f"{where}: bbox must be four numbers [x, y, w, h], found {str(box)[:60]}")
            if not 0 <= row["score"] <= 1:
                raise UserError(f"{where}: score must lie in 0..1, found {row['score']}")
            self._boxes[index] = box[0], box[1], box[0] + box[2], box[1] + box[3]
            self._scores[index], self._labels[index] = row["score"], label[row["category_id"]]
            self._places.setdefault(key, []).append(index)
        self._need_pixels()

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        if self._by_name:
            absent = [name for name in names if name not in self._places]
            if absent:
                raise UserError(
                    f"{self._path}: images: {len(absent)} of {len(names)} images are not there, the first is "
                    f"{absent[0]}; file names must be the same in both"
                )
            self._need_one_image_each(names, names, folder)
            return None
        if ids is None:
            raise UserError(
                f"{self._path}: a list of results knows images by id, and those of a folder have none; give the COCO "
                "file that the ids belong to"
            )
        empty = sum(number not in self._places for number in ids)
        if empty == len(ids):
            raise UserError(f"{self._path}: has no result for any of the {len(ids)} images; do the ids belong to them?")
        self._need_one_image_each(ids, names, folder)
        return f"{self._path}: no result for {empty} of {len(ids)} images: nothing was found there" if empty else None

    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        found = []
        for sample in samples:
            self._need_size(sample)
            rows = self._places.get(sample.name if self._by_name else sample.image_id, [])
            found.append(
                final(
                    torch.from_numpy(self._boxes[rows]),
                    torch.from_numpy(self._scores[rows]),
                    torch.from_numpy(self._labels[rows]),
                    size=sample.size.original,
                    score_threshold=score_threshold,
                )
            )
        return found

    def _need_one_image_each(self, keys: Sequence[int | str], names: Sequence[str], folder: Path) -> None:
        folder = folder.resolve()
        for key, name in zip(keys, names, strict=True):
            file = folder / name
            other = self._asked.setdefault(key, file)
            if other == file:
                continue
            if self._by_name:
                remedy = "put both below one folder and name them relative to it, in the document too"
            else:
                remedy = "give a COCO document (images, categories and scored annotations), which knows them by name"
            raise UserError(
                f"{self._path}: {'the name' if self._by_name else 'image_id'} {key} stands for two images, {other} and "
                f"{file}; {remedy}"
            )

    def _need_pixels(self) -> None:
        """Raises UserError where nearly all boxes are smaller than a pixel: shares of the sides, most likely."""
        sides = (self._boxes[:, 2:] - self._boxes[:, :2])[self._scores >= SCORE_THRESHOLD]
        small = int((sides < 1).all(1).sum())
        if len(sides) >= BOXES and small > SHARE * len(sides):
            raise UserError(
                f"{self._path}: bbox must be [x, y, w, h] in pixels of the image; {small} of {len(sides)} are smaller "
                "than a pixel, as shares of its sides are: multiply them by width and height"
            )

    def _need_size(self, sample: Sample) -> None:
        height, width = sample.size.original
        stated = self._sizes.get(sample.name, (height, width))
        if stated != (height, width):
            raise LocalUserError(
                f"{self._path}: images: {sample.name} is {stated[1]}x{stated[0]} pixels there and {width}x{height} "
                "here, so it is another image; give the results of these images, or their right width and height"
            )


# --- details --------------------------------------------------------------------------------------------

_SIZE: dict[str, type] = {"width": int, "height": int}
_ROW: dict[str, type] = {"image_id": int, "category_id": int, "bbox": list, "score": float}
_NOTHING: dict[str, type] = {}
_WORDS = {int: "an integer", str: "text", list: "a list", float: "a number"}


def _read(path: Path) -> Any:
    try:
        content = json.loads(fetch(path).read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON in UTF-8") from None
    if not isinstance(content, list | dict):
        raise UserError(f"{path}: neither a list of COCO results nor a COCO document")
    return content


def _section(
    path: Path, content: dict[str, Any], name: str, fields: Mapping[str, type], optional: Mapping[str, type] = _NOTHING
) -> list[dict[str, Any]]:
    rows = content.get(name)
    if not isinstance(rows, list):
        raise UserError(f"{path}: {name}: must be a list; a COCO document has images, categories and annotations")
    return _checked(path, name, rows, fields, optional)


def _checked(
    path: Path, name: str, rows: list[Any], fields: Mapping[str, type], optional: Mapping[str, type] = _NOTHING
) -> list[dict[str, Any]]:
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: {name}[{index}]: must be an object")
        for key, kind in (*fields.items(), *optional.items()):
            if key not in row and key in optional:
                continue
            if key not in row:
                hint = "; labels without scores are no results of a detector" if key == "score" else ""
                raise UserError(f"{path}: {name}[{index}]: {key} is missing{hint}")
            fits = isinstance(row[key], (int, float) if kind is float else kind) and not isinstance(row[key], bool)
            if not fits:
                raise UserError(f"{path}: {name}[{index}]: {key} must be {_WORDS[kind]}, found {str(row[key])[:60]}")
    return rows
