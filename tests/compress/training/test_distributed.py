"""Two gloo processes and one process with the same global batch: the same losses, the same weights.

BatchNorm runs on its statistics here (norm_eval), as in the published recipes; in training mode every process would
use the statistics of its own share, which is another computation.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from compress.data.synthetic import class_names
from compress.detectors.backbones import build_backbone
from compress.run import pipeline
from tests.helpers import tiny_recipe, tiny_vision
from tests.helpers.random_teacher import teacher

PYTHON = [sys.executable, "-m", "compress"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "compress"]


TERMS = ("loss", "bckd", "fgd", "cwd", "mgd", "vfm")


def compress(launcher: list[str], *arguments: str) -> str:
    """Run a command on two processes; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [*launcher, *arguments, "--devices", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def overrides(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def start_from(weights: Path) -> list[str]:
    """Settings with which one process and two compute the same; beside `weights` lies a vision model."""
    settings = ["train.steps=10", "train.ema=null", f"methods.vfm={{model: '{weights.parent / 'vision'}'}}"]
    for model in ("student", "teacher.model"):
        settings += [f"{model}.weights={weights}", f"{model}.frozen_stages=-1", f"{model}.norm_eval=true"]
    return settings


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process, in this one; beside it the weights that it started from."""
    folder = tmp_path_factory.mktemp("one")
    torch.manual_seed(0)
    torch.save(build_backbone("nano", weights="none").state_dict(), folder / "nano.pth")
    tiny_vision.saved(folder / "vision")
    return pipeline.distill(tiny_recipe.recipe(folder, *start_from(folder / "nano.pth")))


def losses(run: Path) -> list[dict[str, float]]:
    with open(run / "student" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return [{k: float(v) for k, v in row.items() if k.startswith(TERMS)} for row in rows]


@pytest.mark.parametrize(
    "launcher", [PYTHON, pytest.param(TORCHRUN, marks=pytest.mark.exhaustive)], ids=["compress", "torchrun"]
)
def test_two_processes_equal_one(one: Path, tmp_path: Path, launcher: list[str]) -> None:
    settings = start_from(one.parents[1] / "nano.pth")
    compress(launcher, "distill", str(tiny_recipe.recipe_file(tmp_path)), *overrides(settings))
    assert_equal(one, tmp_path / "runs" / "tiny")


@pytest.mark.exhaustive
def test_two_processes_equal_one_with_a_cache_of_the_teacher(one: Path, tmp_path: Path) -> None:
    """Both fill one; each entry of theirs is there once, with the same bits."""
    settings = [*start_from(one.parents[1] / "nano.pth"), "train.views=2", "data.photometric=true"]
    settings = [setting for setting in settings if not setting.startswith("teacher.")]
    settings += ["teacher.model=null", "teacher.train=null", f"teacher.checkpoint={one / 'teacher.safetensors'}"]
    here, there = (f"teacher.cache={tmp_path / name}" for name in ("one", "two"))
    alone = pipeline.distill(tiny_recipe.recipe(tmp_path / "alone", *settings, here))
    shown = compress(PYTHON, "distill", str(tiny_recipe.recipe_file(tmp_path)), *overrides([*settings, there]))
    assert shown.count(" 0 read, 40 made by the teacher") == 1
    assert_equal(alone, tmp_path / "runs" / "tiny")
    kept = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("one", "two")
    ]
    assert len(kept[0]) == 40 and kept[0] == kept[1]


@pytest.mark.parametrize("student", ["StillDFine", pytest.param("StillRfDetr", marks=pytest.mark.exhaustive)])
def test_two_processes_equal_one_with_a_student_of_queries(one: Path, tmp_path: Path, student: str) -> None:
    """D-FINE, with methods on maps and UET around two: all terms are there and the same. Left out is what is of a
    process by definition: PKD's statistics, what MGD masks and UET drops, noisy labels, `loss_ddf`, BatchNorm in
    training. Three steps: later, queries that cost alike are matched otherwise."""
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    methods = "{fgd: {}, cwd: {}, mgd: {masked: 0}, uet: {of: [fgd, cwd], p_start: 0, p_step: 0}}"
    settings = [
        "teacher={}", f"teacher.checkpoint={one / 'teacher.safetensors'}", f"methods={methods}",
        f"student={{detector: 'tests.helpers.tiny_detr:{student}'}}", "train.steps=3", "train.ema=null",
        "train.optimizer.lr=0.001",
    ]  # fmt: skip
    alone = pipeline.distill(tiny_recipe.recipe(tmp_path / "alone", *settings))
    compress(PYTHON, "distill", str(tiny_recipe.recipe_file(tmp_path)), *overrides(settings))
    assert_equal(alone, tmp_path / "runs" / "tiny")
    terms = {key.split("_")[0] for row in losses(alone) for key, value in row.items() if value > 0}
    assert terms >= {"loss", "fgd", "cwd", "mgd"}


def assert_equal(one: Path, two: Path) -> None:
    """Losses and weights of two runs, up to the order of sums."""
    assert len(losses(one)) == 2  # the first step and the last
    assert all(value > 0 for row in losses(one) for key, value in row.items() if key == "vfm")
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), key
    weights, others = (load_file(run / "student.safetensors") for run in (one, two))
    for key, value in weights.items():
        torch.testing.assert_close(value, others[key], rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_label_as_one_does(tmp_path: Path) -> None:
    """The images without labels and a folder, with measured thresholds: the same bytes."""
    a = teacher(tmp_path / "a.safetensors", tuple(class_names(3)), 1)
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (56, 64, 3), dtype=np.uint8)).save(tmp_path / "more" / f"{index}.png")
    settings = [
        "teacher=null", "methods={}", "labels={fraction: 0.25}", "train.steps=1", "train.schedule.warmup_steps=0",
        f"pseudo_labels={{teachers: [{{checkpoint: {a}}}], unlabeled: [{tmp_path / 'more'}], tau: 0.6, "
        "tau_ignore: 0.5, thresholds: best_f1, batch_size: 2, fine_tune: null}",
    ]  # fmt: skip
    one = pipeline.distill(tiny_recipe.recipe(tmp_path, *settings, "name=one")) / "pseudo"
    shown = compress(PYTHON, "distill", str(tiny_recipe.recipe_file(tmp_path)), *overrides([*settings, "name=two"]))
    assert "2 processes on" in shown
    two = tmp_path / "runs" / "two" / "pseudo"
    assert sorted(file.name for file in two.iterdir()) == ["folder-1.json", "training-images.json"]
    for file in two.iterdir():
        assert file.read_bytes() == (one / file.name).read_bytes()
        assert b'"score"' in file.read_bytes()


@pytest.mark.exhaustive
def test_a_dry_run_with_two_processes_leaves_nothing(tmp_path: Path) -> None:
    shown = compress(PYTHON, "distill", str(tiny_recipe.recipe_file(tmp_path)), "--dry-run")
    assert "everything fits together" in shown and not (tmp_path / "runs").exists()


@pytest.mark.exhaustive
def test_methods_with_parameters_of_their_own_train_on_two_processes(tmp_path: Path) -> None:
    """Adapters and context blocks, masks that differ between the processes, one method that ends early, BatchNorm in
    the head; started by torchrun."""
    methods = (
        "methods={bckd: {weight: auto}, fgd: {adapter: always, weight: auto}, mgd: {stop_epoch: 1}, "
        "uet: {of: [fgd, bckd]}}"
    )
    settings = overrides([methods, "train.steps=10", "student.head_norm=batch", "student.head_depth=1"])
    compress(TORCHRUN, "distill", str(tiny_recipe.recipe_file(tmp_path)), *settings)
    with open(tmp_path / "runs" / "tiny" / "student" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [row["mgd"] != "" for row in rows] == [True, False]  # steps 1 and 10; an epoch has 6
    assert all(float(row["fgd_fg"]) > 0 and float(row["grad_fgd"]) > 0 for row in rows)
