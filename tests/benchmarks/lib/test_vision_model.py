"""The vision model of the benchmarks: trained once, and one that `methods.vfm` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.lib import vision_model
from benchmarks.lib.trainings import Arm, with_vision_model
from compress.distill.vision_model import load_vision_model
from tests.helpers import tiny_recipe


def test_trained_once_and_named_by_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_recipe.recipe_file(tmp_path).rename(tmp_path / "teacher.yaml")
    monkeypatch.setattr(vision_model, "STEPS", 4)
    arm = Arm("VFM", ("methods={vfm: {model: VISION_MODEL, stride: 16}}", "train.steps=5"))
    settings = with_vision_model(arm, tmp_path, ["data.synthetic.classes=8", "student.head_depth=0"])
    folder = tmp_path / "runs" / "tiny_vision"
    assert settings == (f"methods={{vfm: {{model: {folder}, stride: 16}}}}", "train.steps=5")
    model = load_vision_model("model", str(folder))
    assert (model.patch, model.width) == (16, 128) and model.mean == pytest.approx((123.675, 116.28, 103.53))
    assert model.tokens(torch.zeros(1, 3, 64, 96), (4, 6)).shape == (1, 128, 4, 6)
    made = (folder / "trained.json").read_bytes()
    assert -1 < json.loads(made)["explained"] < 1
    assert with_vision_model(arm, tmp_path, ["data.synthetic.classes=8"]) == settings
    assert (folder / "trained.json").read_bytes() == made
    other = Arm("FGD", ("methods={fgd: {}}",))
    assert with_vision_model(other, tmp_path / "none", []) == other.settings
