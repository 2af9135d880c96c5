"""A run whose student is cut from another detector: what is refused before anything long, and what a cut depends on."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.config.model import Model
from compress.config.train import Train
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.run import pipeline
from compress.run.data import open_data
from compress.run.plans import cut_plan, data_plan, with_whole_student
from compress.run.pruned import cut_student, rehearse_cut
from compress.training import distributed
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe, training_runs


class Recorder:
    """In the place of a manifest: what a stage says it depends on."""

    def stage(self, name: str, inputs: Any, outputs: Any, work: Any, **_: Any) -> Any:
        self.inputs = inputs
        return work()


OTHER_CLASSES = r"^student\.prune\.of: zoo:quickstart: the checkpoint knows 8 classes, the data has 3; a pruned student"


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("{gflops: 0.5, keep: [nek]}", r"^student\.prune\.keep: gfl has no layer 'nek'; did you mean neck"),
        ("{max_map_drop: 1, keep: [nek]}", r"^student\.prune\.keep: gfl has no layer 'nek'"),
        ("{params: 0.01}", r"^student\.prune\.params: 0.01 asks for .* remain with the fewest channels"),
        ("{gflops: 0.5, of: 'zoo:quickstart'}", OTHER_CLASSES),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused_before_the_teacher_trains(
    tmp_path: Path, prune: str, message: str
) -> None:
    recipe = tiny_recipe.recipe(tmp_path, f"student={{prune: {prune}}}")
    with pytest.raises(UserError, match=message):
        pipeline.distill(recipe)
    assert not (recipe.run_dir / "teacher.safetensors").exists() and not (recipe.run_dir / "teacher").exists()
    with pytest.raises(UserError, match=message):
        pipeline.distill(recipe, dry_run=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_training_alone_has_no_teacher_to_cut(tmp_path: Path, dry_run: bool) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "student={prune: {gflops: 0.5}}")
    with pytest.raises(UserError, match=r"^student\.prune\.of: the run trains the teacher first; use compress"):
        pipeline.distill(recipe, dry_run=dry_run, distillation=False)


def test_what_must_be_measured_is_refused_for_no_share_of_operations(tmp_path: Path) -> None:
    """With most layers kept no detector of half the operations is left, and a latency may be met all the same."""
    recipe = tiny_recipe.recipe(tmp_path, "student={prune: {latency_ms: 5, keep: [backbone, head]}}")
    model = rehearse_cut(with_whole_student(recipe).student, 3, (64, 64), 0)
    assert model.widths and all(name.startswith("neck") for name in model.widths if len(model.widths[name]) == 1)


def test_a_cut_depends_on_the_code_of_an_own_detector(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    model = Model(detector="examples.own_detector.centers:Centers")
    recipe = tiny_recipe.recipe(tmp_path, f"student={{prune: {{params: 0.7, of: {whole}}}}}")
    fabric = training_runs.fabric()
    data = open_data(data_plan(recipe), fabric)
    record = ModelRecord(model=model, num_classes=3, class_names=data.train.categories)
    save_detector(whole, build_detector(model, 3, 0), metadata=record)
    manifest = Recorder()
    cut_student(fabric, cut_plan(recipe, str(whole)), data, manifest, 0, print)  # type: ignore[arg-type]
    assert set(manifest.inputs["named_model"]) == {"detector"}
    assert load_detector(recipe.run_dir / "pruned.safetensors")[1].source == "pruned from whole.safetensors"


def test_processes_wait_long_for_one_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the 30 minutes that torch gives them at most."""
    given: dict[str, Any] = {}

    def fabric(**settings: Any) -> SimpleNamespace:
        given.update(settings)
        return SimpleNamespace(device=torch.device("cpu"), launch=lambda: None)

    monkeypatch.setattr(distributed, "Fabric", fabric)
    monkeypatch.setattr(distributed, "DDPStrategy", dict)
    distributed.launch(Train(steps=1000, batch_size=2, devices=2), unused_parameters=True)
    assert given["strategy"]["timeout"] > timedelta(hours=6) and given["strategy"]["find_unused_parameters"]
