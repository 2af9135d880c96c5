"""One optimizer step: the student, what it learns from and its optimizer."""

from __future__ import annotations

import math
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
    """What a step gave. losses: weighted scalars, means over the step's batches. norm: of the gradient, unclipped."""

    losses: dict[str, Tensor]
    norm: Tensor


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
        self.reduce: Reduce | None = sum_over_processes(fabric)
        self.learner = Learner(student, methods, teacher, self.reduce, cache)
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
        for part in range(settings.accumulate):
            batches.append(next(images).to(fabric.device, non_blocking=True))
            with fabric.no_backward_sync(self._ready, enabled=part < settings.accumulate - 1):
                losses = self._ready(batches[-1], position)
                loss = total_loss(losses) / settings.accumulate
                if not _is_finite(loss.detach(), self.reduce):
                    raise NotFiniteError("loss", losses, batches)
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
        return Taken(means, norm)


# --- details --------------------------------------------------------------------------------------------


def _is_finite(value: Tensor, reduce: Reduce | None) -> bool:
    """Whether a scalar is finite on all processes: a NaN survives the sum, so that they stop together."""
    return bool(torch.isfinite(value if reduce is None else reduce(value.clone())))
