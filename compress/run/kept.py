"""What the models of a run find on the validation images, kept in its folder, a stage a model.

As training's evaluation sees it: the same images on the same canvas, so that the mAP of it is the one that training
measured. Files are kept where they are validated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.console import progress
from compress.data.coco import CocoDetection
from compress.data.loader import eval_loader
from compress.detectors.checkpoints import checkpoint_file, load_detector, load_teacher_checkpoint
from compress.manifest import BASELINE, FINE_TUNED, STUDENT, TEACHER, Manifest, RunFolder
from compress.training.evaluate import detect
from deploy.core.detection_table import DetectionTable
from deploy.core.files import sha256_of
from deploy.validate.coco import DETECTIONS, load_annotations
from deploy.validate.kept import detections_file, keep_detections, keep_labels

BATCH = 8


@dataclass(frozen=True)
class KeptPlan:
    """Plan of what is kept. teacher: its checkpoint; None: there is none, or it is of another library. canvas: (height,
    width) in pixels that images are laid on. identity: everything that detections on these images depend on."""

    folder: RunFolder
    val: CocoDetection
    images: Path
    canvas: tuple[int, int]
    teacher: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    max_detections: int = DETECTIONS
    device: str = "cpu"


def keep_evaluation(plan: KeptPlan, manifest: Manifest) -> None:
    """Write the labels, and the detections of teacher, baselines and student, as far as they are not there yet."""
    folder, settings = plan.folder.evaluation, {}
    if plan.max_detections > DETECTIONS:
        settings = {"max_detections": plan.max_detections}

    keep_labels(folder, load_annotations(plan.val.annotations), plan.images)  # no stage: images may lie elsewhere today
    files = {role: plan.folder.weights(role) for role in (BASELINE, FINE_TUNED, STUDENT) if _is_of_run(plan, role)}
    if plan.teacher is not None:
        files = {TEACHER: checkpoint_file(plan.teacher), **files}
    for role, file in files.items():

        def work(role: str = role, file: Path = file) -> None:
            keep_detections(folder, role, _detections(plan, role, file, settings))

        shaped = {"weights": sha256_of(file), "data": plan.identity, "canvas": list(plan.canvas), **settings}
        manifest.stage(f"keep {role}", shaped, [detections_file(folder, role)], work)


# --- details --------------------------------------------------------------------------------------------


def _is_of_run(plan: KeptPlan, role: str) -> bool:
    return plan.folder.weights(role).is_file() and role in plan.folder.stages()


def _detections(plan: KeptPlan, role: str, file: Path, settings: dict[str, Any]) -> DetectionTable:
    load = load_teacher_checkpoint if role == TEACHER else lambda name: load_detector(Path(name))
    detector = load(str(file) if role != TEACHER else str(plan.teacher))[0].eval().to(plan.device)
    loader = eval_loader(plan.val, batch_size=BATCH, workers=0, canvas=plan.canvas)
    tables, done = [], 0
    with progress(f"detections of the {role}", at_least=1000) as step:
        for batch in loader:
            tables += detect(detector, [batch], plan.val.category_ids, torch.device(plan.device), **settings)
            done += len(batch.targets)
            step(done, len(plan.val))
    return DetectionTable.join(tables)
