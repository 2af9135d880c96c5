"""Command lines are run in this process, in a folder of right and wrong files."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from compress import cli
from tests.helpers.command_line import RECIPE, Outcome, Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in a folder that holds a few right and wrong files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path("good.yaml").write_text(RECIPE)
    Path("typo.yaml").write_text(RECIPE.replace("epochs", "epoch"))
    Path("twice.yaml").write_text(RECIPE + "name: again\n")
    Path("broken.yaml").write_text("name: [")
    Path("empty.yaml").write_text("")
    Path("latin.yaml").write_bytes(b"name: \xe9\n")
    Path("text.onnx").write_text("not a model")
    Path("model.pt").write_text("not a model")
    Path("text.safetensors").write_text("not a checkpoint")
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("date.yaml").write_text("names: 2020-99-99\n")
    Path("deep.yaml").write_text(f"names: {'[' * 3000}")
    Path("folder_xml/a.xml").mkdir(parents=True)
    Path("folder.json").mkdir()
    Path("folder.onnx").mkdir()
    Path("folder_report/report.html").mkdir(parents=True)
    Path("folder_report/report.json").write_text('{"name": "a", "models": {}}')
    Path("empty_report").mkdir()
    Path("empty_report/report.json").write_text("{}")
    Path("images").mkdir()
    Path("void").mkdir()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save("images/a.png")
    Path("other").mkdir()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save("other/b.png")
    boxless = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}], "annotations": []}
    Path("boxless.json").write_text(json.dumps(boxless))
    Path("good.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [
                    {
                        "id": 1,
                        "image_id": 1,
                        "category_id": 1,
                        "bbox": [4, 4, 20, 20],
                        "area": 400,
                        "iscrowd": 0,
                    }
                ],
            }
        )
    )

    def run(line: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            cli.main(shlex.split(line))
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for the training pipeline and records what it was asked to do."""
    module = types.ModuleType("compress.run.pipeline")
    module.calls = []  # type: ignore[attr-defined]
    module.gate = "pass"  # type: ignore[attr-defined]

    def distill(recipe, **options):  # type: ignore[no-untyped-def]
        module.calls.append((recipe, options))  # type: ignore[attr-defined]
        return recipe.run_dir

    def run(recipe, **options):  # type: ignore[no-untyped-def]
        distill(recipe, **options)
        if not options["dry_run"]:
            recipe.run_dir.mkdir(parents=True)
            artifact = {"file": "student.onnx", "gate": module.gate}  # type: ignore[attr-defined]
            (recipe.run_dir / "report.json").write_text(json.dumps({"artifacts": [artifact]}))
        return recipe.run_dir

    module.distill, module.run = distill, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress.run.pipeline", module)
    monkeypatch.setattr("compress.run.pipeline", module, raising=False)
    return module
