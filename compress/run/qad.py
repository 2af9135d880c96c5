"""Quantization-aware distillation as two stages of a run: calibration and training (`compress.training.qad`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from compress.config.deploy import Deploy, Qad
from compress.config.train import Train
from compress.detectors.base import Detector
from compress.manifest import QAD, STUDENT_ON_INT8_GRIDS, Manifest, RunFolder
from compress.run.data import Datasets
from compress.run.quantize import Quantizing
from compress.run.trainings import Distillation, evaluate_on
from compress.training.distributed import on_first_process
from compress.training.loggers.opened import OpenLoggers
from compress.training.qad.export import calibrated_grids, load_grids
from compress.training.qad.train import QadTraining, qad_schedule, train_quantized
from deploy.core.files import sha256_of, write_json
from deploy.quantize.grids import Grids


@dataclass(frozen=True)
class QadPlan:
    """Plan of the training that adapts a run's student to int8.

    student: checkpoint of the float student. adapters: `last.ckpt` of its training by the methods.
    train: settings of that training. qad: how the one on grids differs.
    quantizing: what calibrates. input_size, resize_short_long: canvas (height, width), and (short, long) that images
        are not enlarged beyond, pixels.
    folder: where the results go. loggers: of other tools, that are told how it goes.
    """

    student: Path
    adapters: Path
    folder: RunFolder
    train: Train
    qad: Qad
    deploy: Deploy
    quantizing: Quantizing
    input_size: tuple[int, int]
    resize_short_long: tuple[int, int]
    distillation: Distillation
    seed: int
    workers: int
    recipe_sha256: str
    loggers: OpenLoggers | None = None

    def training(
        self,
        fabric: Fabric,
        data: Datasets,
        start: Grids | None,
        identity: Mapping[str, Any],
        name: str = STUDENT_ON_INT8_GRIDS,
    ) -> QadTraining:
        """The training on the grids `start`; see `QadTraining`."""
        return QadTraining(
            student=self.student,
            start=start,
            settings=qad_schedule(self.train, self.qad),
            folder=self.folder,
            images=data.train,
            evaluate=lambda detector: evaluate_on(detector, data, fabric, self.workers, self.deploy.max_detections),
            build_methods=lambda student, teacher: self.distillation.build(student, teacher, seed=self.seed),
            open_cache=lambda teacher: self.distillation.open_cache(teacher, self.train.precision),
            adapters=self.adapters,
            name=name,
            seed=self.seed,
            workers=self.workers,
            identity=identity,
            recipe_sha256=self.recipe_sha256,
            loggers=self.loggers,
        )


def distill_quantized(
    fabric: Fabric,
    plan: QadPlan,
    data: Datasets,
    manifest: Manifest,
    *,
    teacher: Detector | None,
    taught: Mapping[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Calibrate and train the run's student, as two stages of its manifest. Returns the figures of the training.

    taught: what it learns from besides labels (JSON-able). Raises UserError.
    """
    start_file = plan.folder.path / f"{STUDENT_ON_INT8_GRIDS}.start.json"
    generated = plan.quantizing.generated
    inputs: dict[str, Any] = {
        "data": data.identity if generated else {"limits": list(plan.resize_short_long)},
        "student": sha256_of(plan.student),
        "int8": plan.deploy.int8.model_dump(mode="json", exclude={"qad", "guided", "deciding_images"}),
        "input_size": list(plan.input_size),
        **on_first_process(fabric, partial(plan.quantizing.identity, searched=False)),
    }

    def calibrate() -> None:
        images = plan.quantizing.images
        grids = calibrated_grids(
            plan.student, plan.deploy, images, input_size=plan.input_size, resize_short_long=plan.resize_short_long
        )
        write_json(start_file, grids.model_dump(mode="json"))

    on_first_process(fabric, lambda: manifest.stage("qad calibration", inputs, [start_file], calibrate))
    start = load_grids(start_file)
    settings = qad_schedule(plan.train, plan.qad)
    inputs |= {
        "data": data.identity,
        "start": start.model_dump(mode="json"),
        "train": settings.model_dump(mode="json", exclude={"devices", "accelerator"}),
        "taught": dict(taught),
        "seed": plan.seed,
        "world_size": fabric.world_size,
    }

    def train() -> dict[str, Any]:
        found = train_quantized(fabric, plan.training(fabric, data, start, inputs), teacher=teacher, resume=resume)
        return {**found, "canvas": list(data.canvas)}

    outputs = [plan.folder.weights(STUDENT_ON_INT8_GRIDS), plan.folder.grids()]
    result: dict[str, Any] = manifest.stage(QAD, inputs, outputs, train, write=fabric.is_global_zero)
    return result
