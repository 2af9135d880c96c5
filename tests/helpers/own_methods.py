"""Distillation methods as users write them, for recipes that name them by import path."""

from __future__ import annotations

from torch import Tensor, nn

from compress.data.batch import Batch
from compress.detectors.base import Capability, Detector
from compress.distill.method import Method, Outputs


class Imitation(Method):
    """Mean squared difference of the first `levels` maps, the student's through a convolution that is trained."""

    needs = frozenset({Capability.FEATURES})

    def __init__(self, student: Detector, teacher: Detector, *, levels: int = 2, power: float = 2.0) -> None:
        super().__init__()
        self.levels = levels
        self.power = power
        self.adapter = nn.Conv2d(student.feature_channels, teacher.feature_channels, 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        pairs = zip(student.features[: self.levels], teacher.features[: self.levels], strict=True)
        total = sum((self.adapter(s.float()) - t.float()).abs().pow(self.power).mean() for s, t in pairs)
        assert isinstance(total, Tensor)
        return {"imitation": total}


class NeedsDistributions(Imitation):
    """Decides in its constructor what it needs."""

    def __init__(self, student: Detector, teacher: Detector) -> None:
        super().__init__(student, teacher)
        self.needs = frozenset({Capability.DISTRIBUTIONS})


class Broken(Imitation):
    """Fails in its constructor."""

    def __init__(self, student: Detector, teacher: Detector) -> None:
        raise TypeError("of the user's own making")


class NoMethod(nn.Module):
    """Lacks the base class."""


def make_imitation(student: Detector, teacher: Detector) -> Imitation:
    """A function, and no class."""
    return Imitation(student, teacher)
