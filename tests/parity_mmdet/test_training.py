"""Students learn from mmdet's detectors: from their features with UET, from their logits, and from their boxes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.config.teacher import Mmdet
from compress.data.batch import collate
from compress.data.synthetic import class_names
from compress.detectors.checkpoints import ModelRecord
from compress.distill.build import build_methods
from compress.distill.method import Outputs
from compress.run import pipeline
from compress.teachers.mmdet import MmdetDetector, open_mmdet
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe
from tests.parity_mmdet import models
from tests.parity_mmdet.samples import sample

NAMES = tuple(class_names(3))


def saved(folder: Path, kind: str) -> tuple[Path, Path]:
    """A detector that knows the classes of the generated data."""
    settings = models.config(kind, width=32)
    return models.save(folder, settings, models.build(settings, seed=3), NAMES)


def recipe(folder: Path, kind: str, *overrides: str) -> Recipe:
    config, checkpoint = saved(folder / kind, kind)
    return tiny_recipe.recipe(folder, f"teacher={{mmdet: {{config: {config}, checkpoint: {checkpoint}}}}}", *overrides)


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("faster_rcnn", {"fgd": {}, "uet": {"of": "fgd"}}),
        ("gfl", {"fgd": {}, "uet": {"of": "fgd"}}),
        ("gfl", {"bckd": {}, "ld": {}}),
        ("fcos", {"bckd": {}}),
        ("atss", {"pkd": {}, "bckd": {}}),
    ],
    ids=["faster_rcnn-fgd-uet", "gfl-fgd-uet", "gfl-bckd-ld", "fcos-bckd", "atss-pkd-bckd"],
)
def test_a_training_step(kind: str, methods: dict[str, object], tmp_path: Path) -> None:
    config, checkpoint = saved(tmp_path, kind)
    teacher = open_mmdet(Mmdet(config=config, checkpoint=checkpoint), torch.device("cpu")).detector
    assert isinstance(teacher, MmdetDetector)
    student = ModelRecord(model=Model(backbone="nano", neck_channels=32, head_depth=1), num_classes=3).build()
    pairs = [sample(i, (120, 150)) for i in range(2)]
    for _, target in pairs:
        target.labels %= 3
    batch = collate(pairs)
    built = build_methods(Methods.model_validate(methods), student, teacher)
    assert set(built) == set(methods) - {"uet"}
    features = student.features(batch.images)
    prediction = student.predict(features)
    ours = Outputs(features, prediction, student, student.assign(prediction, batch.targets))
    with torch.no_grad():
        maps = teacher.features(batch.images)
        theirs = Outputs(maps, teacher.predict(maps), teacher)
    terms = {key: value for method in built.values() for key, value in method.method(ours, theirs, batch).items()}
    total = torch.stack(list(terms.values())).sum()
    assert torch.isfinite(total) and float(total) > 0
    total.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.backbone.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_methods_that_a_teacher_cannot_serve(tmp_path: Path) -> None:
    config, checkpoint = saved(tmp_path, "faster_rcnn")
    teacher = open_mmdet(Mmdet(config=config, checkpoint=checkpoint), torch.device("cpu")).detector
    student = ModelRecord(model=Model(backbone="nano", neck_channels=32, head_depth=1), num_classes=3).build()
    assert teacher is not None
    with pytest.raises(UserError, match="needs dense of the teacher, which mmdet's FasterRCNN cannot give"):
        build_methods(Methods.model_validate({"bckd": {}}), student, teacher)
    config, checkpoint = saved(tmp_path, "retinanet")
    teacher = open_mmdet(Mmdet(config=config, checkpoint=checkpoint), torch.device("cpu")).detector
    assert teacher is not None
    with pytest.raises(UserError, match="9 anchors"):
        build_methods(Methods.model_validate({"bckd": {}}), student, teacher)


def test_a_recipe_with_pseudo_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A quarter of the labels; mmdet's detector labels the rest."""
    made = recipe(
        tmp_path, "faster_rcnn", "methods={}", "labels={fraction: 0.25}", "train.steps=3",
        "pseudo_labels={tau: 0.1, tau_ignore: 0.06, fine_tune: {steps: 2}}",
    )  # fmt: skip
    run_dir = pipeline.run(made)
    said = capsys.readouterr().out
    assert "uncertain regions in 18 images" in said
    stages = json.loads((run_dir / "manifest.json").read_text())["stages"]
    assert stages["pseudo labels: training images"]["result"]["labels"] > 0
    assert (run_dir / "student.onnx").is_file() and (run_dir / "report.html").is_file()


def test_a_recipe_with_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a recipe to its report: FGD with UET from mmdet's Faster R-CNN."""
    made = recipe(tmp_path, "faster_rcnn", "methods={fgd: {}, uet: {of: fgd}}", "train.steps=3")
    run_dir = pipeline.run(made)
    assert "model.pth" in capsys.readouterr().out
    rows = (run_dir / "student" / "metrics.csv").read_text().splitlines()
    assert "fgd_fg" in rows[0]
    assert (run_dir / "student.onnx").is_file() and (run_dir / "report.html").is_file()
