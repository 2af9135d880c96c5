"""The gate sees training: a difference between training and deployment makes it fail and is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compress.config.data import Data, Split
from compress.config.deploy import Deploy
from compress.config.model import Model
from compress.data import synthetic
from compress.data.loader import eval_loader
from compress.detectors.build import build_detector, model_of
from compress.detectors.checkpoints import ModelRecord, load_detector, load_teacher_checkpoint, save_detector
from compress.export.deployable import TorchRunner
from compress.export.onnx import canvases, torch_runner
from compress.manifest import STUDENT, Manifest, RunFolder
from compress.run import evaluation, steps
from compress.run.artifacts import Checks
from compress.run.data import validation_set
from compress.run.evaluation import EvaluationPlan, validate_files
from compress.run.report import failures
from compress.teachers.base import DetectorTeacher
from compress.teachers.check import measure
from compress.training.evaluate import evaluate
from deploy.core.card import ModelCard
from deploy.core.errors import UserError

LIMITS = {"short": 64, "long": 96}
NAME = "student.safetensors"
PIECES = [(128, 128, 64), (128, 96, 128), (80, 128, 100), (64, 96, 96)]
"""(height, width) that is cut out of a generated picture, and the side to which the longer one is made."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    """The end of a run's training: a student that finds something, what training measured of it, and pictures of
    several sizes and ratios, of which some are resized and some are not."""
    folder = tmp_path_factory.mktemp("gate")
    split = _pictures(folder, PIECES)
    data = Data(train=split, val=split, short=LIMITS["short"], long=LIMITS["long"])
    val, size = validation_set(split, data, None)
    run = RunFolder(folder / "run")
    run.path.mkdir()
    shutil.copy(Path(evaluation.__file__).parents[1] / "assets" / "quickstart_teacher.safetensors", run.weights())
    detector = load_detector(run.weights())[0].eval()
    loader = eval_loader(val, batch_size=4, workers=0, canvas=size)
    measured = evaluate(detector, loader, val, torch.device("cpu"))
    assert measured.map > 20, "the student finds something"
    manifest = Manifest(run.path, {})
    manifest.stage(STUDENT, {}, [], lambda: {"metrics": measured.to_dict(), "canvas": list(size)})
    images = [val.path(index) for index in range(len(val))]
    checks = Checks(images, size, (data.eval_short, data.long))
    return EvaluationPlan(run, manifest, Deploy(candidates=300), checks, split, val)


def _pictures(folder: Path, pieces: list[tuple[int, int, int]]) -> Split:
    synthetic.generate(folder / "data", train=1, val=len(pieces), size=128, classes=8, seed=3)
    document = json.loads((folder / "data" / "val.json").read_text())
    rows, annotations = [], []
    for row, (height, width, long) in zip(document["images"], pieces, strict=True):
        path = folder / "data" / "images" / row["file_name"]
        factor = long / max(height, width)
        size = (round(width * factor), round(height * factor))
        piece = Image.open(path).crop((0, 0, width, height)).resize(size, Image.Resampling.BICUBIC)
        piece.save(path)
        rows.append({**row, "width": size[0], "height": size[1]})
        for one in document["annotations"]:
            x, y, w, h = one["bbox"]
            w, h = min(x + w, width) - x, min(y + h, height) - y
            if one["image_id"] == row["id"] and min(w, h) > 8:
                box = [value * factor for value in (x, y, w, h)]
                annotations.append({**one, "bbox": box, "area": box[2] * box[3]})
    (folder / "val.json").write_text(json.dumps({**document, "images": rows, "annotations": annotations}))
    return Split(annotations=folder / "val.json", images=folder / "data" / "images")


def deployed(plan: EvaluationPlan) -> TorchRunner:
    checks = plan.checks
    return torch_runner(
        str(plan.folder.weights()), plan.settings, checks.input_size, resize_short_long=checks.resize_short_long
    )


def judged(plan: EvaluationPlan, runner: TorchRunner | None = None) -> dict[str, Any]:
    (row,) = validate_files(plan, {NAME: deployed(plan) if runner is None else runner})
    return row


def test_without_a_difference_the_gate_passes(plan: EvaluationPlan) -> None:
    row = judged(plan)
    assert (row["gate"], row["diagnosis"], row["pictures"]) == ("pass", None, [])
    assert row["training_drop"] == pytest.approx(0, abs=0.3) and row["map_drop"] == 0
    trained, found = plan.folder.result(STUDENT)["metrics"]["operating_point"], row["metrics"]["operating_point"]
    assert found["f1"] == pytest.approx(trained["f1"], abs=0.03) and 0.3 < found["f1"] <= 1


@pytest.mark.parametrize(
    ("pieces", "limits", "input_size", "expected"),
    [
        (PIECES, (64, 96), (64, 64), (64, 64)),
        (PIECES, (64, 96), (96, 128), (96, 128)),
        ([(86, 128, 149)], (80, 96), None, (64, 96)),
    ],
    ids=["shrunk", "larger", "a side rounded down to the canvas"],
)
def test_training_lays_pictures_on_the_canvas_of_the_file(
    plan: EvaluationPlan,
    tmp_path: Path,
    pieces: list[tuple[int, int, int]],
    limits: tuple[int, int],
    input_size: tuple[int, int] | None,
    expected: tuple[int, int],
) -> None:
    """The last: 100 x 149 pixels become 64.4 x 96, so 64 x 96, on whose canvas 64 / 100 is the smaller factor."""
    split = plan.split if pieces is PIECES else _pictures(tmp_path, pieces)
    val, size = validation_set(split, Data(train=split, val=split, short=limits[0], long=limits[1]), input_size)
    assert size == expected
    runner = torch_runner(str(plan.folder.weights()), plan.settings, size, resize_short_long=limits)
    detector = load_teacher_checkpoint("zoo:quickstart")[0].eval()
    assert steps.first_difference(detector, val, size, runner, steps.varied_pictures(val)) is None
    loader = eval_loader(val, batch_size=3, workers=0, canvas=size)
    assert {batch.images.shape[2:] for batch in loader} == {size}


def test_a_teacher_is_measured_on_the_same_canvas(plan: EvaluationPlan) -> None:
    detector, val, size = load_teacher_checkpoint("zoo:quickstart")[0].eval(), plan.val, (160, 160)
    loader = eval_loader(val, batch_size=4, workers=0, canvas=size)
    expected = evaluate(detector, loader, val, torch.device("cpu")).map
    names = val.categories
    teacher = DetectorTeacher(detector, file="a", sha256="b", class_names=names, device=torch.device("cpu"))
    assert measure(teacher, range(len(names)), val, canvas=size).map == pytest.approx(expected, abs=1e-3)
    assert measure(teacher, range(len(names)), val).map != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_other_families_take_the_same_steps(family: str, plan: EvaluationPlan, tmp_path: Path) -> None:
    """Untrained, with classes that are likely everywhere: many boxes, of which some have no area."""
    names, ids = plan.val.categories, plan.val.category_ids
    model = Model(detector=family, backbone="resnet18", weights="none", neck_channels=32, head_depth=1)
    detector = build_detector(model, len(names), 0).eval()
    torch.nn.init.constant_(
        next(p for name, p in detector.named_parameters() if name.endswith("cls_logits.bias")), -1.0
    )
    record = ModelRecord(model=model_of(detector), num_classes=len(names), class_names=names, category_ids=ids)
    save_detector(tmp_path / "a.safetensors", detector, metadata=record)
    size, limits = plan.checks.input_size, plan.checks.resize_short_long
    runner = torch_runner(str(tmp_path / "a.safetensors"), plan.settings, size, resize_short_long=limits)
    trace = steps.in_deployment(runner, plan.val, 1)
    assert len(trace.found.scores) > 10
    assert steps.first_difference(detector, plan.val, size, runner, [0, 1, 2]) is None


# --- six planted differences, each on either side --------------------------------------------------------


def with_filter(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.HAMMING))

    monkeypatch.setattr(where, resize)


def fitted(monkeypatch: pytest.MonkeyPatch, change: Callable[..., np.ndarray], **card: Any) -> None:
    """Change what the deployment lays on the canvas: its pixels, or the card that it goes by."""
    import deploy.runtimes.pictures as pictures

    right = pictures.fit_canvas

    def wrong(image: np.ndarray, given: ModelCard) -> tuple[np.ndarray, tuple[float, float]]:
        canvas, scale = right(image, given.model_copy(update=card))
        return change(canvas), scale

    monkeypatch.setattr(pictures, "fit_canvas", wrong)


def read(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the pixels that the deployment reads."""
    import deploy.validate.detect as detect

    right = detect.load_image
    monkeypatch.setattr(detect, "load_image", lambda path: np.ascontiguousarray(change(right(path))))


def other_mean(runner: TorchRunner) -> None:
    runner.module.detector.set_normalisation(mean=(0.0, 0.0, 0.0))


PLANTS = {
    "filter": (lambda m, _: with_filter(m, "deploy.core.canvas.resize"), "canvas", "another filter"),
    "BGR": (lambda m, _: read(m, lambda pixels: pixels[..., ::-1]), "pixels", "channels"),
    "mean": (lambda _, runner: other_mean(runner), "network", "scores of places"),
    "rotated": (lambda m, _: read(m, lambda pixels: np.rot90(pixels, 2)), "pixels", "turned"),
    "shift": (lambda m, _: fitted(m, lambda canvas: np.roll(canvas, 1, 2)), "canvas", "1 pixels to the right"),
    "half size": (lambda m, _: fitted(m, lambda canvas: canvas, short=32, long=48), "canvas", "resized to"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_difference_in_deployment_fails_the_gate_and_is_named(
    plant: str, plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, step, words = PLANTS[plant]
    runner = deployed(plan)
    put(monkeypatch, runner)
    row = judged(plan, runner)
    assert row["gate"] == "fail"
    assert f"first step that differs: {step}: " in row["diagnosis"] and words in row["diagnosis"]
    assert row["pictures"] and all((plan.split.images / picture["file"]).is_file() for picture in row["pictures"])
    why, pictures = failures([{**row, "file": NAME, "reason": row["diagnosis"], "differs_most": row["pictures"]}])
    assert step in why and f"({row['pictures'][0]['file']})" in pictures


def test_an_export_compares_its_canvases_with_those_of_training(
    plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, images = deployed(plan).card, list(plan.checks.images)
    assert len(canvases(images, card, 16)) == len(PIECES)
    with_filter(monkeypatch, "deploy.core.canvas.resize")
    with pytest.raises(UserError, match="another canvas than training"):
        canvases(images, card, 16)


def test_turned_pictures_of_another_size_end_the_validation_and_are_named(
    plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = deployed(plan)
    read(monkeypatch, np.rot90)
    with pytest.raises(UserError, match=r"step that differs from training: pixels: the picture is turned.*pixels"):
        judged(plan, runner)


def changed_images(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the pixels that training reads."""
    from compress.data.coco import CocoDetection

    right = CocoDetection.image
    monkeypatch.setattr(CocoDetection, "image", lambda self, index: change(right(self, index)).contiguous())


def shifted_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.data.batch as batch

    right = batch.pad_images
    monkeypatch.setattr(batch, "pad_images", lambda *args: right(*args).roll(1, 2))


TRAINING_PLANTS = {
    "filter": (lambda m: with_filter(m, "compress.data.transforms.resize_pixels"), "canvas", "another filter"),
    "BGR": (lambda m: changed_images(m, lambda image: image.flip(0)), "pixels", "channels"),
    "mean": (lambda _: None, "network", "scores of places"),
    "rotated": (lambda m: changed_images(m, lambda image: image.rot90(1, (1, 2))), "pixels", "turned"),
    "shift": (shifted_batches, "canvas", "0 pixels to the right and -1 down"),
    "half size": (lambda _: None, "canvas", "in training to"),
}


@pytest.mark.parametrize("plant", TRAINING_PLANTS)
def test_a_difference_in_training_is_named(plant: str, plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    put, step, words = TRAINING_PLANTS[plant]
    val, detector = plan.val, load_teacher_checkpoint("zoo:quickstart")[0].eval()
    if plant == "mean":
        detector.set_normalisation(mean=(0.0, 0.0, 0.0))
    if plant == "half size":
        val, _ = validation_set(plan.split, Data(train=plan.split, val=plan.split, short=32, long=48), None)
    put(monkeypatch)
    found = steps.first_difference(detector, val, plan.checks.input_size, deployed(plan), [0, 1, 2])
    assert found is not None and found.step == step and words in found.what


def test_suppression_that_differs_is_named(plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = deployed(plan)
    runner.module.nms_threshold = 0.2
    found = judged(plan, runner)["diagnosis"]
    assert "first step that differs: suppression: of " in found


# --- differences that a recipe says, which are judged by mAP alone ----------------------------------------


def recorded(plan: EvaluationPlan, tmp_path: Path, canvas: list[int] | None, more: float) -> EvaluationPlan:
    """The same run, of which training measured on another canvas, and more mAP."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(plan.folder.path, run.path)
    result = plan.folder.result(STUDENT)
    metrics = {**result["metrics"], "map": result["metrics"]["map"] + more}
    manifest = Manifest(run.path, {})
    manifest.stage(STUDENT, {"another": True}, [], lambda: {"metrics": metrics, "canvas": canvas})
    return replace(plan, folder=run, manifest=manifest)


def test_what_training_measured_on_another_canvas_is_named(plan: EvaluationPlan, tmp_path: Path) -> None:
    row = judged(recorded(plan, tmp_path, [128, 160], 1.0))
    assert row["gate"] == "fail" and row["training_drop"] == pytest.approx(1.0, abs=0.3)
    assert "canvas: training measured on one of 128x160" in row["diagnosis"]
    within = judged(recorded(plan, tmp_path / "within", [128, 160], 0.1))
    assert within["gate"] == "pass", "a canvas that costs little is the user's choice"


def test_weights_that_are_no_longer_those_of_the_training_are_named(plan: EvaluationPlan, tmp_path: Path) -> None:
    row = judged(recorded(plan, tmp_path, list(plan.checks.input_size), 1.0))
    assert row["gate"] == "fail" and "network: the checkpoint reaches" in row["diagnosis"]


def test_thresholds_that_cost_map_are_named(plan: EvaluationPlan) -> None:
    row = judged(replace(plan, settings=Deploy(score_threshold=0.6, candidates=300)))
    assert row["gate"] == "fail" and "suppression: deploy.score_threshold 0.6, " in row["diagnosis"]
