"""The student with the methods that it learns by: one module whose forward pass is the whole loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.data.batch import Batch
from compress.detectors.base import Detector, Reduce
from compress.distill.method import Outputs
from compress.distill.teacher_cache import TeacherCache
from compress.distill.teacher_outputs import looked_at, run_teacher
from compress.distill.weighting import TrainingPosition, WeightedMethod, gradient_norm
from deploy.core.errors import UserError


class Learner(nn.Module):
    """The student and the methods' adapters; its forward pass is the whole loss.

    The teacher is kept out of the module tree: it has no gradient, goes to no checkpoint and stays in eval mode.

    cache: of the teacher, which then runs only for what is not in it.
    """

    def __init__(
        self,
        student: Detector,
        methods: Mapping[str, WeightedMethod],
        teacher: Detector | None,
        reduce: Reduce | None,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict(methods)
        self._teacher = (teacher,)
        self._reduce = reduce
        self._cache = cache
        self.detection_norm: Tensor
        self.register_buffer("detection_norm", torch.zeros(()), persistent=False)

    def forward(self, batch: Batch, position: TrainingPosition) -> dict[str, Tensor]:
        """Weighted scalar losses of a batch; their sum is what is minimised."""
        (teacher,) = self._teacher
        features = self.student.features(batch.images)
        prediction = self.student.predict_in_training(features, batch.targets)
        factors = {name: method.factor(position) for name, method in self._weighted()}
        teacher_outputs = None
        active = [weighted.method for name, weighted in self._weighted() if factors[name]]
        parts = looked_at(active)
        if teacher is not None and parts:
            if self._cache is None:
                teacher_outputs = run_teacher(teacher, batch.images, parts)
            else:
                teacher_outputs = self._cache(batch, parts)
        with torch.autocast(batch.images.device.type, enabled=False):
            prediction = prediction.float()
            targets = self.student.assign(prediction, batch.targets, self._reduce)
            losses = self.student.loss(prediction, targets, self._reduce)
            if active:
                student = Outputs(features, prediction, self.student, targets)
                terms = {
                    name: m.method(student, teacher_outputs if m.method.needs_teacher else None, batch)
                    for name, m in self._weighted()
                    if factors[name]
                }
                check_terms(terms, losses)
                if position.measures and features[0].requires_grad:
                    self._measure(losses, terms, features)
                for name, weighted in self._weighted():
                    factor = factors[name] * weighted.scale
                    losses.update({key: value * factor for key, value in terms.get(name, {}).items()})
        return losses

    def observations(self) -> dict[str, Tensor]:
        """Scalars for the log besides the losses: gradient norms, automatic weights, what the methods report."""
        values: dict[str, Tensor] = {}
        for name, weighted in self._weighted():
            values[f"grad_{name}"] = weighted.norm
            if weighted.auto_ratio is not None:
                values[f"scale_{name}"] = weighted.scale
            values |= {f"{key}_{name}": value for key, value in weighted.method.observations().items()}
        if len(self.methods):
            values["grad_detection"] = self.detection_norm
        return values

    def _weighted(self) -> list[tuple[str, WeightedMethod]]:
        return list(self.methods.items())  # type: ignore[arg-type]

    def _measure(self, losses: dict[str, Tensor], terms: dict[str, dict[str, Tensor]], features: list[Tensor]) -> None:
        """Gradient norms of the detection loss and of each method at the student's pyramid."""
        self.detection_norm.copy_(gradient_norm(total_loss(losses), features, self._reduce))
        for name, weighted in self._weighted():
            if name in terms:
                norm = gradient_norm(total_loss(terms[name]), features, self._reduce)
                weighted.measure(norm, self.detection_norm)


def check_terms(terms: Mapping[str, Mapping[str, Tensor]], losses: Mapping[str, Tensor]) -> None:
    """Raise UserError for what a method gave unless it is named scalars, with names that nothing else has: of two terms
    of one name, one would be lost."""
    owners = dict.fromkeys(losses, "the detection loss")
    for name, given in terms.items():
        if not isinstance(given, Mapping) or not given:
            what = "an empty dict" if isinstance(given, Mapping) else f"a {type(given).__name__}"
            raise UserError(f"methods.{name}: forward must give a dict of scalars by name, gave {what}")
        for term, value in given.items():
            if not isinstance(value, Tensor) or value.dim():
                what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UserError(f"methods.{name}: its term '{term}' must be a scalar tensor, not {what}")
            if term in owners:
                raise UserError(f"methods.{name}: its term '{term}' is one of {owners[term]}, too; rename it")
            owners[term] = f"methods.{name}"


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Sum of scalar losses."""
    return torch.stack(list(losses.values())).sum()
