"""A run whose stages do no work: they leave files that differ when what they were made from differs.

Everything else is real: what a stage depends on is computed as always, so a test sees which stages an exchanged input
does again, in a second instead of minutes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.config.recipe import load_recipe
from compress.detectors.build import build_detector, model_of
from compress.detectors.checkpoints import ModelRecord, save_detector
from compress.manifest import Manifest, fingerprint
from compress.run import evaluation, pipeline, report
from deploy.core.files import write_text
from deploy.validate.coco import CocoMetrics

CLASSES = ("star", "disc")
RECIPE = """
name: run
runs: {folder}/runs
data:
  train: {{annotations: {folder}/train.json, images: {folder}/train}}
  val: {{annotations: {folder}/val.json, images: {folder}/val}}
  short: 64
  long: 64
  workers: 0
teacher: {teacher}
student: {{backbone: nano, weights: none, neck_channels: 32, head_depth: 0}}
methods: {{bckd: {{}}}}
pseudo_labels: {{unlabeled: [{folder}/more], fine_tune: {{steps: 2}}}}
baseline: true
train: &train {{steps: 2, batch_size: 2, schedule: {{name: cosine, warmup_steps: 0}}}}
deploy:
  precisions: [fp32, fp16, int8]
  int8: {{images: 2, guided: true, deciding_images: 2, qad: {{steps: 2}}, calibration: {calibration}}}
"""
GIVEN = "{{checkpoint: {folder}/teacher.safetensors}}"
TRAINED = (
    "{{model: {{backbone: nano, weights: none, neck_channels: 32, head_depth: 0}}, "
    "train: {{steps: 2, batch_size: 2, schedule: {{name: cosine, warmup_steps: 0}}}}}}"
)
MODEL = {"backbone": "nano", "weights": "none", "neck_channels": 32, "head_depth": 0}
METRICS = CocoMetrics.from_dict(
    {"map": 1.0, "map50": 1.0, "map75": 1.0, "map_small": None, "map_medium": None, "map_large": None}
    | {"mar100": 1.0, "per_class": dict.fromkeys(CLASSES, 1.0)}
).to_dict()


def make_inputs(folder: Path) -> None:
    """Six training and three validation images, three unlabelled and three for calibration, and a teacher."""
    rng = np.random.default_rng(0)
    for kind, count in (("train", 6), ("val", 3), ("more", 3), ("calibration", 3)):
        names = [f"{kind}{index}.png" for index in range(count)]
        for name in names:
            picture(folder / kind / name, rng.integers(256, size=3))
        if kind in ("train", "val"):
            (folder / f"{kind}.json").write_text(json.dumps(document(names)))
    save_teacher(folder / "teacher.safetensors", seed=0)


def picture(path: Path, colour: Sequence[int]) -> None:
    """An image of one colour, 64 x 64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), tuple(int(value) for value in colour)).save(path)


def document(names: Sequence[str], side: float = 20) -> dict[str, Any]:
    """COCO with a box of each class in every image."""
    images = [{"id": i, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names, start=1)]
    rows = [
        {"image_id": image["id"], "category_id": c, "bbox": [4 * c, 4, side, side], "area": side**2, "iscrowd": 0}
        for image in images
        for c in (1, 2)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": [{"id": i} | row for i, row in enumerate(rows)], "categories": categories}


def save_teacher(path: Path, seed: int) -> None:
    checkpoint(path, str(seed))


def checkpoint(path: Path, content: str) -> None:
    """A detector whose weights depend on `content`."""
    from compress.config.model import Model

    detector = build_detector(Model.model_validate(MODEL), len(CLASSES), 0)
    with torch.no_grad():
        next(detector.parameters()).fill_(int(fingerprint({"of": content})[:6], 16) / 2**24)
    record = ModelRecord(model=model_of(detector), num_classes=2, class_names=CLASSES, category_ids=(1, 2))
    save_detector(path, detector, metadata=record)


class Faked:
    """Runs the recipe of a folder and says which stages would have worked.

    equal: trainings leave the same weights whatever they are made from.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.equal = False
        original = Manifest.stage

        def stage(
            manifest: Manifest,
            name: str,
            inputs: Mapping[str, Any],
            outputs: Sequence[Path],
            run: Callable[[], Any],
            *,
            write: bool = True,
        ) -> Any:
            def work() -> Any:
                self.done.append(name)
                return self._leave(name, fingerprint(inputs), outputs)

            return original(manifest, name, inputs, outputs, work, write=write)

        monkeypatch.setattr(Manifest, "stage", stage)
        monkeypatch.setattr(evaluation, "open_runner", lambda *args, **kwargs: None)
        monkeypatch.setattr(evaluation, "_torch", lambda *args: lambda: None)
        monkeypatch.setattr(report, "show_report", lambda folder: None)

    def run(self, folder: Path, *overrides: str, teacher: str = GIVEN, calibration: bool = True) -> list[str]:
        """The stages that were done, sorted."""
        where = f"{folder}/calibration" if calibration else "null"
        text = RECIPE.format(folder=folder, teacher=teacher.format(folder=folder), calibration=where)
        (folder / "recipe.yaml").write_text(text)
        self.done = []
        pipeline.run(load_recipe(folder / "recipe.yaml", overrides))
        return sorted(self.done)

    def _leave(self, name: str, inputs: str, outputs: Sequence[Path]) -> Any:
        for path in outputs:
            if path.suffix == ".safetensors":
                checkpoint(path, path.name if self.equal else inputs)
            elif path.parent.name == "pseudo":
                names = [f"more{index}.png" for index in range(3)]
                write_text(path, json.dumps({"info": {"of": inputs}, **document(names)}))
            elif path.name == "report.json":
                write_text(path, json.dumps({"name": "run", "models": {}, "of": inputs}))
            elif name == "qad calibration":
                grids = {"target": "cpu", "weight_bits": 8, "float_layers": [inputs], "activations": []}
                write_text(path, json.dumps(grids))
            else:
                write_text(path, json.dumps({"of": name if self.equal and name == "qad" else inputs}))
        measured = {"metrics": METRICS, "seconds": 0.0, "steps": 2}
        labelled = {"images": 3, "labels": 6, "regions": 0, "skipped": 0, "teachers": ["teacher.safetensors"]}
        made = {"size_bytes": 1, "max_score_difference": 0.0, "max_box_difference_px": 0.0, "summary": "made"}
        return {
            **measured, **labelled, **made,
        } if name not in ("validate", "benchmark") else ([] if name == "validate" else {})  # fmt: skip


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder whose files keep their contents and lie elsewhere."""
    shutil.copytree(source, target)
    return target
