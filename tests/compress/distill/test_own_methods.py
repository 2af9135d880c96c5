"""Methods of the user's: by import path from a recipe, and as objects."""

from __future__ import annotations

import csv
import importlib
import linecache
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.data.batch import Batch
from compress.detectors.base import freeze
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_detector
from compress.distill.build import build_methods
from compress.distill.level_matching import LevelMatched
from compress.distill.method import Method, Outputs
from compress.distill.uet import UET
from compress.distill.weighting import WeightedMethod
from compress.run import pipeline, plans
from compress.run.data import open_data
from compress.run.trainings import train as train_plan
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe
from tests.helpers.own_methods import Imitation
from tests.helpers.training_runs import assert_same, fabric, last_checkpoint

PATH = "tests.helpers.own_methods:Imitation"


def model(family: str = "gfl", seed: int = 0) -> Any:
    shape = Model.model_validate({"detector": family, "backbone": "nano", "neck_channels": 32, "head_depth": 1})
    return build_detector(shape, 3, seed)


def built(methods: dict[str, Any], **arguments: Any) -> dict[str, WeightedMethod]:
    return build_methods(Methods.model_validate(methods), model(), model(seed=1), **arguments)


def test_a_recipe_builds_it_with_its_options_weight_and_schedule() -> None:
    settings = {"options": {"levels": 3}, "weight": 0.5, "stop_epoch": 2, "decay": "linear"}
    weighted = built({"bckd": {}, PATH: settings})["Imitation"]
    assert isinstance(weighted.method, Imitation) and (weighted.method.levels, weighted.method.power) == (3, 2.0)
    assert (weighted.scale, weighted.stop_epoch, weighted.decay) == (0.5, 2, True)
    automatic = built({PATH: {"weight": "auto", "ratio": 2}})["Imitation"]
    assert (automatic.auto_ratio, automatic.scale) == (2, 0)
    again = built({"bckd": {}, PATH: settings})["Imitation"]
    assert_same(weighted.state_dict(), again.state_dict())  # the same seed
    assert isinstance(built({PATH: {}, "uet": {"of": PATH}})["Imitation"].method, UET)


def test_other_methods_keep_their_random_numbers() -> None:
    assert_same(built({"mgd": {}})["mgd"].state_dict(), built({"mgd": {}, PATH: {}})["mgd"].state_dict())


def test_pyramids_of_other_strides_are_matched() -> None:
    settings = Methods.model_validate({PATH: {}})
    weighted = build_methods(settings, model("faster_rcnn"), model(seed=1))["Imitation"]
    assert isinstance(weighted.method, LevelMatched) and isinstance(weighted.method.host, Imitation)


def test_objects_are_copied_and_weighted() -> None:
    mine = Imitation(model(), model())
    half = WeightedMethod(mine, weight=0.5, stop_epoch=3)
    methods = built({"bckd": {}}, own={"mine": mine, "half": half})
    assert list(methods) == ["bckd", "mine", "half"]
    assert methods["mine"].scale == 1 and (methods["half"].scale, methods["half"].stop_epoch) == (0.5, 3)
    for name in ("mine", "half"):
        copy = methods[name].method
        assert copy is not mine
        assert_same(copy.state_dict(), mine.state_dict())


WEIGHED = f"methods={{'{PATH}': {{weight: auto, ratio: 0.5, options: {{levels: 3}}}}}}"


def test_it_trains_is_logged_and_resumes_exactly(tmp_path: Path) -> None:
    whole = tiny_recipe.recipe(tmp_path / "a", WEIGHED, "train.steps=12")
    pipeline.distill(whole)
    rows = list(csv.DictReader((whole.run_dir / "student" / "metrics.csv").open()))
    first = rows[0]
    assert float(first["imitation"]) > 0 and float(first["scale_Imitation"]) > 0
    assert float(first["grad_Imitation"]) == pytest.approx(0.5 * float(first["grad_detection"]), rel=1e-4)

    teacher = whole.run_dir / "teacher.safetensors"
    given = ("teacher.model=null", "teacher.train=null", f"teacher.checkpoint={teacher}")
    stopped = tiny_recipe.recipe(tmp_path / "b", WEIGHED, "train.steps=12", *given)
    for stop in (5, 12):
        torch.manual_seed(stop)
        train(stopped, stop)
    adapter = "Imitation.method.adapter.weight"
    one, other = (last_checkpoint(recipe)["modules"]["methods"] for recipe in (whole, stopped))
    assert_same(one, other)
    assert not torch.equal(one[adapter], torch.zeros_like(one[adapter]))
    assert_same(*(load_file(recipe.run_dir / "student.safetensors") for recipe in (whole, stopped)))


def train(recipe: Recipe, stop: int) -> None:
    assert recipe.teacher is not None and recipe.teacher.checkpoint is not None
    teacher = freeze(load_detector(Path(recipe.teacher.checkpoint))[0])
    plan = replace(plans.student_plan(recipe), teacher=teacher, distillation=pipeline.distillation_plan(recipe))
    train_plan(fabric(), plan, open_data(plans.data_plan(recipe), fabric()), resume=True, max_steps=stop)


class Instance(Method):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize(
    ("methods", "own", "line"),
    [
        (
            {"tests.helpers.own_methods:NoMethod": {}},
            {},
            "methods.tests.helpers.own_methods:NoMethod: needs a subclass of "
            "compress.distill.method.Method, got the class NoMethod",
        ),
        (
            {"tests.helpers.own_methods:make_imitation": {}},
            {},
            "methods.tests.helpers.own_methods:make_imitation: needs a subclass of "
            "compress.distill.method.Method, got a value of type function",
        ),
        (
            {PATH: {"options": {"level": 3}}},
            {},
            f"methods.{PATH}: Imitation cannot be built: TypeError: Imitation.__init__() got an unexpected keyword "
            "argument 'level'",
        ),
        (
            {"tests.helpers.own_methods:Nothing": {}},
            {},
            "methods.tests.helpers.own_methods:Nothing: tests.helpers.own_methods has no Nothing",
        ),
        ({}, {"a.b": Instance()}, "methods.a.b: is not a plain name (letters, digits, _)"),
        ({}, {"mine": object()}, "methods.mine: needs a compress.distill.method.Method, got a value of type object"),
        (
            {"bckd": {}},
            {"bckd": Instance()},
            "methods.bckd: the recipe already has a method of this name; give yours another",
        ),
    ],
)
def test_what_is_wrong_is_one_line(methods: dict[str, Any], own: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        built(methods, own=own)
    assert str(caught.value) == line


def test_what_it_needs_is_checked() -> None:
    settings = Methods.model_validate({"tests.helpers.own_methods:NeedsDistributions": {}})
    line = r"NeedsDistributions needs box distributions of the teacher, which fcos cannot give$"
    with pytest.raises(UserError, match=line):
        build_methods(settings, model(), model("fcos"))
    needs = Imitation(model(), model())
    needs.needs = build_methods(settings, model(), model())["NeedsDistributions"].method.needs
    with pytest.raises(
        UserError, match=r"methods.mine needs box distributions of the student, which fcos cannot give$"
    ):
        build_methods(Methods(), model("fcos"), model(), own={"mine": needs})
    needs.needs = {"dense"}  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"methods.mine: its `needs` is {'dense'}; give a set of Capability.FEATURES, "):
        build_methods(Methods(), model(), model(), own={"mine": needs})


def test_a_mistake_inside_it_is_the_cause() -> None:
    with pytest.raises(
        UserError, match=r"own_methods:Broken: Broken cannot be built: TypeError: of .* making$"
    ) as caught:
        built({"tests.helpers.own_methods:Broken": {}})
    assert isinstance(caught.value.__cause__, TypeError)


MINE = """\
from tests.helpers.own_methods import Imitation


class Mine(Imitation):
    factor = {factor}

    def forward(self, student, teacher, batch):
        return {{"mine": self.factor * super().forward(student, teacher, batch)["imitation"]}}
"""


def test_a_training_is_done_again_when_the_class_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    settings = ("methods={'mine_of_a_test:Mine': {}}", "train.steps=3", "train.schedule.warmup_steps=1")
    trained = []
    for factor in (1, 1, 2):
        (tmp_path / "mine_of_a_test.py").write_text(MINE.format(factor=factor))
        sys.modules.pop("mine_of_a_test", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        pipeline.distill(tiny_recipe.recipe(tmp_path / "runs", *settings))
        trained.append("student: step 3/3" in capsys.readouterr().out)
    assert trained == [True, False, True]
