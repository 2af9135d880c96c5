"""The training loop: one detector, with or without a teacher, on Lightning Fabric.

`fit` trains one arm of a run (teacher, baseline or student) in its own folder: `metrics.csv`, TensorBoard
events, `checkpoints/last.ckpt` (everything that resuming needs) and `checkpoints/best-<step>.ckpt` (weights of
the best evaluation).

Resuming is exact: the order of the images and their augmentation are pure functions of (seed, epoch), and
the checkpoint holds model, moving average, optimizer, scaler, position and random state. On the CPU, k steps, a
kill, and N - k steps give the bits of N steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from compress.config.train import Optimizer, Schedule, Train
from compress.data.batch import Batch
from compress.detectors.base import Detector, Reduce
from compress.distill.method import Outputs
from compress.distill.weighting import Balanced, Position, gradient_norm
from compress.training.log import TrainingLog
from deploy.core.errors import UserError
from deploy.core.files import atomic_path
from deploy.validate.coco import CocoMetrics

LOG_EVERY = 10  # optimizer steps between rows of metrics.csv


class Learner(nn.Module):
    """The student and the methods' adapters; its forward pass is the whole loss.

    The teacher is kept out of the module tree: it has no gradient, goes to no checkpoint and stays in eval mode.
    """

    def __init__(
        self, student: Detector, methods: Mapping[str, Balanced], teacher: Detector | None, reduce: Reduce | None
    ) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict(methods)
        self._teacher = (teacher,)
        self._reduce = reduce
        self.detection_norm: Tensor
        self.register_buffer("detection_norm", torch.zeros(()), persistent=False)

    def forward(self, batch: Batch, position: Position) -> dict[str, Tensor]:
        """Weighted scalar losses of a batch; their sum is what is minimised."""
        (teacher,) = self._teacher
        features = self.student.features(batch.images)
        prediction = self.student.predict(features)
        factors = {name: method.factor(position) for name, method in self._balanced()}
        taught = None
        if teacher is not None and any(factors.values()):
            with torch.no_grad():
                teacher_features = teacher.features(batch.images)
                taught = Outputs(teacher_features, teacher.predict(teacher_features), teacher)
        with torch.autocast(batch.images.device.type, enabled=False):
            prediction = prediction.float()
            targets = self.student.assign(prediction, batch.targets, self._reduce)
            losses = self.student.loss(prediction, targets, self._reduce)
            if taught is not None:
                student = Outputs(features, prediction, self.student, targets)
                terms = {name: m.method(student, taught, batch) for name, m in self._balanced() if factors[name]}
                if position.measures and features[0].requires_grad:
                    self._measure(losses, terms, features)
                for name, balanced in self._balanced():
                    factor = factors[name] * balanced.scale
                    losses.update({key: value * factor for key, value in terms.get(name, {}).items()})
        return losses

    def observations(self) -> dict[str, Tensor]:
        """Scalars for the logs besides the losses: gradient norms, automatic weights, what the methods report."""
        values: dict[str, Tensor] = {}
        for name, balanced in self._balanced():
            values[f"grad_{name}"] = balanced.norm
            if balanced.auto_ratio is not None:
                values[f"scale_{name}"] = balanced.scale
            values |= {f"{key}_{name}": value for key, value in balanced.method.observations().items()}
        if len(self.methods):
            values["grad_detection"] = self.detection_norm
        return values

    def _balanced(self) -> list[tuple[str, Balanced]]:
        return list(self.methods.items())  # type: ignore[arg-type]

    def _measure(self, losses: dict[str, Tensor], terms: dict[str, dict[str, Tensor]], features: list[Tensor]) -> None:
        """Gradient norms of the detection loss and of each method at the student's pyramid."""
        self.detection_norm.copy_(gradient_norm(_total(losses), features, self._reduce))
        for name, balanced in self._balanced():
            if name in terms:
                norm = gradient_norm(_total(terms[name]), features, self._reduce)
                balanced.measure(norm, self.detection_norm)


@dataclass
class FitResult:
    """Outcome of one arm: metrics of the selected weights (None when stopped before any evaluation), and the cost."""

    metrics: CocoMetrics | None
    steps: int
    seconds: float


@dataclass
class _State:
    """Position and history; what `last.ckpt` holds besides the modules."""

    step: int = 0  # finished optimizer steps
    seconds: float = 0.0
    evaluated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # metrics of the weights in best-<best_step>.ckpt
    best_step: int = 0


def fit(
    fabric: Fabric,
    student: Detector,
    settings: Train,
    *,
    loader: DataLoader[Any],
    evaluate: Callable[[Detector], CocoMetrics],
    folder: Path,
    name: str,
    identity: str,
    teacher: Detector | None = None,
    methods: Mapping[str, Balanced] | None = None,
    resume: bool = False,
    max_steps: int | None = None,
) -> FitResult:
    """Train `student` in place and leave it with the selected weights.

    Args:
        loader: training loader of this process (`compress.data.loader.train_loader`); its batch is the share of one
            micro-batch: settings.batch_size / (devices * accumulate).
        evaluate: gives the validation metrics of a detector; called on every process.
        folder: of this arm; created.
        name: shown in the progress display.
        identity: hash of everything that shapes the result; a checkpoint of another identity is not resumed.
        resume: continue from `checkpoints/last.ckpt` if it is there.
        max_steps: stop early after that many steps, leaving a checkpoint (used by --dry-run and the tests).

    Raises:
        UserError: a loss or gradient is not finite (the batches and the weights are saved for replay), the warm-up
            is longer than the run, or the checkpoint is damaged or belongs to another recipe.
    """
    checkpoints = folder / "checkpoints"
    last = checkpoints / "last.ckpt"
    reduce = _sum_over_processes(fabric) if fabric.world_size > 1 else None
    learner = Learner(student, methods or {}, teacher, reduce)
    optimizer = _optimizer(learner, settings.optimizer)
    fabric_learner, fabric_optimizer = fabric.setup(learner, optimizer)
    average = None
    if settings.ema is not None:
        average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)

    epoch_steps = len(loader) // settings.accumulate
    if epoch_steps == 0:
        raise UserError(
            f"{name}: {len(loader)} batches an epoch are fewer than accumulate = {settings.accumulate}; lower "
            "batch_size or accumulate"
        )
    total = settings.steps or (settings.epochs or 0) * epoch_steps
    if settings.schedule.warmup_steps >= total:
        raise UserError(
            f"{name}: schedule.warmup_steps {settings.schedule.warmup_steps} leaves nothing of the run's {total} "
            f"steps; set it to {total // 10}"
        )
    for method_name, balanced in (methods or {}).items():
        if balanced.stop_epoch is not None and balanced.stop_epoch * epoch_steps > total:
            raise UserError(
                f"{name}: methods.{method_name}.stop_epoch {balanced.stop_epoch} lies behind the end of the training "
                f"({total / epoch_steps:.1f} epochs); lower it or leave it out"
            )
    schedule = learning_rate(settings.schedule, total, epoch_steps)
    state = _State()
    modules = {"student": student, "methods": learner.methods}
    if average is not None:
        modules["average"] = average
    if resume and last.is_file():
        state = _restore(last, modules, optimizer, fabric, identity, total) or state
    log = TrainingLog(folder, name=name, total=total, from_step=state.step, enabled=fabric.is_global_zero)
    log.start()

    def save() -> None:
        if fabric.is_global_zero:
            _save(last, modules, optimizer, fabric, identity, total, state)
            for path in checkpoints.glob("best-*.ckpt"):  # only now: until here a kill goes back to the older one
                if path != _best(checkpoints, state):
                    path.unlink()
        fabric.barrier()

    def assess(epoch: int) -> None:
        weights = student if average is None else average.module
        assert isinstance(weights, Detector)
        if fabric.world_size > 1:  # each process has seen its own share: BatchNorm's statistics differ
            for buffer in weights.buffers():
                dist.broadcast(buffer, 0)
        metrics = evaluate(weights)
        log.evaluated(state.step, epoch, metrics)
        state.evaluated_step = state.step
        if settings.select == "last" or not state.best or metrics.map > state.best["map"]:
            state.best, state.best_step = metrics.to_dict(), state.step
            if fabric.is_global_zero:
                with atomic_path(_best(checkpoints, state)) as temporary:
                    torch.save(weights.state_dict(), temporary)

    learner.train()
    started = time.perf_counter() - state.seconds
    stop = total if max_steps is None else min(total, max_steps)
    loader.batch_sampler.set_position(0, state.step * settings.accumulate)  # type: ignore[union-attr]
    batches = iter(loader)  # endless: runs on from epoch to epoch
    while state.step < stop:
        epoch = state.step // epoch_steps
        for group in optimizer.param_groups:
            group["lr"] = settings.optimizer.lr * schedule(state.step)
        means: dict[str, Tensor] = {}
        seen: list[Batch] = []
        for part in range(settings.accumulate):
            batch = next(batches).to(fabric.device, non_blocking=True)
            seen.append(batch)
            with fabric.no_backward_sync(fabric_learner, enabled=part < settings.accumulate - 1):
                losses = fabric_learner(batch, Position(state.step, total, epoch_steps))
                loss = _total(losses) / settings.accumulate
                if not _is_finite(loss.detach(), reduce):
                    _stop("loss", losses, seen, learner, fabric, folder, name, state.step)
                fabric.backward(loss)
            for key, value in losses.items():
                means[key] = means.get(key, 0) + value.detach() / settings.accumulate
        norm = fabric.clip_gradients(
            fabric_learner, fabric_optimizer, max_norm=settings.clip_norm or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        # Before the step, while the weights are still good. fp16's scaler expects overflows and skips such steps.
        if settings.precision != "fp16" and not _is_finite(norm, None):
            _stop("gradient", losses, seen, learner, fabric, folder, name, state.step)
        fabric_optimizer.step()
        fabric_optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(student)

        state.step += 1
        state.seconds = time.perf_counter() - started
        if state.step % LOG_EVERY == 0 or state.step in (1, stop):
            values = _mean_over_processes(means, reduce, fabric.world_size)
            observed = {"grad_norm": norm, **learner.observations()}
            log.step(
                state.step, epoch, state.seconds, optimizer.param_groups[0]["lr"], values,
                {key: float(value) for key, value in observed.items()},
            )  # fmt: skip
        else:
            log.tick(state.step)
        epoch_ended = state.step % epoch_steps == 0
        if epoch_ended and settings.eval_every and (epoch + 1) % settings.eval_every == 0:
            assess(epoch)
        every = settings.checkpoint_every or epoch_steps
        if state.step % every == 0 and state.step < stop:
            save()
    if state.step == total and state.evaluated_step != total:
        assess((total - 1) // epoch_steps)
    save()
    log.stop()
    if not state.best:
        return FitResult(None, state.step, state.seconds)
    best = _best(checkpoints, state)
    if not best.is_file():
        raise UserError(f"{best}: the best weights are gone; remove {folder} to train again")
    student.load_state_dict(torch.load(best, map_location=fabric.device, weights_only=True))
    return FitResult(_metrics(state.best), state.step, state.seconds)


def learning_rate(schedule: Schedule, total: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step (0-based): linear warm-up, times steps or a half cosine.

    Warm-up is mmdet's LinearLR: warmup_factor at step 0, 1 at step `warmup_steps`.
    """
    milestones = [epoch * steps_per_epoch for epoch in schedule.milestones]

    def factor(step: int) -> float:
        if schedule.name == "multistep":
            value = schedule.gamma ** sum(step >= milestone for milestone in milestones)
        else:
            progress = max(0, step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
            value = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if step < schedule.warmup_steps:
            start = schedule.warmup_factor
            value *= start + (1 - start) * step / schedule.warmup_steps
        return value

    return factor


def _optimizer(learner: Learner, settings: Optimizer) -> torch.optim.Optimizer:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay
    )


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _sum_over_processes(fabric: Fabric) -> Reduce:
    def reduce(value: Tensor) -> Tensor:
        total = fabric.all_reduce(value, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    return reduce


def _mean_over_processes(losses: dict[str, Tensor], reduce: Reduce | None, world_size: int) -> dict[str, float]:
    values = torch.stack(list(losses.values()))
    if reduce is not None:
        values = reduce(values) / world_size
    return dict(zip(losses, values.tolist(), strict=True))


def _is_finite(value: Tensor, reduce: Reduce | None) -> bool:
    """Of all processes together: a NaN survives the sum, so that they stop together."""
    return bool(torch.isfinite(value if reduce is None else reduce(value.clone())))


def _stop(
    what: str,
    losses: dict[str, Tensor],
    batches: list[Batch],
    learner: Learner,
    fabric: Fabric,
    folder: Path,
    name: str,
    step: int,
) -> NoReturn:
    """Save what is needed to see it again (the weights before the step, the step's batches) and raise.

    BatchNorm's running statistics have seen the step's forward pass; training mode does not read them.
    """
    path = folder / ("nonfinite.pt" if fabric.world_size == 1 else f"nonfinite-rank{fabric.global_rank}.pt")
    with atomic_path(path) as temporary:
        torch.save({"step": step, "batches": batches, "learner": learner.state_dict()}, temporary)
    terms = ", ".join(f"{key} {value.item():g}" for key, value in losses.items())
    raise UserError(
        f"{name}: the {what} is not finite at step {step} ({terms}); batches and weights are saved in {path} for "
        "replay; a lower optimizer.lr, a longer schedule.warmup_steps or clip_norm usually helps"
    )


def _best(checkpoints: Path, state: _State) -> Path:
    return checkpoints / f"best-{state.best_step}.ckpt"


def _save(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    fabric: Fabric,
    identity: str,
    total: int,
    state: _State,
) -> None:
    content = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": optimizer.state_dict(),
        "precision": fabric._precision.state_dict(),  # the gradient scaler of fp16
        "random": torch.get_rng_state(),
        "identity": identity,
        "finished": state.step >= total,
        "state": vars(state),
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def _restore(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    fabric: Fabric,
    identity: str,
    total: int,
) -> _State | None:
    """Load everything, or None when the file is of an earlier, finished run with other settings."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs, finished, state = content["identity"], content["finished"], _State(**content["state"])
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        raise UserError(f"{path}: damaged ({type(error).__name__}); remove it to start again") from error
    if theirs != identity:
        if finished:
            return None
        raise UserError(
            f"{path}: belongs to an unfinished run with other settings or data; remove its folder or give the recipe "
            "another name"
        )
    for name, module in modules.items():
        module.load_state_dict(content["modules"][name])
    optimizer.load_state_dict(content["optimizer"])
    fabric._precision.load_state_dict(content["precision"])
    torch.set_rng_state(content["random"])
    return state


def _metrics(values: dict[str, Any]) -> CocoMetrics:
    numbers = {key: math.nan if value is None else value for key, value in values.items() if key != "per_class"}
    per_class = {key: math.nan if value is None else value for key, value in values["per_class"].items()}
    return CocoMetrics(**numbers, per_class=per_class)
