"""Validation pictures for report.json: what each detector finds on them, and where the teacher is uncertain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.data.batch import Batch, collate
from compress.data.coco import CocoDetection
from compress.detectors.base import Detector, ImageDetections
from compress.distill.uncertainty import RATE, SAMPLES, predictive_uncertainty

PICTURES = 6
UNCERTAIN_PICTURES = 4


def detection_pictures(
    val: CocoDetection, detectors: Mapping[str, Detector], shown: Mapping[str, float], canvas: tuple[int, int]
) -> list[dict[str, Any]]:
    """Ground truth and detections of a few images, on this canvas: entries of `pictures` in report.json. shown: the
    score from which those of each detector are kept."""
    pictures = []
    for index in _spread(val, PICTURES):
        batch = collate([val[index]], canvas)
        target = batch.targets[0]
        scale = target.original_size[1] / target.size[1]
        truth = [
            {"box": [round(x * scale, 1) for x in box], "label": val.categories[label]}
            for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True)
        ]
        found = {name: _detect(detector, batch, val, shown[name]) for name, detector in detectors.items()}
        pictures.append({"image": str(val.path(index)), "ground_truth": truth, **found})
    return pictures


def uncertainty_pictures(
    val: CocoDetection, teacher: Detector, shown: float, *, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """The teacher's detections and Monte Carlo dropout maps: entries of `uncertainty` in report.json.

    The same images as the first of `detection_pictures`, on the teacher's device, and its detections from the score
    `shown` on. `progress` is called with (images done, images).
    """
    entries: list[dict[str, Any]] = []
    chosen = _spread(val, PICTURES)[:UNCERTAIN_PICTURES]
    for index in chosen:
        batch = collate([val[index]]).to(teacher.mean.device)
        target = batch.targets[0]
        found = predictive_uncertainty(teacher, batch.images)
        height, width = (-(-side // found.stride) for side in target.size)  # locations outside of the padding
        scales = (original / side for original, side in zip(target.original_size, target.size, strict=True))
        entries.append(
            {
                "image": str(val.path(index)),
                "samples": SAMPLES,
                "rate": RATE,
                "teacher": _detect(teacher, batch, val, shown),
                "stride": [round(found.stride * scale, 4) for scale in scales][::-1],  # x, y
                "rows": _rows(found.maps[0, :height, :width]),
                "variance": {f"P{level + 3}": float(v) for level, v in enumerate(found.variance[0])},
            }
        )
        if progress is not None:
            progress(len(entries), len(chosen))
    return entries


def _spread(val: CocoDetection, most: int) -> list[int]:
    """Indices of images with several objects, spread over the set; of any images where no image has several."""
    busy = [index for index in range(len(val)) if len(val[index][1].labels) >= 2] or list(range(len(val)))
    return busy[:: max(1, len(busy) // most)][:most]


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
