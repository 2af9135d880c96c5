"""What of the teacher runs in a step: the backbone once, the head only where a method looks at its predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.config.methods import Methods
from compress.config.model import Model
from compress.data.batch import Batch, Target
from compress.detectors.base import Capability, Detector, freeze
from compress.detectors.build import build_detector
from compress.distill.build import build_methods
from compress.distill.method import Method, Outputs
from compress.distill.weighting import TrainingPosition
from compress.training.learner import Learner
from deploy.core.errors import UserError
from tests.helpers.teacher_passes import Passes

MODEL = Model(backbone="nano", weights="none", neck_channels=32, head_depth=1)


def models() -> tuple[Detector, Detector]:
    student, teacher = (build_detector(MODEL, 3, seed) for seed in (0, 1))
    return student, freeze(teacher)


def batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[4.0, 4, 40, 50]])
    target = Target(boxes, torch.tensor([1]), torch.tensor([False]), None, 0, (64, 64), (64, 64))
    return Batch(images, [target, target])


@pytest.mark.parametrize(
    ("methods", "features", "head"),
    [
        ({"fgd": {}, "pkd": {}}, 1, 0),
        ({"bckd": {}, "cwd": {"on": "logits"}, "gi": {}}, 1, 1),
        ({"crosskd": {}}, 1, 1),
        ({"fgd": {}, "uet": {"of": "fgd"}}, 1, 0),
        ({"fgd": {}, "bckd": {}, "uet": {"of": ("fgd", "bckd"), "certainty": True}}, 1, 1),  # the draw on BCKD's behalf
        ({"tid": {}, "uet": {"of": "tid"}}, 1, 1),
        ({"bckd": {"stop_epoch": 1}, "fgd": {}}, 1, 0),
        ({"bckd": {"stop_epoch": 1}}, 0, 0),
    ],
)
def test_the_head_runs_only_where_a_method_looks(methods: dict[str, Any], features: int, head: int) -> None:
    student, teacher = models()
    learner = Learner(student, build_methods(Methods.model_validate(methods), student, teacher), teacher, None)
    with Passes(teacher) as passes:
        losses = learner(batch(), TrainingPosition(step=7, total=20, steps_per_epoch=5))
    assert (passes.features, passes.head) == (features, head)
    assert all(torch.isfinite(value) for value in losses.values())


class LooksWithoutAsking(Method):
    needs = frozenset({Capability.FEATURES})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"mine": teacher.prediction.logits[0].mean()}


def test_a_method_that_looks_without_asking_is_told_so() -> None:
    student, teacher = models()
    learner = Learner(
        student, build_methods(Methods(), student, teacher, own={"mine": LooksWithoutAsking()}), teacher, None
    )
    with pytest.raises(UserError, match=r"predictions and does not say so; add Capability\.DENSE to its"):
        learner(batch(), TrainingPosition(1, 20, 5))
