"""The whole path on a run of seconds: what it leaves, what it says, what it repeats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from compress.data.coco import CocoDetection
from compress.data.loader import eval_loader
from compress.detectors.base import freeze
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.run import pipeline, plans
from compress.run.data import canvas, open_data, padding, splits
from compress.training.evaluate import evaluate
from deploy.core.card import card_from_file
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.coco import evaluate_coco, read_annotations
from deploy.validate.kept import Kept
from tests.helpers import tiny_recipe
from tests.helpers.cheap_exports import rounds
from tests.helpers.training_runs import fabric


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(tiny_recipe.recipe(tmp_path_factory.mktemp("run"), "baseline=true"))


def test_a_run_leaves_the_promised_files(run_dir: Path) -> None:
    promised = ["recipe.yaml", "manifest.json", "student.onnx", "benchmark.json", "report.json", "report.html"]
    for arm in ("teacher", "baseline", "student"):
        promised += [f"{arm}.safetensors", f"{arm}/metrics.csv", f"{arm}/checkpoints/last.ckpt"]
    assert [name for name in promised if not (run_dir / name).is_file()] == []
    assert not list(run_dir.glob(".*")), "temporary files are left"


def test_the_report_has_measured_figures_for_everything(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    stages = json.loads((run_dir / "manifest.json").read_text())["stages"]
    for arm in ("teacher", "baseline", "student"):
        figures = report["models"][arm]
        assert figures["map"] == stages["teacher_check" if arm == "teacher" else arm]["result"]["metrics"]["map"]
        assert figures["params_m"] > 0.1 and figures["gflops"] > 0.005
    torch_file, onnx_file = report["artifacts"][1:]
    measured = stages["student"]["result"]
    assert measured["canvas"] == [64, 64]
    for file in (torch_file, onnx_file):
        assert file["training_drop"] == measured["metrics"]["map"] - file["map"] and file["differs_most"] == []
        assert file["analysis"]["errors"]["missed"]["count"] >= 0 and file["analysis"]["slices"]
    assert (torch_file["file"], onnx_file["file"]) == ("student.safetensors", "student.onnx")
    assert onnx_file["gate"] == "pass" and abs(onnx_file["map_drop"]) <= 0.1
    assert onnx_file["agreement"] == 1 or onnx_file["agreement"] is None
    for artifact in report["artifacts"]:
        assert 0 < artifact["latency_ms"]["p50"] <= artifact["latency_ms"]["p99"]
        assert artifact["throughput_ips"] > 0


def test_the_report_shows_where_the_teacher_is_unsure(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    pictures = {picture["image"]: picture for picture in report["pictures"]}
    assert len({entry["image"] for entry in report["uncertainty"]}) == 4
    for entry in report["uncertainty"]:
        found, kept = entry["teacher"], pictures[entry["image"]]["teacher"]
        assert len(entry["rows"]) == 64 // 8 and [box["label"] for box in found] == [box["label"] for box in kept]
        assert [box["score"] for box in found] == pytest.approx([box["score"] for box in kept], abs=0.002)


def test_a_run_keeps_what_its_models_and_files_found(run_dir: Path) -> None:
    report, kept = json.loads((run_dir / "report.json").read_text()), Kept(run_dir / "evaluation")
    for name in ("teacher", "baseline", "student"):
        found = evaluate_coco(kept.truth, kept.table(name))
        assert found.map == pytest.approx(report["models"][name]["map"], abs=1e-3), "as training measured"
    for row in report["artifacts"][1:]:
        assert evaluate_coco(kept.truth, kept.table(row["file"])).map == pytest.approx(row["map"], abs=1e-9)
        assert set(row["recall"]) == set(report["classes"])
    pairs = {(row["of"], row["against"]): row for row in report["comparisons"]}
    assert {("student", "baseline"), ("teacher", "baseline"), ("student.onnx", "student.safetensors")} <= set(pairs)
    assert all(row["low"] <= row["points"] <= row["high"] for row in pairs.values())
    assert "Monte Carlo dropout on the teacher" in (run_dir / "report.html").read_text()


def test_the_card_says_where_the_file_comes_from(run_dir: Path) -> None:
    card = card_from_file(run_dir / "student.onnx")
    assert card.checkpoint_sha256 == sha256_of(run_dir / "student.safetensors")
    assert card.input_size == (64, 64) and len(card.class_names) == 3
    for name in ("teacher", "student"):
        record = load_teacher_checkpoint(str(run_dir / f"{name}.safetensors"))[1]
        assert record.resize_short_long == (64, 64) == (card.short, card.long)
    student = json.loads((run_dir / "report.json").read_text())["models"]["student"]
    assert card.val_map == student["map"]
    point = None if card.operating_point is None else card.operating_point.model_dump(mode="json")
    assert point == student.get("operating_point")


def test_bare_onnxruntime_is_enough(run_dir: Path) -> None:
    session = onnxruntime.InferenceSession(run_dir / "student.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    boxes, scores, labels, count = session.run(None, {"images": images})
    found = OnnxRunner(run_dir / "student.onnx")(images)
    np.testing.assert_array_equal(boxes, found.boxes)
    assert scores.shape == labels.shape == (3, 100) and count.dtype == np.int32


def test_a_second_run_repeats_nothing(run_dir: Path) -> None:
    recipe = tiny_recipe.recipe(run_dir.parents[1], "baseline=true")
    before = json.loads((run_dir / "manifest.json").read_text())
    pipeline.run(recipe)
    assert json.loads((run_dir / "manifest.json").read_text()) == before


def test_evaluation_equals_pycocotools_on_the_same_detections(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe.recipe(run_dir.parents[1])
    data = open_data(plans.data_plan(recipe), fabric())
    teacher = freeze(load_teacher_checkpoint(str(run_dir / "teacher.safetensors"))[0])
    loader = eval_loader(data.val, batch_size=3, workers=0)
    fast = evaluate(teacher, loader, data.val, torch.device("cpu"))
    monkeypatch.setattr(
        "compress.training.evaluate.evaluate_coco", lambda *a, **k: evaluate_coco(*a, **k, backend="pycocotools")
    )
    reference = evaluate(teacher, loader, data.val, torch.device("cpu"))
    found = [(metrics.map, metrics.map50, metrics.map75) for metrics in (fast, reference)]
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_the_canvas_holds_every_image(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe.recipe(run_dir.parents[1])
    val = open_data(plans.data_plan(recipe), fabric()).val
    assert canvas(val, recipe.data) == (64, 64)
    monkeypatch.setattr(CocoDetection, "sizes", [(480, 640), (640, 480)])
    assert canvas(val, recipe.data) == (64, 64)
    wide = recipe.model_copy(update={"data": recipe.data.model_copy(update={"short": 48, "long": 64})})
    assert canvas(val, wide.data) == (64, 64)
    monkeypatch.setattr(CocoDetection, "sizes", [(480, 640)])
    assert canvas(val, wide.data) == (64, 64)  # 48 rounds up to 64
    assert canvas(val, wide.data.model_copy(update={"short": 32})) == (32, 64)
    assert padding(val, wide.data, (64, 128)) == 1 - 48 * 64 / (64 * 128)
    monkeypatch.setattr(CocoDetection, "sizes", [(480, 640), (640, 480), (64, 64)])
    # resized: 48 x 64, 64 x 48, 48 x 48
    assert padding(val, wide.data, (64, 64)) == pytest.approx(1 - (2 * 48 * 64 + 48 * 48) / (3 * 64 * 64))


def test_dry_run_takes_one_step_and_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    pipeline.distill(recipe, dry_run=True)
    assert "1 step on made-up images; everything fits together" in capsys.readouterr().out
    assert not recipe.runs.exists()


def test_a_dry_run_looks_at_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would stop the run after a while stops it now; without data it is rehearsed only when that is meant."""
    drawn = plans.data_plan(tiny_recipe.recipe(tmp_path))
    train, val = splits(drawn.data, drawn.runs)

    def rehearse(*settings: str, without_data: bool = False) -> str:
        own = [
            "data.synthetic=null",
            f"data.train={{annotations: {train.annotations}, images: {train.images}}}",
            f"data.val={{annotations: {val.annotations}, images: {val.images}}}",
        ]
        recipe = tiny_recipe.recipe(tmp_path, *own, *settings)
        pipeline.distill(recipe, dry_run=True, without_data=without_data)
        return capsys.readouterr().out

    images = len(read_annotations(train.annotations)["images"])
    assert "validation images are also training images" not in rehearse()
    same = rehearse(f"data.val={{annotations: {train.annotations}, images: {train.images}}}")
    assert f"note: {images} of {images} validation images are also training images" in same
    shown = rehearse("train.steps=null", "train.epochs=6", "train.schedule.warmup_steps=1")
    assert f"data: {images} training images, " in shown and "3 classes; the first 8 of both could be read" in shown
    assert f"of 4 images, 6.0 epochs of {images} images" in shown
    gone = tmp_path / "gone.json"
    with pytest.raises(UserError) as stop:
        rehearse(f"data.train.annotations={gone}", f"data.val.images={tmp_path / 'none'}")
    assert str(stop.value).splitlines() == [
        f"data.train.annotations: {gone}: no such file",
        f"data.val.images: {tmp_path / 'none'}: no such folder; to rehearse without it, add --without-data",
    ]
    other_gone = f"data.val.annotations={gone}"
    assert "classes stand in" not in rehearse(f"data.train.annotations={gone}", without_data=True), "val has some"
    assert "COCO's 80 classes stand in" in rehearse(f"data.train.annotations={gone}", other_gone, without_data=True)
    with pytest.raises(UserError, match="warmup_steps 500 leaves nothing of the run's"):
        rehearse("train.steps=null", "train.epochs=6", "train.schedule.warmup_steps=500")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="the file is missing"):
        rehearse(f"data.val.images={tmp_path / 'other'}")
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.exhaustive
@rounds(4)
def test_portrait_photographs_go_through(tmp_path: Path) -> None:
    """Images of several sizes and ratios, none of them the canvas; validation in the original pixels."""
    recipe = tiny_recipe.recipe(tmp_path)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (w, h) in enumerate([(90, 60), (60, 90), (64, 64), (200, 40), (120, 90), (33, 70)], start=1):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": w, "height": h})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 7, "bbox": [2, 3, 20, 30], "area": 600, "iscrowd": 0}
        )
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "thing"}]})
    )
    split = {"annotations": str(tmp_path / "a.json"), "images": str(tmp_path)}
    text = (tmp_path / "tiny.yaml").read_text()
    start, end = text.index("  synthetic"), text.index("  short")
    (tmp_path / "tiny.yaml").write_text(f"{text[:start]}  train: {split}\n  val: {split}\n{text[end:]}")
    from compress.config.recipe import load_recipe

    mixed = load_recipe(tmp_path / "tiny.yaml", ["name=mixed", "train.steps=3"])
    assert mixed.runs == recipe.runs
    report = json.loads((pipeline.run(mixed) / "report.json").read_text())
    assert report["artifacts"][-1]["gate"] == "pass"


def test_several_training_sets_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People's labels beside a teacher's: joined by names of classes, trained on together, and joined anew when one of
    them changes."""
    plan = plans.data_plan(tiny_recipe.recipe(tmp_path))
    train, val = splits(plan.data, plan.runs)
    document = read_annotations(train.annotations)
    half = len(document["images"]) // 2
    parts = []
    for number, rows in enumerate((document["images"][:half], document["images"][half:])):
        ids = {row["id"] for row in rows}
        boxes = [row for row in document["annotations"] if row["image_id"] in ids]
        parts.append(tmp_path / f"part{number}.json")
        parts[-1].write_text(json.dumps({**document, "images": rows, "annotations": boxes}))
    sets = ", ".join(f"{{annotations: {part}, images: {train.images}}}" for part in parts)
    recipe = tiny_recipe.recipe(
        tmp_path, "data.synthetic=null", f"data.train=[{sets}]",
        f"data.val={{annotations: {val.annotations}, images: {val.images}}}", "teacher=null", "methods={}",
    )  # fmt: skip
    pipeline.distill(recipe, dry_run=True, distillation=False)
    assert f"data: {2 * half} training images, " in capsys.readouterr().out
    pipeline.distill(recipe, distillation=False)
    weights = (recipe.run_dir / "student.safetensors").read_bytes()
    joined = next((recipe.runs / "data").glob("joined-*.json"))
    assert len(read_annotations(joined)["annotations"]) == len(document["annotations"])
    parts[1].write_text(json.dumps({**json.loads(parts[1].read_text()), "annotations": []}))
    capsys.readouterr()
    pipeline.distill(recipe, distillation=False)
    assert (recipe.run_dir / "student.safetensors").read_bytes() != weights
    parts[1].unlink()
    with pytest.raises(UserError, match=r"data\.train\.1\.annotations: .*part1\.json: no such file"):
        pipeline.distill(recipe, dry_run=True, distillation=False)
