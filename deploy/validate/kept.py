"""What was found on labelled images, kept in a folder, so that figures can be made of it without images and models.

keep_labels(folder, content, images)        labels.json: a COCO file of the images, classes and boxes
keep_detections(folder, "student", table)   student.npz
kept = Kept(folder)
kept.truth, kept.table("student")
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.detection_table import COLUMNS, DetectionTable
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, write_json
from deploy.core.storage import place, shown
from deploy.validate.coco import load_annotations
from deploy.validate.ground_truth import GroundTruth

LABELS = "labels.json"
SUFFIX = ".npz"
IMAGE_FIELDS = ("id", "file_name", "width", "height", "slice")
BOX_FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd")
FOLDER = "images_folder"
"""Key in `info` of the labels: where the images lie."""


def keep_labels(folder: Path, content: Mapping[str, Any], images: Path) -> None:
    """Write what figures need of a COCO document; `images` is the folder of its images."""
    write_json(
        folder / LABELS,
        {
            "info": {FOLDER: shown(Path(images).absolute())},
            "images": [_some(entry, IMAGE_FIELDS) for entry in content["images"]],
            "categories": [_some(entry, ("id", "name")) for entry in content["categories"]],
            "annotations": [_some(entry, BOX_FIELDS) for entry in content["annotations"]],
        },
    )


def keep_detections(folder: Path, name: str, table: DetectionTable) -> None:
    """Write a table under a name, boxes and scores as float32."""
    path = detections_file(folder, name)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            image_ids=table.image_ids,
            category_ids=table.category_ids,
            boxes=table.boxes.astype(np.float32),
            scores=table.scores.astype(np.float32),
            corners=np.array(table.corners),
        )


def detections_file(folder: Path, name: str) -> Path:
    """The file of the table of this name."""
    return folder / f"{name}{SUFFIX}"


class Kept:
    """A folder that `keep_labels` and `keep_detections` wrote into."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def __bool__(self) -> bool:
        """There are labels."""
        return (self.folder / LABELS).is_file()

    def __contains__(self, name: str) -> bool:
        return detections_file(self.folder, name).is_file()

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The labels as a COCO document. Raises UserError for a damaged file."""
        return load_annotations(self.folder / LABELS)

    @cached_property
    def truth(self) -> GroundTruth:
        return GroundTruth.of(self.content)

    @cached_property
    def identity(self) -> str:
        """Identify the images by name and their labels, wherever they lie."""
        parts = {key: self.content[key] for key in ("images", "categories", "annotations")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def path(self, image_id: int) -> Path:
        """The file of an image, where it lay."""
        return place(self.content.get("info", {}).get(FOLDER, "")) / self._names[image_id]

    def table(self, name: str) -> DetectionTable:
        """The detections of a name. Raises UserError for a damaged file."""
        path = detections_file(self.folder, name)
        try:
            with np.load(path) as found:
                ids, classes, boxes, scores = (found[key] for key in COLUMNS)
                return DetectionTable(ids, classes, boxes, scores, corners=bool(found["corners"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it and run the recipe again") from None

    @cached_property
    def _names(self) -> dict[int, str]:
        return {entry["id"]: entry["file_name"] for entry in self.content["images"]}


# --- details --------------------------------------------------------------------------------------------


def _some(entry: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: entry[key] for key in keys if key in entry}
