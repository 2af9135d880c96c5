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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploy.core.errors import UserError

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CocoMetrics:
        """The metrics that `to_dict` wrote."""
        figures = {name: _or_nan(value) for name, value in values.items() if name != "per_class"}
        return cls(**figures, per_class={name: _or_nan(value) for name, value in values["per_class"].items()})

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types: NaN becomes None."""
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


def read_annotations(path: Path, *, sizes: bool = False) -> dict[str, Any]:
    """Read a COCO detection file and check its shape: three lists of objects with the fields that we use.

    Lists may be empty, and ids may repeat. sizes: every image must also say its width and height.

    Raises:
        UserError: no such file, not JSON (with the line), or a field missing or of the wrong type (with its list, the
            index in it and the key).
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so not COCO JSON") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{path}: not COCO JSON: {error}") from None
    _check_shape(content, str(path), sizes)
    return content


def load_annotations(annotations: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A COCO object to evaluate against: of a file, or the object itself.

    Raises UserError as `read_annotations`, and for a file without images or categories or with an id that repeats.
    """
    where = "annotations" if isinstance(annotations, Mapping) else str(annotations)
    if isinstance(annotations, Mapping):
        content: Mapping[str, Any] = annotations
        _check_shape(content, where, sizes=False)
    else:
        content = read_annotations(annotations)
    for section in ("images", "categories"):
        if not content[section]:
            raise UserError(f"{where}: {section}: the list is empty, there is nothing to evaluate")
        repeated = [key for key, count in Counter(entry["id"] for entry in content[section]).items() if count > 1]
        if repeated:
            raise UserError(f"{where}: {section}: id {repeated[0]} is used more than once; ids must be unique")
    return content


# ----------------------------------------------------------------------------------------------------


_FIELDS: dict[str, dict[str, str]] = {
    "categories": {"id": "integer", "name": "text"},
    "images": {"id": "integer", "file_name": "text"},
    "annotations": {"image_id": "integer", "category_id": "integer", "bbox": "box"},
}
_SIZES = {"width": "size", "height": "size"}
_OPTIONAL = {"area": "number", "iscrowd": "flag", "ignore": "flag"}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str)),
    "integer": ("an integer", _is_integer),
    "size": ("a positive integer", lambda value: _is_integer(value) and value > 0),
    "number": ("a number", _is_number),
    "flag": ("0 or 1", lambda value: value in (0, 1)),
    "box": (
        "four numbers [x, y, w, h]",
        lambda value: isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_number, value)),
    ),
}


def _check_shape(content: Any, where: str, sizes: bool) -> None:
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: COCO JSON is an object with images, annotations and categories; this is not")
    for section, fields in _FIELDS.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            raise UserError(f"{where}: {section}: must be a list, found {_kind(entries)}")
        if section == "images" and sizes:
            fields = fields | _SIZES
        optional = _OPTIONAL if section == "annotations" else {}
        for index, entry in enumerate(entries):
            place = f"{where}: {section}[{index}]"
            if not isinstance(entry, Mapping):
                raise UserError(f"{place}: must be an object, found {_kind(entry)}")
            for key, kind in fields.items():
                if key not in entry:
                    raise UserError(f"{place}: {key} is missing")
                _check_value(place, key, kind, entry[key])
            for key, kind in optional.items():
                if key in entry:
                    _check_value(place, key, kind, entry[key])


def _check_value(place: str, key: str, kind: str, value: Any) -> None:
    wanted, fits = _KINDS[kind]
    if not fits(value):
        raise UserError(f"{place}: {key} must be {wanted}, found {json.dumps(value, default=str)[:60]}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


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


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
