"""COCO mean average precision of a list of detections.

`evaluate_coco(annotations, results)` gives COCO's twelve figures in percent. `faster`, the default, is this project's
own (`average_precision`); `pycocotools` is the reference, whose bits the tests compare it with.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploy.core.card import OperatingPoint
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError
from deploy.core.image import image_size
from deploy.core.storage import fetch
from deploy.validate.average_precision import Curves, curves
from deploy.validate.ground_truth import GroundTruth

Backend = Literal["faster", "pycocotools"]

LARGEST = 1e300
"""Integers beyond it are no numbers to a box; JSON may have hundreds of digits."""
DETECTIONS = 100
"""Detections of a class in an image that COCO counts."""
FIGURES = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("mar1", "mar10", "mar100", "mar_small", "mar_medium", "mar_large"),
)
"""Fields of `CocoMetrics` in the order of COCO's summary."""
POINT = "operating_point"


@dataclass(frozen=True)
class CocoMetrics:
    """COCO box metrics in percent (0..100). A figure is NaN where no ground truth of its kind exists.

    `map` averages IoU 0.50:0.05:0.95 with 100 detections of a class in an image; `map_small`, `map_medium`, `map_large`
    split the ground truth at 32² and 96² pixels; `mar1`, `mar10` and `mar100` are the mean recall with so many
    detections, `mar_small`, `mar_medium` and `mar_large` that of objects of a size with 100. Results of older versions
    have no other recall than `mar100`.
    `per_class` maps the category name to its AP; two categories of one name are told apart by their id.
    `max_detections`, if more than 100 were asked for; then `map_at_max` and `mar_at_max` are mAP and mean recall with
    so many, None otherwise.
    `operating_point`: of the same detections, where it was measured (`operating_point`); not in percent.
    """

    map: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    mar100: float
    mar1: float = math.nan
    mar10: float = math.nan
    mar_small: float = math.nan
    mar_medium: float = math.nan
    mar_large: float = math.nan
    per_class: dict[str, float] = field(default_factory=dict)
    max_detections: int | None = None
    map_at_max: float | None = None
    mar_at_max: float | None = None
    operating_point: OperatingPoint | None = None

    @property
    def best_map(self) -> float:
        """The mAP that counts all the detections that were asked for."""
        return self.map if self.map_at_max is None else self.map_at_max

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CocoMetrics:
        """The metrics that `to_dict` wrote."""
        figures = {name: _or_nan(value) for name, value in values.items() if name not in ("per_class", POINT)}
        point = None if values.get(POINT) is None else OperatingPoint.model_validate(values[POINT])
        per_class = {name: _or_nan(value) for name, value in values["per_class"].items()}
        return cls(**figures, per_class=per_class, operating_point=point)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types: NaN becomes None. Without `max_detections` and what belongs to it where only 100
        detections count, and without an operating point that was not measured."""
        values = asdict(self)
        per_class, point = values.pop("per_class"), values.pop(POINT)
        if self.max_detections is None:
            for name in ("max_detections", "map_at_max", "mar_at_max"):
                del values[name]
        return {
            **{name: _or_none(value) for name, value in values.items()},
            "per_class": {name: _or_none(value) for name, value in per_class.items()},
            **({} if point is None else {POINT: point.model_dump(mode="json")}),
        }


def evaluate_coco(
    annotations: Path | Mapping[str, Any] | GroundTruth,
    results: Sequence[Mapping[str, Any]] | DetectionTable,
    *,
    max_detections: int = DETECTIONS,
    backend: Backend = "faster",
) -> CocoMetrics:
    """Score `results` against COCO `annotations` (a file, its parsed content, or that as columns).

    `results` holds COCO result rows `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}` in pixels
    of the original image, or the same as columns. An empty list is a detector that finds nothing: zeros. Neither
    argument is modified, nothing is printed. Images of `annotations` without a row count as empty.

    max_detections: with more than 100, the metrics also say mAP and recall with so many of a class in an image.

    Raises UserError when the annotations are unreadable, a row names an image or category that they do not
    have, or its box or score is not finite.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else GroundTruth.of(load_annotations(annotations))
    table = results if isinstance(results, DetectionTable) else DetectionTable.from_rows(results)
    _check_known(table, truth)
    limits = [DETECTIONS] if max_detections <= DETECTIONS else [DETECTIONS, max_detections]
    found = _backend(backend)(truth, table, limits)
    precision, recall = found.precision[..., 0], found.recall[..., 0]  # [IoU, recall, class, area], [IoU, class, area]
    more = len(limits) > 1
    return CocoMetrics(
        map=percent(precision[:, :, :, 0]),
        map50=percent(precision[0, :, :, 0]),
        map75=percent(precision[5, :, :, 0]),
        map_small=percent(precision[:, :, :, 1]),
        map_medium=percent(precision[:, :, :, 2]),
        map_large=percent(precision[:, :, :, 3]),
        mar100=percent(recall[:, :, 0]),
        mar1=percent(found.recall_of_few[:, :, 0]),
        mar10=percent(found.recall_of_few[:, :, 1]),
        mar_small=percent(recall[:, :, 1]),
        mar_medium=percent(recall[:, :, 2]),
        mar_large=percent(recall[:, :, 3]),
        per_class={name: percent(precision[:, :, k, 0]) for k, name in enumerate(truth.names)},
        max_detections=max_detections if more else None,
        map_at_max=percent(found.precision[:, :, :, 0, 1]) if more else None,
        mar_at_max=percent(found.recall[:, :, 0, 1]) if more else None,
    )


NO_NUMBERS = "holds NaN or Infinity, which are no JSON (compress data check names the boxes that do)"


def read_annotations(path: Path, *, sizes: bool = False, images: Path | None = None) -> dict[str, Any]:
    """Read a COCO detection file and check its shape: three lists of objects with the fields that we use.

    Lists may be empty, and ids may repeat.

    sizes: every image must also say its width and height. images: the folder of the images, from whose headers sizes
        that are missing or null are then read.

    Raises:
        UserError: no such file, not JSON (with the line), or a field missing or of the wrong type (with its list, the
            index in it and the key); an image without size that cannot be read.
    """
    try:
        content = json.loads(fetch(Path(path)).read_text(encoding="utf-8"))
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, so not COCO JSON") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{path}: not COCO JSON: {error}") from None
    _check_shape(content, str(path), sizes and images is None)
    if sizes and images is not None:
        for entry in images_without_size(content, str(path)):
            entry["height"], entry["width"] = image_size(images / entry["file_name"])
    return content


def images_without_size(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The images whose width or height is missing or null. Raises UserError for one that is no positive integer."""
    without = []
    for index, entry in enumerate(content["images"]):
        given = [key for key in _SIZES if entry.get(key) is not None]
        for key in given:
            _check_value(f"{where}: images[{index}]", key, "size", entry[key])
        if len(given) < len(_SIZES):
            without.append(entry)
    return without


def sizes_of(images: Iterable[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """(height, width) of the images that say it, by id."""
    known = (row for row in images if _is_integer(row.get("height")) and _is_integer(row.get("width")))
    return {row["id"]: (row["height"], row["width"]) for row in known}


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
_OPTIONAL = {"id": "identifier", "area": "number", "iscrowd": "flag", "ignore": "flag"}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_integer(value) and abs(value) < LARGEST)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str)),
    "identifier": ("an integer or text", lambda value: value is None or isinstance(value, int | float | str)),
    "integer": ("an integer", _is_integer),
    "size": ("a positive integer", lambda value: _is_integer(value) and 0 < value < 2**31),
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


def _check_known(table: DetectionTable, truth: GroundTruth) -> None:
    table.check_finite()
    for name, ids, known in (
        ("image_id", table.image_ids, truth.image_ids),
        ("category_id", table.category_ids, truth.category_ids),
    ):
        places = np.searchsorted(known, ids).astype(np.int32)
        places[places == len(known)] = 0
        strange = known[places] != ids
        if strange.any():
            number = int(strange.argmax())
            raise UserError(f"detection {number}: {name} {ids[number]} is not in the annotations")


def _backend(name: Backend) -> Callable[[GroundTruth, DetectionTable, Sequence[int]], Curves]:
    if name == "faster":
        return curves
    if name == "pycocotools":
        from deploy.validate.reference import reference_curves

        return reference_curves
    raise UserError(f"unknown COCO evaluator '{name}': choose 'faster' or 'pycocotools'")


def percent(values: np.ndarray) -> float:
    """Mean of the entries that exist (the evaluators mark "no ground truth" with -1), in percent."""
    present = values[values > -1]
    return float(present.mean() * 100.0) if present.size else math.nan


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _or_nan(value: Any) -> Any:
    return math.nan if value is None else value
