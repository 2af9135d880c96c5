"""Recipes with few labels: what the student gets to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.coco import CocoDetection
from compress.run import pipeline, plans
from compress.run.data import open_data, splits
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe
from tests.helpers.training_runs import fabric


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_only_a_part_keeps_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "labels={fraction: 0.25}", "train.steps=3")
    folder = pipeline.distill(recipe, distillation=False)
    assert "labels.fraction 0.25: 18 more images have no labels" in capsys.readouterr().out
    given = read(splits(recipe.data, recipe.runs)[0].annotations)
    labelled, rest = read(folder / "labelled.json"), read(folder / "unlabelled.json")
    assert (len(labelled["images"]), len(rest["images"]), rest["annotations"]) == (6, 18, [])
    ids = {row["id"] for row in labelled["images"]}
    assert labelled["annotations"] == [row for row in given["annotations"] if row["image_id"] in ids]
    data = open_data(plans.data_plan(recipe), fabric())
    assert set(data.train.image_ids) == ids and isinstance(data.train, CocoDetection)
    assert len(data.val) == 8 and data.unlabelled is not None
    assert read(folder / "manifest.json")["stages"]["student"]["result"]["steps"] == 3


def test_another_part_is_another_training(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "labels={fraction: 0.25}", "train.steps=3")
    folder = pipeline.distill(recipe, distillation=False)
    before = read(folder / "manifest.json")["stages"]["student"]
    pipeline.distill(recipe, distillation=False)
    assert read(folder / "manifest.json")["stages"]["student"] == before
    pipeline.distill(
        tiny_recipe.recipe(tmp_path, "labels={fraction: 0.25, seed: 1}", "train.steps=3"), distillation=False
    )
    assert read(folder / "manifest.json")["stages"]["student"]["inputs"] != before["inputs"]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.fraction: is 0 and there is no section pseudo_labels: nothing"):
        tiny_recipe.recipe(tmp_path, "labels={fraction: 0}")
    with pytest.raises(UserError, match=r"labels\.fraction: missing"):
        tiny_recipe.recipe(tmp_path, "labels={}")
