"""Files of version 0.1 still load, and compute what they computed. How they were made: tests/samples/README.md."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress import cli
from compress.config.recipe import load_recipe
from compress.data.batch import ImageSize
from compress.detectors.checkpoints import load_detector
from deploy.core.card import card_from_file
from deploy.tensorrt.card import card_path, read_engine_card
from tests.helpers import samples

FAMILIES = ("gfl", "fcos", "retinanet", "faster_rcnn")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.unpack("v0_1", tmp_path_factory.mktemp("v0_1"))


def pixels(sample: Path) -> np.ndarray:
    """uint8 [3, 64, 64]."""
    return np.asarray(Image.open(sample / "picture.png").convert("RGB")).transpose(2, 0, 1)


def same(found: dict[str, Any], wanted: dict[str, Any], *, score: float, box: float) -> None:
    """The ten best, with tolerances: processors round differently."""
    assert len(wanted["scores"]) >= 5
    assert list(found["labels"])[:10] == wanted["labels"]
    np.testing.assert_allclose(np.asarray(found["scores"])[:10], wanted["scores"], atol=score)
    np.testing.assert_allclose(np.asarray(found["boxes"])[:10], wanted["boxes"], atol=box)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints(sample: Path, family: str) -> None:
    detector, record = load_detector(sample / f"{family}.safetensors")
    assert detector.family == family and record.class_names == ("disc", "square", "triangle")
    assert record.val_map == 1.5 and record.category_ids == (1, 2, 3)
    with torch.no_grad():
        prediction = detector(torch.from_numpy(pixels(sample).copy())[None])
    (found,) = detector.decode(prediction, [ImageSize((64, 64), (64, 64))])
    result = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels.tolist()}
    same(result, samples.recorded(sample)[f"{family}.safetensors"], score=1e-4, box=0.05)


@pytest.mark.parametrize(("name", "score"), [("student.onnx", 1e-4), ("student.int8.onnx", 0.02)])
def test_exported_files(sample: Path, name: str, score: float) -> None:
    from deploy.runtimes.onnx import OnnxRunner

    path = sample / "runs" / "sample" / name
    assert card_from_file(path).class_names == ["striped star", "checked disc", "striped disc"]
    result = OnnxRunner(path)(pixels(sample)[None])
    kept = slice(int(result.count[0]))
    found = {
        "boxes": result.boxes[0, kept],
        "scores": result.scores[0, kept],
        "labels": result.labels[0, kept].tolist(),
    }
    same(found, samples.recorded(sample)[f"runs/sample/{name}"], score=score, box=0.5)


def test_the_card_of_an_engine(sample: Path) -> None:
    engine = sample / "student.engine"
    assert card_path(engine).is_file()
    card = read_engine_card(engine)
    assert card.machine.gpu == "Tesla T4" and card.options.batches == (1, 8, 32) and card.model.class_names


def test_results_of_a_benchmark(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", "--compare", str(sample / "benchmark.json"), str(sample / "benchmark.json")])
    assert stop.value.code == 0 and "student.onnx" in capsys.readouterr().out


def test_the_recipe_of_a_run(sample: Path) -> None:
    recipe = load_recipe(sample / "runs" / "sample" / "recipe.yaml")
    assert recipe.name == "sample" and recipe.student.neck_channels == 32 and list(recipe.methods.enabled())


def test_the_report_of_a_run(sample: Path, tmp_path: Path) -> None:
    run = sample / "runs" / "sample"
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(run)])
    assert stop.value.code == 0
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "student.onnx" in html and "student.int8.onnx" in html


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of what was made from what is the same, to the last hash."""
    folder = samples.unpack("v0_1", tmp_path)
    monkeypatch.chdir(folder)
    before = digests(folder / "runs" / "sample")
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", "sample.yaml"])
    assert stop.value.code == 0
    after = digests(folder / "runs" / "sample")
    trained = {name for name in before if name.endswith((".safetensors", ".ckpt", ".csv", "manifest.json"))}
    assert len(trained) >= 4 and {name: after[name] for name in trained} == {name: before[name] for name in trained}


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is opened, found finished, and its weights are those of the student."""
    folder = samples.unpack("v0_1", tmp_path)
    monkeypatch.chdir(folder)
    run = folder / "runs" / "sample"
    wanted = load_detector(run / "student.safetensors")[0].state_dict()
    (run / "student.safetensors").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["student"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", "sample.yaml", "--resume"])
    assert stop.value.code == 0
    found = load_detector(run / "student.safetensors")[0].state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
