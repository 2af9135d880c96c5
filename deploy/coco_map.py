"""COCO mean average precision of a list of detections.

`evaluate_coco(annotations, results)` gives the usual figures in percent. Two evaluators compute them:
`faster` (faster-coco-eval, the default, about six times quicker) and `pycocotools` (the reference that the
tests compare it to).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploy.errors import UserError

Backend = Literal["faster", "pycocotools"]


@dataclass(frozen=True)
class CocoMetrics:
    """COCO box metrics in percent (0..100). A figure is NaN where no ground truth of its kind exists.

    `map` averages IoU 0.50:0.05:0.95 with 100 detections an image; `map_small`, `map_medium`, `map_large`
    split the ground truth at 32² and 96² pixels; `mar100` is the mean recall with 100 detections.
    `per_class` maps the category name to its AP; two categories of one name are told apart by their id.
    """

    map: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    mar100: float
    per_class: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: NaN becomes None."""
        values = asdict(self)
        per_class = values.pop("per_class")
        return {
            **{name: _or_none(value) for name, value in values.items()},
            "per_class": {name: _or_none(value) for name, value in per_class.items()},
        }


def evaluate_coco(
    annotations: Path | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    backend: Backend = "faster",
) -> CocoMetrics:
    """Score `results` against COCO `annotations` (a file or its parsed content).

    `results` holds COCO result rows `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}` in pixels
    of the original image. An empty list is a detector that finds nothing: zeros. Neither argument is
    modified, nothing is printed. Images of `annotations` without a row count as empty.

    Raises UserError when the annotations are unreadable or a row names an image or category that they do not
    have.
    """
    dataset = _prepare_dataset(annotations)
    rows = _prepare_rows(results, dataset)
    coco, evaluator = _evaluator_classes(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
        ground_truth = coco()
        ground_truth.dataset = dataset
        ground_truth.createIndex()
        evaluation = evaluator(ground_truth, ground_truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])  # [IoU 10, recall 101, class, area 4, detections 3]
    recall = np.asarray(evaluation.eval["recall"])  # [IoU 10, class, area 4, detections 3]
    names = _class_names(dataset)
    return CocoMetrics(
        map=_percent(precision[:, :, :, 0, -1]),
        map50=_percent(precision[0, :, :, 0, -1]),
        map75=_percent(precision[5, :, :, 0, -1]),
        map_small=_percent(precision[:, :, :, 1, -1]),
        map_medium=_percent(precision[:, :, :, 2, -1]),
        map_large=_percent(precision[:, :, :, 3, -1]),
        mar100=_percent(recall[:, :, 0, -1]),
        per_class={name: _percent(precision[:, :, k, 0, -1]) for k, name in enumerate(names)},
    )


def load_annotations(annotations: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The COCO object of a file (or the object itself), with its three lists present. Raises UserError."""
    where = "annotations"
    if isinstance(annotations, Mapping):
        content: Any = annotations
    else:
        where = str(annotations)
        try:
            content = json.loads(Path(annotations).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{where}: cannot read the annotations: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{where}: not a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
            raise UserError(f"{where}: not a COCO file: it has no list '{key}'")
    if not content["images"] or not content["categories"]:
        raise UserError(f"{where}: nothing to evaluate: the file lists no images or no categories")
    return content


# ----------------------------------------------------------------------------------------------------


def _prepare_dataset(annotations: Path | Mapping[str, Any]) -> dict[str, Any]:
    """A copy that both evaluators read alike.

    The annotations are numbered from 1, because pycocotools stores the matched id and reads 0 as "not
    matched"; a missing `area` is the box's, a missing `iscrowd` is 0. Box evaluation needs no masks, so they
    stay behind.
    """
    content = load_annotations(annotations)
    rows = []
    for number, row in enumerate(content["annotations"], start=1):
        _x, _y, width, height = row["bbox"]
        rows.append(
            {
                "id": number,
                "image_id": row["image_id"],
                "category_id": row["category_id"],
                "bbox": row["bbox"],
                "area": row.get("area", width * height),
                "iscrowd": row.get("iscrowd", 0),
                "ignore": row.get("ignore", 0),
            }
        )
    return {
        "info": {},
        "images": [dict(image) for image in content["images"]],
        "categories": sorted((dict(category) for category in content["categories"]), key=lambda row: row["id"]),
        "annotations": rows,
    }


def _prepare_rows(results: Sequence[Mapping[str, Any]], dataset: dict[str, Any]) -> list[dict[str, Any]]:
    images = {image["id"] for image in dataset["images"]}
    categories = {category["id"] for category in dataset["categories"]}
    rows = []
    for number, row in enumerate(results):
        if row["image_id"] not in images:
            raise UserError(f"detection {number}: image_id {row['image_id']} is not in the annotations")
        if row["category_id"] not in categories:
            raise UserError(f"detection {number}: category_id {row['category_id']} is not in the annotations")
        rows.append(
            {
                "image_id": int(row["image_id"]),
                "category_id": int(row["category_id"]),
                "bbox": [float(value) for value in row["bbox"]],
                "score": float(row["score"]),
            }
        )
    if not rows:  # one certain miss scores the same as nothing, and spares both evaluators the empty case
        first = (dataset["images"][0]["id"], dataset["categories"][0]["id"])
        rows = [{"image_id": first[0], "category_id": first[1], "bbox": [-10.0, -10.0, 1.0, 1.0], "score": 0.0}]
    return rows


def _evaluator_classes(backend: Backend) -> tuple[Any, Any]:
    if backend == "faster":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    if backend == "pycocotools":
        from pycocotools.coco import COCO as ReferenceCoco
        from pycocotools.cocoeval import COCOeval

        return ReferenceCoco, COCOeval
    raise UserError(f"unknown COCO evaluator '{backend}': choose 'faster' or 'pycocotools'")


def _class_names(dataset: dict[str, Any]) -> list[str]:
    names = [str(category["name"]) for category in dataset["categories"]]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({category['id']})" for name, category in zip(names, dataset["categories"], strict=True)]


def _percent(values: np.ndarray) -> float:
    """Mean of the entries that exist (the evaluators mark "no ground truth" with -1), in percent."""
    present = values[values > -1]
    return float(present.mean() * 100.0) if present.size else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
