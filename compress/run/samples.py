"""Where the teacher is uncertain on validation pictures, for report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.data.batch import Batch, collate
from compress.data.coco import CocoDetection
from compress.detectors.base import Detector, ImageDetections
from compress.distill.uncertainty import RATE, SAMPLES, predictive_uncertainty

UNCERTAIN_PICTURES = 4


def one_of_each(pictures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the pictures of a report the first of each kind, then others, UNCERTAIN_PICTURES in all."""
    kinds = [picture["kind"] for picture in pictures]
    first = [picture for place, picture in enumerate(pictures) if picture["kind"] not in kinds[:place]]
    return [*first, *(picture for picture in pictures if picture not in first)][:UNCERTAIN_PICTURES]


def uncertainty_pictures(
    val: CocoDetection,
    teacher: Detector,
    shown: float,
    pictures: Sequence[Mapping[str, Any]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The teacher's detections and Monte Carlo dropout maps: entries of `uncertainty` in report.json.

    Of the images of these pictures, on the teacher's device, and its detections from the score `shown` on. `progress`
    is called with (images done, images).
    """
    entries: list[dict[str, Any]] = []
    image_ids = val.image_ids
    for picture in pictures:
        index = image_ids.index(picture["id"])
        batch = collate([val[index]]).to(teacher.mean.device)
        target = batch.targets[0]
        found = predictive_uncertainty(teacher, batch.images)
        height, width = (-(-side // found.stride) for side in target.size)  # locations outside of the padding
        scales = (original / side for original, side in zip(target.original_size, target.size, strict=True))
        entries.append(
            {
                "image": picture["image"],
                "samples": SAMPLES,
                "rate": RATE,
                "teacher": _detect(teacher, batch, val, shown),
                "stride": [round(found.stride * scale, 4) for scale in scales][::-1],  # x, y
                "rows": _rows(found.maps[0, :height, :width]),
                "variance": {f"P{level + 3}": float(v) for level, v in enumerate(found.variance[0])},
            }
        )
        if progress is not None:
            progress(len(entries), len(pictures))
    return entries


@torch.no_grad()
def _detect(detector: Detector, batch: Batch, val: CocoDetection, shown: float) -> list[dict[str, Any]]:
    return _boxes(detector.decode(detector(batch.images), batch.sizes)[0], val, shown)


def _boxes(found: ImageDetections, val: CocoDetection, shown: float) -> list[dict[str, Any]]:
    return [
        {"box": [round(x, 1) for x in box], "label": val.categories[label], "score": round(score, 3)}
        for box, label, score in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        if score >= shown
    ]


def _rows(values: Tensor) -> list[str]:
    """[h, w] as one string a row: a list of lists would take a line of the file for every value."""
    return [" ".join(f"{value:.4f}" for value in row) for row in values.tolist()]
