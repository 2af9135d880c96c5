"""report.json of a run whose student was pruned: its models, and how it was cut, from what the run left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.config.model import Model
from compress.config.prune import Cut, Prune
from compress.data.coco import CocoDetection
from compress.data.synthetic import generate
from compress.data.transforms import eval_transform
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, save_detector
from compress.manifest import BASELINE, FINE_TUNED, PRUNE, PRUNED, STUDENT, Manifest, RunFolder
from compress.prune.search import Means, prune
from compress.report.reading import read_document
from compress.run.kept import KeptPlan, keep_evaluation
from compress.run.report import ReportPlan, _detectors, _models, write_report

FIGURES = {"map": 50.0, "per_class": {}}


@pytest.fixture
def val(tmp_path: Path) -> CocoDetection:
    generate(tmp_path / "data", train=1, val=2, size=64, classes=2, seed=0)
    return CocoDetection(tmp_path / "data/val.json", tmp_path / "data/images", eval_transform(64, 64))


def save(folder: RunFolder, name: str, detector: Detector, manifest: Manifest, result: dict[str, Any]) -> None:
    record = ModelRecord(model=detector.model, num_classes=2, class_names=("a", "b"), category_ids=(1, 2))
    folder.path.mkdir(exist_ok=True)
    save_detector(folder.weights(name), detector, metadata=record)
    manifest.stage(PRUNE if name == PRUNED else name, {}, [], lambda: result)


def test_a_pruned_students_cut_and_models_are_in_the_report(tmp_path: Path, val: CocoDetection) -> None:
    whole = build_detector(Model(backbone="nano", weights="none", neck_channels=32, head_depth=1), 2, 0)
    found = prune(whole, Cut(gflops=0.5), Means((64, 64)))
    folder = RunFolder(tmp_path / "run")
    manifest = Manifest(folder.path, {})
    cut = {
        "budget": "gflops", "asked": 0.5, "whole": found.whole, "found": found.found, "rows": found.rows,
        "sensitivity": None, "latency": None, "metrics": {**FIGURES, "map": 2.5}, "canvas": [64, 64],
    }  # fmt: skip
    for name in (PRUNED, BASELINE, FINE_TUNED, STUDENT):
        save(folder, name, found.detector, manifest, cut if name == PRUNED else {"metrics": FIGURES, "seconds": 1.5})
    plan = ReportPlan("run", folder, val, (64, 64), None, False, None, (), prune=Prune(gflops=0.5), methods=["fgd"])
    keep_evaluation(KeptPlan(folder, val, tmp_path / "data/images", (64, 64)), manifest)
    write_report(plan, [])
    report = read_document(folder.path).report
    assert [(row.of, row.against) for row in report.comparisons] == [(STUDENT, BASELINE), (STUDENT, FINE_TUNED)]
    assert report.validation_images == 2 and report.pruning is not None
    assert report.models.pruned is not None and report.models.pruned.map == 2.5
    assert report.models.fine_tuned is not None and report.models.fine_tuned.gflops == pytest.approx(found.found)
    order = [name for name, _ in whole.named_modules()]
    assert [row.name for row in report.pruning.rows] == sorted((row["name"] for row in found.rows), key=order.index)
    assert (report.pruning.of, report.pruning.importance) == ("teacher", "group_norm")
    picture = report.pictures[0]
    assert Path(picture.image).is_file() and picture.ground_truth and picture.teacher is None
    assert picture.baseline is not None and picture.student is not None

    alone = replace(plan, teacher=str(folder.weights(BASELINE)), methods=())  # a teacher that was cut, not measured
    models = _models(alone, _detectors(alone))
    assert list(models) == ["teacher", PRUNED, BASELINE, STUDENT]
    assert "map" not in models["teacher"] and models["teacher"]["gflops"] == pytest.approx(found.found)

    write_report(ReportPlan("run", folder, val, (64, 64), None, False, None, ()), [])  # the recipe prunes no longer
    report = read_document(folder.path).report
    assert report.pruning is None and report.models.pruned is None and report.models.fine_tuned is None
