"""The gate between training and deployment: what ships must be the student that training measured.

`deploy.validate` compares files with each other and with the mAP that training measured. Here a few pictures go through
both paths step by step (`compress.run.steps`), because a small model may lose little mAP by another resize filter; and
where the gate fails, the first step that differs and the pictures that differ most get a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.config.deploy import Deploy
from compress.data.coco import CocoDetection
from compress.data.loader import eval_loader
from compress.detectors.base import Detector
from compress.export.deployable import TorchRunner
from compress.run.steps import Difference, first_difference, varied_pictures
from compress.training.evaluate import evaluate
from deploy.core.card import CANDIDATES, MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD
from deploy.core.detections import Detections
from deploy.validate.detect import detect_all
from deploy.validate.differences import most_different

BATCH = 8
STANDARD = {
    "score_threshold": SCORE_THRESHOLD,
    "nms_threshold": NMS_THRESHOLD,
    "max_detections": MAX_DETECTIONS,
    "candidates": CANDIDATES,
}
"""Thresholds of training's evaluation, COCO's usual ones; a recipe's `deploy` may have others."""


@dataclass(frozen=True)
class TrainedStudent:
    """A student as training knows it.

    detector: with its weights, in eval mode, where the runner is.
    val: validation images as training's evaluation reads them; canvas: (height, width) that it lays them on today.
    map: that training measured; None: not known. measured_on: the canvas then; None: batches were padded as needed.
    """

    detector: Detector
    val: CocoDetection
    canvas: tuple[int, int]
    map: float | None
    measured_on: tuple[int, int] | None


@dataclass(frozen=True)
class Verdict:
    """Outcome for the student on the deployment path. reason: None where it passes. step: the difference that was
    found, which the exported files share. pictures: as `most_different` gives them."""

    reason: str | None = None
    step: Difference | None = None
    pictures: list[dict[str, Any]] = field(default_factory=list)


def step_by_step(student: TrainedStudent, runner: TorchRunner) -> Difference | None:
    """Take up to 16 pictures, those of `varied_pictures`, along both paths."""
    return first_difference(student.detector, student.val, student.canvas, runner, varied_pictures(student.val))


def judge(
    student: TrainedStudent, runner: TorchRunner, settings: Deploy, step: Difference | None, *, lost: bool
) -> Verdict:
    """Judge a student on the deployment path against the same student in training.

    step: what `step_by_step` found. lost: its mAP is further below that of training than allowed.
    """
    if step is None and not lost:
        return Verdict()
    reason = f"first step that differs: {step or _declared(student, settings)}"
    files = {number: student.val.path(index) for index, number in enumerate(student.val.image_ids)}
    deployed = detect_all({"file": runner}, files, BATCH)["file"].detections
    return Verdict(reason, step, most_different(_detections(student), deployed, files))


# --- details --------------------------------------------------------------------------------------------


def _declared(student: TrainedStudent, settings: Deploy) -> str:
    """Say what the mAP was lost by where every step does the same today."""
    canvas, then = student.canvas, student.measured_on
    if then != canvas:
        on = "as large as each batch needed" if then is None else f"of {then[0]}x{then[1]}"
        return (
            f"canvas: training measured on one {on}, the files have one of {canvas[0]}x{canvas[1]} (height x width); "
            "set deploy.input_size to that of training, or train again"
        )
    device = student.detector.mean.device
    again = evaluate(student.detector, _loader(student), student.val, device).map
    if student.map is not None and abs(again - student.map) > 0.01:
        return (
            f"network: the checkpoint reaches {again:.2f} mAP in training's own evaluation today; "
            "it, or the validation images, are not those that training measured"
        )
    changed = [f"deploy.{key} {value:g}" for key, value in _thresholds(settings).items() if value != STANDARD[key]]
    words = f"training measures with {', '.join(f'{key} {value:g}' for key, value in STANDARD.items())}"
    return f"suppression: {', '.join(changed) or 'boxes are cut at the canvas, not at the picture'}; {words}"


def _thresholds(settings: Deploy) -> dict[str, float]:
    return {key: getattr(settings, key) for key in STANDARD}


def _loader(student: TrainedStudent) -> Any:
    return eval_loader(student.val, batch_size=BATCH, workers=0, canvas=student.canvas)


@torch.no_grad()
def _detections(student: TrainedStudent) -> Mapping[int, Detections]:
    """Detections of training's evaluation, by image id."""
    found = {}
    for batch in _loader(student):
        prediction = student.detector(batch.images.to(student.detector.mean.device))
        for target, decoded in zip(batch.targets, student.detector.decode(prediction, batch.sizes), strict=True):
            boxes, scores, labels = (x.cpu().numpy() for x in (decoded.boxes, decoded.scores, decoded.labels))
            names, ids = student.val.categories, student.val.category_ids
            found[target.image_id] = Detections(boxes, scores, labels, names, ids)
    return found
