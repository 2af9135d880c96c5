"""The notebooks run as they stand, on fewer pictures and steps, and show what they printed without saying where."""

from __future__ import annotations

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIGHT = ("distil_your_own_detector",)
"""The others run in `make test-exhaustive`."""

QUICKER = {
    r"--train 400 --val 100": "--train 8 --val 4",
    r"--train 64 --val 100": "--train 4 --val 4",
    r"--train 24 --val 60": "--train 2 --val 2",
    r"SCENES, FRAMES = 24, 12": "SCENES, FRAMES = 2, 8",
    r'"steps": \d+': '"steps": 2',
    r'"warmup_steps": \d+': '"warmup_steps": 1',
    r"\"batch_size\": 8": '"batch_size": 4',
    r"max_map_drop=0.5": "max_map_drop=99",
    r"--max-map-drop 0.5": "--max-map-drop 99",
    r"--seconds 2 --warm-up 2": "--seconds 0.1 --rounds 2 --warm-up 0.1",
    r"!compress check-model .*": "",  # a minute
}


@pytest.fixture(scope="module")
def runner() -> Any:
    spec = spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in LIGHT else pytest.mark.exhaustive)
        for path in NOTEBOOKS
    ],
)
def test_every_cell_runs(path: Path, tmp_path: Path, runner: Any) -> None:
    done = runner.run(path, tmp_path, QUICKER)
    assert all(cell["execution_count"] for cell in done["cells"] if cell["cell_type"] == "code")


def test_a_cell_that_fails_is_seen(tmp_path: Path, runner: Any) -> None:
    for source in (["raise KeyError"], ["!compress export missing.safetensors"]):
        notebook = tmp_path / "failing.ipynb"
        notebook.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source}]}))
        with pytest.raises((KeyError, RuntimeError)):
            runner.run(notebook, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_name_no_machine(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    said = json.dumps([cell["outputs"] for cell in code])
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|opt)/", said)
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


def test_every_substitution_is_needed() -> None:
    text = "".join("".join(cell["source"]) for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"])
    assert [pattern for pattern in QUICKER if not re.search(pattern, text)] == []
