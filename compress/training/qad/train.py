"""Training on the grids of an int8 file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from compress.config.deploy import Qad
from compress.config.train import Optimizer, Schedule, Train
from compress.data.concat import TrainingImages
from compress.data.loader import train_loader
from compress.data.views import Views
from compress.detectors.base import Detector
from compress.detectors.checkpoints import save_detector
from compress.distill.teacher_cache import TeacherCache
from compress.distill.weighting import WeightedMethod
from compress.manifest import STUDENT_ON_INT8_GRIDS, RunFolder, fingerprint
from compress.training.distributed import on_first_process
from compress.training.loggers.opened import OpenLoggers
from compress.training.loop import Training, fit
from compress.training.place import place_for, publish, telling_what_stays
from compress.training.qad.fake_quant import FakeQuantized, fold_batch_norms, load_quantizable
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, write_json
from deploy.quantize.grids import Grids
from deploy.validate.coco import CocoMetrics


@dataclass(frozen=True)
class QadTraining:
    """One training on grids.

    student: checkpoint that it starts from. start: the grids at first; None: it trains in float by the same schedule,
        to tell what rounding adds.
    settings: see `qad_schedule`.
    folder: where `<name>.safetensors` and `<name>.json` go.
    images, evaluate: what it trains on, and what gives the validation metrics of a detector.
    build_methods: gives the methods for (student, teacher). open_cache: gives the cache of a teacher, or None.
    adapters: `last.ckpt` of a training by the same methods, whose own weights they go on with; where that file is not
        there, or None, they start anew.
    identity: everything that shapes the result (JSON-able), `start` included.
    recipe_sha256: for the checkpoint's record. loggers: of other tools, that are told how it goes.
    """

    student: Path
    start: Grids | None
    settings: Train
    folder: RunFolder
    images: TrainingImages
    evaluate: Callable[[Detector], CocoMetrics]
    build_methods: Callable[[Detector, Detector | None], Mapping[str, WeightedMethod]]
    open_cache: Callable[[Detector], TeacherCache | None] = lambda teacher: None
    adapters: Path | None = None
    name: str = STUDENT_ON_INT8_GRIDS
    seed: int = 0
    workers: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)
    recipe_sha256: str = ""
    loggers: OpenLoggers | None = None


def train_quantized(
    fabric: Fabric,
    plan: QadTraining,
    *,
    teacher: Detector | None,
    resume: bool = False,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train the student on its grids and save checkpoint and grids. Returns its figures (JSON-able); the metrics are
    those of the rounded network.

    teacher: as in the student's training; None: there is none, and no method needs one.

    Raises:
        UserError: as `compress.training.loop.fit` does, and when the grids are not the student's.
    """
    output, identity = plan.folder.weights(plan.name), fingerprint(plan.identity)
    place = on_first_process(fabric, lambda: place_for(plan.folder, plan.name, identity, resume=resume))
    seed = plan.seed + 1  # not the images in the order that the student knows
    fabric.seed_everything(seed, verbose=False)
    detector, record = load_quantizable(plan.student)
    detector.to(memory_format=torch.channels_last)
    fold_batch_norms(detector)
    network = detector if plan.start is None else FakeQuantized(detector, plan.start)
    methods = plan.build_methods(network, teacher)
    if methods and plan.adapters is not None:
        _restore_adapters(nn.ModuleDict(methods), plan.adapters)
    cache = None if teacher is None or not methods else plan.open_cache(teacher)
    loader = train_loader(
        plan.images,
        batch_size=plan.settings.batch_size // plan.settings.accumulate,
        seed=seed,
        workers=plan.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        views=None if plan.settings.views is None else Views(plan.settings.views, plan.seed),  # those it knows
        keys=cache is not None,
    )
    training = Training(
        name=plan.name,
        folder=place,
        settings=plan.settings,
        loader=loader,
        evaluate=plan.evaluate,
        identity=identity,
        teacher=teacher,
        methods=methods,
        cache=cache,
        loggers=plan.loggers,
    )
    with telling_what_stays(plan.folder, plan.name, place):
        result = fit(fabric, network, training, resume=resume, max_steps=max_steps)

    def save() -> None:
        if result.metrics is None:
            return
        found = result.metrics
        figures = {"val_map": found.map, "operating_point": found.operating_point, "recipe_sha256": plan.recipe_sha256}
        with ExitStack() as stack:  # both are written before one of them gets its name
            if isinstance(network, FakeQuantized):
                grids = stack.enter_context(atomic_path(plan.folder.grids(plan.name)))
                write_json(grids, network.grids().model_dump(mode="json"))
            weights = stack.enter_context(atomic_path(output))
            save_detector(weights, detector.to("cpu"), metadata=record.model_copy(update=figures))
        publish(plan.folder, plan.name, place)

    on_first_process(fabric, save)
    return result.to_dict()


def qad_schedule(train: Train, qad: Qad) -> Train:
    """The student's training with QAD's length, optimizer and rate."""
    return train.model_copy(
        update={
            "epochs": None,
            "steps": qad.steps,
            "optimizer": Optimizer(name="adamw", lr=qad.lr, weight_decay=0.0),
            "schedule": Schedule(name="cosine", warmup_steps=qad.steps // 10, warmup_factor=0.01),
            "ema": None,
            "eval_every": None,
            "select": "last",
        }
    )


# --- details --------------------------------------------------------------------------------------------


def _restore_adapters(methods: nn.ModuleDict, path: Path) -> None:
    """The methods' own weights as the student's training left them; without that file they start anew."""
    if not path.is_file():
        return
    try:
        methods.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["modules"]["methods"])
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the adapters of the student's methods cannot be read: {reason}") from error
