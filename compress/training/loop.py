"""The training loop: one detector, with or without a teacher, on Lightning Fabric.

`fit` does one training of a run (teacher, baseline or student) in its own folder: `metrics.csv`, TensorBoard events,
and the checkpoints of `compress.training.checkpoint`.

Resuming is exact: the order of the images and their augmentation are pure functions of (seed, epoch), and the
checkpoint holds everything else. On the CPU, k steps, a kill, and N - k steps give the bits of N steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from compress.config.train import Train
from compress.data.batch import Batch
from compress.detectors.base import Detector
from compress.distill.teacher_cache import TeacherCache
from compress.distill.weighting import TrainingPosition, WeightedMethod
from compress.manifest import TrainingFolder
from compress.training.checkpoint import Checkpoints, State
from compress.training.distributed import mean_over_processes, share_buffers
from compress.training.learner import Learner
from compress.training.log import TrainingLog
from compress.training.loggers.opened import OpenLoggers
from compress.training.optimizer import learning_rate
from compress.training.pace import Pace
from compress.training.step import NotFiniteError, Stepper
from compress.training.time_left import NOTHING_LATER, Later, TimeLeft
from deploy.core import interrupts
from deploy.core.errors import UserError
from deploy.core.files import atomic_path
from deploy.validate.coco import CocoMetrics

LOG_EVERY = 10  # optimizer steps between rows of metrics.csv


@dataclass(frozen=True)
class Training:
    """Inputs of one training that stay the same from step to step.

    Attributes:
        name: shown in the progress display and in errors.
        folder: of its files; created.
        settings: the section `train` of a recipe.
        loader: of this process (`compress.data.loader.train_loader`); its batch is the share of one micro-batch:
            settings.batch_size / (devices * accumulate).
        evaluate: gives the validation metrics of a detector; called on every process.
        identity: hash of everything that shapes the result; a checkpoint of another identity is not resumed.
        teacher, methods: what the student learns from besides the labels. cache: of the teacher, if it has one.
        loggers: of other tools, that are told how it goes. later: what the run does after it.
    """

    name: str
    folder: TrainingFolder
    settings: Train
    loader: DataLoader[Any]
    evaluate: Callable[[Detector], CocoMetrics]
    identity: str
    teacher: Detector | None = None
    methods: Mapping[str, WeightedMethod] = field(default_factory=dict)
    cache: TeacherCache | None = None
    loggers: OpenLoggers | None = None
    later: Later = NOTHING_LATER

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_of(self.settings, len(self.loader))[0]

    @property
    def total(self) -> int:
        """Optimizer steps of the whole training."""
        return steps_of(self.settings, len(self.loader))[1]

    @property
    def stops(self) -> dict[str, int | None]:
        """stop_epoch by method."""
        return {name: weighted.stop_epoch for name, weighted in self.methods.items()}

    def start_log(self, from_step: int, *, enabled: bool) -> TrainingLog:
        """The log, from a step on."""
        left = TimeLeft(self.total - from_step, self.settings.batch_size, self.later)
        log = TrainingLog(self.folder, self.name, self.total, from_step, left, self.loggers, enabled=enabled)
        log.start()
        return log

    def evaluates_at(self, step: int) -> bool:
        """Whether the weights are evaluated after so many steps: at the end, and every `eval_every` epochs."""
        every = self.epoch_steps * (self.settings.eval_every or 0)
        return step == self.total or (every > 0 and step % every == 0)


@dataclass
class FitResult:
    """Metrics of the selected weights (None when stopped before any evaluation), and what they cost."""

    metrics: CocoMetrics | None
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as a manifest records them."""
        metrics = self.metrics.to_dict() if self.metrics is not None else {}
        return {"metrics": metrics, "steps": self.steps, "seconds": round(self.seconds, 1)}


def fit(
    fabric: Fabric, student: Detector, training: Training, *, resume: bool = False, max_steps: int | None = None
) -> FitResult:
    """Train `student` in place and leave it with the selected weights.

    Args:
        resume: continue from `checkpoints/last.ckpt` if it is there.
        max_steps: stop early after that many steps, leaving a checkpoint (used by --dry-run and the tests).

    Raises UserError: a loss or gradient is not finite (batches and weights are saved for replay), the warm-up is longer
    than the run, or the checkpoint is damaged or belongs to another recipe.
    """
    check_length(training.name, training.settings, len(training.loader), training.stops)
    settings, total, epoch_steps = training.settings, training.total, training.epoch_steps
    stepper = Stepper(
        fabric, student, settings, teacher=training.teacher, methods=training.methods, cache=training.cache
    )
    learner, average, optimizer = stepper.learner, stepper.average, stepper.optimizer
    rate = learning_rate(settings.schedule, total, epoch_steps)
    weights = student if average is None else average.module  # what is evaluated and kept
    assert isinstance(weights, Detector)
    modules = {"student": student, "methods": learner.methods} | ({} if average is None else {"average": average})
    checkpoints = Checkpoints(training.folder, fabric, modules, optimizer, identity=training.identity, total=total)
    state = checkpoints.restore() if resume else State()
    log, pace = training.start_log(state.step, enabled=fabric.is_global_zero), Pace(fabric)

    started = time.perf_counter() - state.seconds
    stop = total if max_steps is None else min(total, max_steps)
    images = batches_from(training.loader, state.step * settings.accumulate)
    while state.step < stop:
        epoch = state.step // epoch_steps
        position = TrainingPosition(state.step, total, epoch_steps)
        try:
            taken = stepper.take(images, position, settings.optimizer.lr * rate(state.step))
        except NotFiniteError as error:
            _stop(error, learner, fabric, training, state.step)

        log.note(pace.step(taken.waiting, taken.forward))
        state.step += 1
        state.seconds = time.perf_counter() - started
        if state.step % LOG_EVERY == 0 or state.step in (1, stop):
            observed = {key: float(value) for key, value in {"grad_norm": taken.norm, **learner.observations()}.items()}
            values = mean_over_processes(taken.losses, stepper.reduce, fabric.world_size)
            log.step(state.step, epoch, state.seconds, optimizer.param_groups[0]["lr"], values, observed)
        else:
            log.tick(state.step)
        if training.evaluates_at(state.step):
            share_buffers(weights, fabric)
            metrics = training.evaluate(weights)
            log.evaluated(state.step, epoch, metrics)
            checkpoints.evaluated(state, metrics, weights, keep_best=settings.select == "best")
        if state.step % (settings.checkpoint_every or epoch_steps) == 0 and state.step < stop:
            log.write()  # no row before a checkpoint is made again
            checkpoints.save(state)
    checkpoints.save(state)
    log.stop(None if training.cache is None else training.cache.summary(stepper.reduce))
    if state.best:
        student.load_state_dict(checkpoints.load_best(state))
    return FitResult(CocoMetrics.from_dict(state.best) if state.best else None, state.step, state.seconds)


def batches_from(loader: DataLoader[Any], position: int) -> Iterator[Batch]:
    """The batches of a training loader from a position on, endlessly from epoch to epoch."""
    loader.batch_sampler.set_position(0, position)  # type: ignore[union-attr]
    for batch in loader:
        interrupts.check()
        yield batch


def steps_of(settings: Train, batches: int) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the whole training. batches: an epoch, parts of a step counted each."""
    epoch_steps = batches // settings.accumulate
    return epoch_steps, settings.steps or (settings.epochs or 0) * epoch_steps


def check_length(name: str, settings: Train, batches: int, stops: Mapping[str, int | None]) -> None:
    """Refuse a training that cannot work: an epoch without a step, a warm-up without an end, a method that outlives it.

    Args:
        batches: an epoch, parts of a step counted each.
        stops: stop_epoch by method.
    """
    epoch_steps, total = steps_of(settings, batches)
    if epoch_steps == 0:
        raise UserError(
            f"{name}: {batches} batches an epoch are fewer than accumulate = {settings.accumulate}; lower batch_size "
            "or accumulate"
        )
    if settings.schedule.warmup_steps >= total:
        raise UserError(
            f"{name}: schedule.warmup_steps {settings.schedule.warmup_steps} leaves nothing of the run's {total} "
            f"steps; set it to {total // 10}"
        )
    for method, stop in stops.items():
        if stop is not None and stop * epoch_steps > total:
            raise UserError(
                f"{name}: methods.{method}.stop_epoch {stop} is after the end of the training "
                f"({total / epoch_steps:.1f} epochs); lower it or leave it out"
            )


def without_effect(name: str, settings: Train, batches: int) -> list[str]:
    """Lines about settings that a training is too short for, though it works without them."""
    epoch_steps, total = steps_of(settings, batches)
    end, schedule, lines = f"after the end ({total / epoch_steps:.1f} epochs)", settings.schedule, []
    late = [epoch for epoch in schedule.milestones if epoch * epoch_steps >= total]
    if schedule.name == "multistep" and late:
        falls = "does not fall" if len(late) == len(schedule.milestones) else "falls less often"
        lines.append(f"{name}: schedule.milestones {', '.join(map(str, late))}: {end}; the learning rate {falls}")
    if settings.eval_every is not None and settings.eval_every * epoch_steps > total:
        lines.append(f"{name}: eval_every {settings.eval_every}: {end}; it is evaluated there alone")
    if settings.checkpoint_every is not None and settings.checkpoint_every >= total:
        lines.append(
            f"{name}: checkpoint_every {settings.checkpoint_every}: {end}; an interrupted training starts again"
        )
    return lines


# --- details --------------------------------------------------------------------------------------------


def _stop(error: NotFiniteError, learner: Learner, fabric: Fabric, training: Training, step: int) -> NoReturn:
    """Save what is needed to see it again (the weights before the step, the step's batches) and raise.

    BatchNorm's running statistics have seen the step's forward pass; training mode does not read them.
    """
    path = training.folder.path / (
        "nonfinite.pt" if fabric.world_size == 1 else f"nonfinite-rank{fabric.global_rank}.pt"
    )
    with atomic_path(path) as temporary:
        torch.save({"step": step, "batches": error.batches, "learner": learner.state_dict()}, temporary)
    terms = ", ".join(f"{key} {value.item():g}" for key, value in error.losses.items())
    raise UserError(
        f"{training.name}: {error} at step {step} ({terms}); batches and weights are saved in {path} "
        "for replay; a lower optimizer.lr, a longer schedule.warmup_steps or clip_norm usually helps"
    ) from None
