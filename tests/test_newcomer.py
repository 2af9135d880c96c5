"""From a downloaded folder to boxes drawn on new photographs, by the commands that README shows, in their order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.config.recipe import load_recipe
from compress.run import estimate
from tests.helpers import raccoons, snippets

README = Path(__file__).parents[1] / "README.md"
QUICKER = {
    r"--budget 10min": "--budget 1s",
    r"compress run raccoon.yaml": "compress run raccoon.yaml --set train.steps=16 --set teacher.train.steps=16 "
    "--set train.eval_every=null --set deploy.benchmark.seconds=0.02 --set deploy.max_map_drop=100",
}
"""Minutes become seconds. The gate is open: of four pictures one may turn."""


def test_six_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "TIMED_STEPS", 1)
    raccoons.draw(tmp_path)
    block = next(snippet for snippet in snippets.snippets(README) if "compress init" in snippet.text)
    assert block.text.count("$ ") <= 6 and all(line.startswith("$ compress ") for line in block.text.splitlines())
    snippets.run([block], tmp_path, quicker=QUICKER, left_out=())
    shown = capsys.readouterr().out
    assert "20 images, 20 boxes" in shown and "everything fits together\nnext: compress run raccoon.yaml\n" in shown
    recipe = load_recipe(tmp_path / "raccoon.yaml")
    assert recipe.data.short == recipe.data.long == 96, "pictures of several shapes"
    run = recipe.run_dir
    assert {file.name for file in run.iterdir()} >= {"report.html", "student.onnx", "student.int8.onnx"}
    report = json.loads((run / "report.json").read_text())
    assert [row["file"] for row in report["artifacts"]][1:] == [
        "student.safetensors",
        "student.onnx",
        "student.int8.onnx",
    ]
    assert report["models"]["student"]["map"] > 10, "an animal in each picture, and nothing else"
    found = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    drawn = {file.stem for file in (tmp_path / "predictions" / "pictures").iterdir()}
    assert drawn == {"raccoon-21", "raccoon-22"} and len(json.dumps(found)) > 2
