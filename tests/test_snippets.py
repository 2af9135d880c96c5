"""What README and the pages of docs/ show works as it stands there, in its order, on fewer images and steps.

README starts from nothing, and every page from what README leaves, or from pictures of the kind that it speaks of.
(Notebooks: test_notebooks.py. README's path from photographs: test_newcomer.py.)
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers import blood_cells, snippets, tiny_recipe

pytestmark = pytest.mark.usefixtures("few_rounds")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if any(snippet.language in ("console", "python") for snippet in snippets.snippets(page))
]
LIGHT = ("benchmarking", "data", "extending", "predict", "serving", "teachers")
"""The other pages train, quantize and export more: they run in `make test-exhaustive`."""

QUICKER = {
    r"--train 96 --val 32 --size 96": "--train 16 --val 4 --size 64",
    r"(short|long): 96": r"\1: 64",
    r"steps: 60\b": "steps: 2",
    r"batch_size: 8": "batch_size: 4",
    r"warmup_steps: 10": "warmup_steps: 1",
    r"batch_sizes: \[1, 8\], seconds: 1\b": "batch_sizes: [1], seconds: 0.02",
    r"--seconds 1\b": "--seconds 0.1 --rounds 2 --warm-up 0.1",
    r"--tolerance 2\b": "--tolerance 900",  # two rounds prove nothing
    r"--provider cuda,cpu": "--provider cpu",  # no GPU
    r"--train (100|128) --val 1 ": "--train 12 --val 1 ",
    r"--train 1 --val (200|32) ": "--train 1 --val 6 ",
    r"steps: (300|400|600)": "steps: 2",
    r"warmup_steps: 50": "warmup_steps: 1",
    r"short: 168": "short: 48",
    r"long: 224": "long: 64",
    r"batch_sizes: \[1, 8\], seconds: 3\b": "batch_sizes: [1], seconds: 0.02",
    r"--calibration-images 48": "--calibration-images 8",
    r"--budget 8h": "--budget 1s",
    r"compress run (own|recipes/bccd).yaml": r"compress run \1.yaml --set train.steps=2 --set teacher.train.steps=2 "
    "--set train.schedule.warmup_steps=1 --set teacher.train.schedule.warmup_steps=1 --set deploy.max_map_drop=100 "
    "--set train.batch_size=4 --set teacher.train.batch_size=4 --set deploy.benchmark.seconds=0.02 "
    "--set data.short=48 --set data.long=64 --set deploy.input_size=null",
}
NOT_HERE = {
    "git clone": "the network",
    "docker ": "a Docker daemon",
    "python3 -m venv": "the tests run in an environment that is there",
    "pip install": "the same",
    "compress build ": "TensorRT; tests/deploy/tensorrt builds engines",
    "compress refit ": "an engine, and a GPU",
    "compress validate student.engine ": "the same",
    "compress validate student.fp16.engine ": "the same",
    "compress validate runs/first/student.onnx runs/first/student.engine ": "the same",
    "compress benchmark student.fp16.engine ": "the same",
    "from deploy.runtimes.tensorrt import ": "the same",
    "compress prune runs/first/teacher.safetensors --latency-ms ": "minutes; tests/compress/prune/test_latency.py",
}
"""Beginnings of commands and programs that are not run, and why."""
PICTURES = {"coming_from": blood_cells.draw_yolo, "tutorial": blood_cells.draw_voc}
"""Pictures that a page begins with."""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, few_rounds: None) -> Path:
    """The folder of someone who has followed README."""
    folder = tmp_path_factory.mktemp("followed")
    (folder / "recipes").mkdir()
    tiny_recipe.recipe_file(folder / "tiny").rename(folder / "recipes" / "quickstart.yaml")  # minutes become seconds
    for name in ("bccd.yaml", "coco"):
        (folder / "recipes" / name).symlink_to(ROOT / "recipes" / name)
    shown = [snippet for snippet in snippets.snippets(README) if "compress init" not in snippet.text]
    assert len(shown) >= 3  # the other is test_newcomer.py's
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        snippets.run(shown, folder, quicker=QUICKER, left_out=NOT_HERE)
    return folder


def test_readme(followed: Path) -> None:
    assert {file.name for file in followed.iterdir()} >= {"candidate.onnx", "predictions", "found.png"}
    assert (followed / "runs" / "first" / "report.html").is_file()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[] if page.stem in LIGHT else pytest.mark.exhaustive) for page in PAGES],
)
def test_page(page: Path, followed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(followed, folder, symlinks=True)
    PICTURES.get(page.stem, lambda folder: None)(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    snippets.run(snippets.snippets(page), folder, quicker=QUICKER, left_out=NOT_HERE)


def test_every_light_page_is_there() -> None:
    assert {*LIGHT} <= {page.stem for page in PAGES}


def test_every_substitution_is_needed() -> None:
    text = "\n".join(snippet.text for page in (README, *PAGES) for snippet in snippets.snippets(page))
    assert [pattern for pattern in QUICKER if not re.search(pattern, text)] == []


def test_everything_left_out_is_shown() -> None:
    shown = [snippet for page in (README, *PAGES) for snippet in snippets.snippets(page)]
    lines = [line for snippet in shown if snippet.language == "console" for line, _ in snippets.commands(snippet.text)]
    lines += [snippet.text for snippet in shown if snippet.language == "python"]
    assert [beginning for beginning in NOT_HERE if not any(line.startswith(beginning) for line in lines)] == []
