"""Objects of a Python program in a run: a method, a teacher and a student, and what a second run makes of them."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.config.recipe import Recipe
from compress.data.batch import Batch
from compress.detectors.base import Capability, Detector
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_detector
from compress.distill.method import Method, Outputs
from compress.run import pipeline
from compress.run.parts import Parts, describe
from deploy.core.errors import UserError
from examples.own_detector.centers import Centers
from tests.helpers import tiny_recipe


class Gap(Method):
    """How far the means of the finest maps are apart."""

    needs = frozenset({Capability.FEATURES})

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        difference = student.features[0].float().mean() - teacher.features[0].float().mean() - self.shift
        return {"gap": self.weight * difference.square()}


def alone(folder: Path) -> Recipe:
    """A recipe that names neither a teacher nor a method."""
    return tiny_recipe.recipe(folder, "teacher=null", "methods={}", "train.steps=2", "train.schedule.warmup_steps=1")


def teacher_for(recipe: Recipe) -> Detector:
    return build_detector(recipe.student, 3, seed=7)


def test_a_method_and_a_teacher_as_objects(tmp_path: Path) -> None:
    recipe = alone(tmp_path)
    method = Gap(3.0)
    pipeline.distill(recipe, parts=Parts(methods={"gap": method}, teacher=teacher_for(recipe)))
    with open(recipe.run_dir / "student" / "metrics.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["gap"]) > 0
    assert method.shift.item() == 0, "a training works on a copy"
    stages = json.loads((recipe.run_dir / "manifest.json").read_text())["stages"]
    assert {"teacher_check", "student"} <= set(stages)


def test_a_finished_training_is_done_again_when_its_method_changes(tmp_path: Path) -> None:
    recipe = alone(tmp_path)

    def trained_with(weight: float) -> str:
        pipeline.distill(recipe, parts=Parts(methods={"gap": Gap(weight)}, teacher=teacher_for(recipe)))
        stages = json.loads((recipe.run_dir / "manifest.json").read_text())["stages"]
        return str(stages["student"]["inputs"])

    first = trained_with(1.0)
    assert trained_with(1.0) == first and trained_with(2.0) != first
    assert describe(Gap(1.0)) == describe(Gap(1.0)) != describe(Gap(2.0))


def test_a_student_as_a_function_is_what_trains(tmp_path: Path) -> None:
    recipe = alone(tmp_path)
    wide = recipe.student.model_copy(update={"neck_channels": 64})
    pipeline.distill(recipe, parts=Parts(student=lambda classes: build_detector(wide, classes, 0)))
    assert load_detector(recipe.run_dir / "student.safetensors")[0].feature_channels == 64


def test_a_method_needs_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^methods.gap: needs a teacher"):
        pipeline.distill(alone(tmp_path), parts=Parts(methods={"gap": Gap()}))


def test_a_dry_run_takes_the_objects_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = alone(tmp_path)
    parts = Parts(methods={"gap": Gap()}, teacher=teacher_for(recipe))
    pipeline.distill(recipe, dry_run=True, parts=parts)
    assert "everything fits together" in capsys.readouterr().out and not recipe.runs.exists()


class Scaled(Gap):
    """A method whose settings are a list."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.scales = scales


def test_lists_among_the_settings_and_what_makes_a_student_are_seen() -> None:
    assert describe(Scaled([1.0])) == describe(Scaled([1.0])) != describe(Scaled([2.0]))

    def identity(width: int) -> dict[str, object]:
        return Parts(student=partial(Centers, width=width)).student_identity()

    assert identity(16) == identity(16) != identity(32)
    json.dumps([describe(Scaled([1.0])), identity(16)])


def test_a_student_that_could_not_be_loaded_is_refused_before_its_training(tmp_path: Path) -> None:
    recipe = alone(tmp_path)
    with pytest.raises(
        UserError, match=r"built again from its options \(none\) has other weights .*attribute `options`"
    ):
        pipeline.distill(recipe, parts=Parts(student=partial(Centers, width=16)))
    assert not (recipe.run_dir / "student" / "metrics.csv").exists()


class Clash(Gap):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"loss_cls": self.shift}


class Bare(Gap):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.shift  # type: ignore[return-value]


class Wide(Gap):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"wide": student.features[0]}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": Gap(), "b": Gap()}, "methods.b: its term 'gap' is one of methods.a, too; rename it"),
        ({"a": Clash()}, "methods.a: its term 'loss_cls' is one of the detection loss, too; rename it"),
        ({"a": Bare()}, "methods.a: forward must give a dict of scalars by name, gave a Parameter"),
        ({"a": Wide()}, r"methods.a: its term 'wide' must be a scalar tensor, not shape \[4, 32, 8, 8\]"),
    ],
)
def test_terms_that_would_be_lost_or_are_no_scalars(tmp_path: Path, methods: dict[str, Method], message: str) -> None:
    recipe = alone(tmp_path)
    with pytest.raises(UserError, match=message):
        pipeline.distill(recipe, parts=Parts(methods=methods, teacher=teacher_for(recipe)))
