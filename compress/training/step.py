"""One optimizer step: the student, what it learns from and its optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from compress.config.train import Train
from compress.data.batch import Batch
from compress.detectors.base import Detector, Reduce
from compress.distill.teacher_cache import TeacherCache
from compress.distill.weighting import TrainingPosition, WeightedMethod
from compress.training.distributed import sum_over_processes
from compress.training.learner import Learner, total_loss
from compress.training.optimizer import build_optimizer, moving_average


class Taken(NamedTuple):
    """What a step gave.

    losses: weighted scalars, means over the step's batches. norm: of the gradient, unclipped. waiting, forward: seconds
    that this process waited for images, and computed until it needed the others; of one process alone forward is zero.
    """

    losses: dict[str, Tensor]
    norm: Tensor
    waiting: float
    forward: float


class NotFiniteError(Exception):
    """A loss or gradient is not finite. The weights are those before the step; batches: of the step so far."""

    def __init__(self, what: str, losses: Mapping[str, Tensor], batches: list[Batch]) -> None:
        super().__init__(f"the {what} is not finite")
        self.losses, self.batches = losses, batches


class Stepper:
    """Trains `student` in place, a step at a time.

    Attributes:
        learner: the student and the adapters of its methods, as they are saved; in training mode.
        optimizer: of the learner. average: the moving average of the student's weights, if the settings want one.
        reduce: sums a tensor over the processes; None: there is one.
    """

    def __init__(
        self,
        fabric: Fabric,
        student: Detector,
        settings: Train,
        *,
        teacher: Detector | None,
        methods: Mapping[str, WeightedMethod],
        cache: TeacherCache | None = None,
    ) -> None:
        self._fabric, self._student, self._settings = fabric, student, settings
        reduce = sum_over_processes(fabric)
        self._clock = None if reduce is None else _ClockedReduce(reduce)
        self.reduce: Reduce | None = self._clock
        self.learner = Learner(student, methods, teacher, self.reduce, cache)
        if self._clock is not None:
            self.learner.register_forward_pre_hook(self._clock.start)  # after all have the buffers of the first one
        self.optimizer = build_optimizer(self.learner, settings.optimizer, fused=fabric.device.type == "cpu")
        self._ready, self._ready_optimizer = fabric.setup(self.learner, self.optimizer)
        self.average = moving_average(student, settings.ema)
        self.learner.train()

    def take(self, images: Iterator[Batch], position: TrainingPosition, rate: float) -> Taken:
        """Take a step on the next `accumulate` batches of `images`.

        rate: of the optimizer, multiplied by the factor of each group of weights.

        Raises NotFiniteError before the weights change.
        """
        settings, fabric = self._settings, self._fabric
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        means: dict[str, Tensor] = {}
        batches: list[Batch] = []
        waiting = forward = 0.0
        for part in range(settings.accumulate):
            began = time.perf_counter()
            batches.append(next(images).to(fabric.device, non_blocking=True))
            waiting += time.perf_counter() - began
            with fabric.no_backward_sync(self._ready, enabled=part < settings.accumulate - 1):
                losses = self._ready(batches[-1], position)
                loss = total_loss(losses) / settings.accumulate
                if not _is_finite(loss.detach(), self.reduce):
                    raise NotFiniteError("loss", losses, batches)
                forward += 0.0 if self._clock is None else self._clock.seconds
                fabric.backward(loss)
            for key, value in losses.items():
                means[key] = means.get(key, 0) + value.detach() / settings.accumulate
        norm = fabric.clip_gradients(
            self._ready, self._ready_optimizer, max_norm=settings.clip_norm or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        # Before the step, while the weights are still good. fp16's scaler expects overflows and skips such steps.
        if settings.precision != "fp16" and not _is_finite(norm, None):
            raise NotFiniteError("gradient", losses, batches)
        self._ready_optimizer.step()
        self._ready_optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self._student)
        return Taken(means, norm, waiting, forward)


# --- details --------------------------------------------------------------------------------------------


class _ClockedReduce:
    """A sum over the processes that knows when this one first asked for it: what comes later is also waiting for the
    others."""

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self._began: float | None = None
        self.seconds = 0.0

    def start(self, *called: object) -> None:
        self._began = time.perf_counter()

    def __call__(self, value: Tensor) -> Tensor:
        if self._began is not None:
            if value.is_cuda:
                torch.cuda.synchronize(value.device)
            self.seconds, self._began = time.perf_counter() - self._began, None
        return self._reduce(value)


def _is_finite(value: Tensor, reduce: Reduce | None) -> bool:
    """Whether a scalar is finite on all processes: a NaN survives the sum, so that they stop together."""
    return bool(torch.isfinite(value if reduce is None else reduce(value.clone())))
