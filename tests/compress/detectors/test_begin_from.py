"""A detector that begins from a checkpoint: its weights, its class layers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.config.model import Model
from compress.config.recipe import load_recipe
from compress.detectors.begin import begin_from
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.run import pipeline
from deploy.core.errors import UserError
from tests.helpers import random_teacher, tiny_recipe

NAMES = ("cat", "dog", "cow")
FAMILIES = {
    "gfl": ({}, {"head.gfl_cls.weight", "head.gfl_cls.bias"}),
    "fcos": ({}, 2),
    "retinanet": ({}, 2),
    "faster_rcnn": ({"head_depth": 0, "roi_samples": 32}, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_class_layers_begin_anew_where_classes_differ(family: str, tmp_path: Path) -> None:
    more, expected = FAMILIES[family]
    model = Model.model_validate({"detector": family, "backbone": "nano", "neck_channels": 32, "head_depth": 1} | more)
    file = tmp_path / "start.safetensors"
    save_detector(
        file, build_detector(model, 3, seed=1), metadata=ModelRecord(model=model, num_classes=3, class_names=NAMES)
    )
    start = load_detector(file)[0].state_dict()
    for names, kept in ((NAMES, True), (("cat", "cow", "dog"), False), (("cat",), False)):
        detector = build_detector(model, len(names), seed=2)
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        renewed = begin_from(detector, str(file), names)
        assert (not renewed) == kept
        if not kept:
            assert set(renewed) == expected if isinstance(expected, set) else len(renewed) == expected
        for key, value in detector.state_dict().items():
            assert torch.equal(value, before[key] if key in renewed else start[key]), key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"neck_channels": 64}, "neck_channels 32"),
        ({"head_depth": 0}, "head_depth 1"),
        ({"backbone": "nano2x"}, "backbone nano"),
    ],
)
def test_another_architecture_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = Model(backbone="nano", neck_channels=32, head_depth=1)
    file = tmp_path / "start.safetensors"
    save_detector(file, build_detector(model, 3, seed=1), metadata=ModelRecord(model=model, num_classes=3))
    other = build_detector(model.model_copy(update=change), 3, seed=1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError, match=f"student.init: .* is of another architecture: its .*{named}"):
        begin_from(other, str(file), NAMES, "student.init")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_training_begins_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate of almost nothing the student stays what it began from; another file is another training."""
    file = tmp_path / "start.safetensors"
    classes = ("striped star", "b", "c")
    random_teacher.teacher(file, classes, 0)
    still = ["train.optimizer.lr=1e-12", "train.optimizer.weight_decay=0", "train.ema=null", "train.steps=2",
             "train.schedule.warmup_steps=0", "teacher=null", "methods={}", "data.flip=0"]  # fmt: skip
    recipe = tiny_recipe.recipe(tmp_path, *still, f"student.init={file}")
    pipeline.distill(recipe, dry_run=True)
    pipeline.distill(recipe, distillation=False)
    shown = capsys.readouterr().out
    assert f"student: begins from {file}" in shown
    assert "student: 2 class layers begin anew: what it starts from has other classes" in shown
    start, trained = (load_detector(path)[0].state_dict() for path in (file, recipe.run_dir / "student.safetensors"))
    convolutions = [key for key, value in start.items() if value.dim() == 4 and "gfl_cls" not in key]
    assert len(convolutions) > 10
    for key in convolutions:
        torch.testing.assert_close(trained[key], start[key], rtol=0, atol=1e-8)
    assert not torch.allclose(trained["head.gfl_cls.weight"], start["head.gfl_cls.weight"])
    assert load_detector(recipe.run_dir / "student.safetensors")[1].model.init is None
    random_teacher.teacher(file, classes, 1)
    pipeline.distill(recipe, distillation=False)
    again = load_detector(recipe.run_dir / "student.safetensors")[0].state_dict()
    assert not torch.equal(again[convolutions[0]], trained[convolutions[0]])


@pytest.mark.parametrize(
    ("student", "problem"),
    [
        (
            "{backbone: nano, init: a.onnx}",
            "student.init: 'a.onnx' is neither a .safetensors file",
        ),
        (
            "{backbone: resnet18, weights: imagenet, init: a.pth}",
            "student.weights: are those of a backbone",
        ),
        ("{backbone: nano, init: a.pth}\nteacher.inherit=true", "teacher.inherit: would replace the neck and head"),
        ("{detector: 'm:D', init: a.pth}", "student.init: is for the built-in detectors"),
    ],
)
def test_what_a_recipe_may_say(student: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        load_recipe(tiny_recipe.recipe_file(tmp_path), f"student={student}".splitlines())
