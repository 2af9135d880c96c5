"""A training that Ray Train starts: the weights of the same processes without it, and mistakes in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import tiny_recipe
from tests.helpers.training_runs import assert_same

pytest.importorskip("ray")
pytestmark = pytest.mark.exhaustive
ON_RAY = ["--engine", "ray", "--num-cpus", "0.5"]


def compress(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    recipe = tiny_recipe.recipe_file(folder)
    command = [sys.executable, "-m", "compress", "train", str(recipe), "--devices", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_weights_of_the_same_processes(tmp_path: Path) -> None:
    found = []
    for name, more in (("here", []), ("ray", ON_RAY)):
        done = compress(tmp_path / name, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 processes on cpu" in done.stdout
        found.append(load_file(tmp_path / name / "runs" / "tiny" / "student.safetensors"))
    assert_same(*found)


def test_a_mistake_of_a_process_is_one_line(tmp_path: Path) -> None:
    done = compress(tmp_path, *ON_RAY, "--set", "train.batch_size=100")
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: student: batch_size 100 is more than the 24 training images"]
