"""The folder of a run: one at a time, and what is finished stays until what replaces it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from compress.config.recipe import Recipe, load_recipe, recipe_sha256
from compress.detectors.checkpoints import load_detector
from compress.manifest import RunFolder
from compress.run import pipeline, trainings
from compress.training import loop
from compress.training.checkpoint import Checkpoints
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.lock import locked
from tests.helpers import tiny_recipe
from tests.helpers.full_disk import no_room
from tests.helpers.training_runs import assert_same

SHORT = ("train.steps=4", "train.checkpoint_every=2")
NEW = ("seed=5",)


def train(recipe: Recipe, *, resume: bool = False) -> None:
    pipeline.distill(recipe, distillation=False, resume=resume)


def recipe(folder: Path, *overrides: str) -> Recipe:
    return tiny_recipe.recipe(folder, *SHORT, *overrides)


def digests(folder: Path) -> dict[str, str]:
    """All files by name but those of a training that is under way."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256_of(path) for name, path in sorted(names.items()) if not name.startswith("student.new/")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a finished training and files made of it, and what the new recipe makes without interruption."""
    base = tmp_path_factory.mktemp("folder")
    train(recipe(base / "old"))
    folder = RunFolder(base / "old" / "runs" / "tiny")
    for path in (folder.onnx(), folder.report):
        path.write_text("made of it")
    whole = recipe(base / "whole", *NEW)
    train(whole)
    return base / "old", whole.run_dir


@pytest.fixture
def finished(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def whole(trained: tuple[Path, Path]) -> Path:
    return trained[1]


def interrupted_at(monkeypatch: pytest.MonkeyPatch, place: object, name: str, call: int) -> None:
    """The `call`-th call of a function ends the program before it begins."""
    original: Callable[..., object] = getattr(place, name)
    calls = 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, counted)


def test_a_new_training_that_fails_leaves_the_finished_one(tmp_path: Path, finished: Path) -> None:
    before = digests(finished)
    with pytest.raises(UserError) as failed:
        train(recipe(tmp_path, *NEW, "train.optimizer.lr=1e30", "train.clip_norm=null"))
    said = str(failed.value)
    assert f"{finished}/student.new/nonfinite.pt" in said
    assert said.endswith(f"the finished {finished}/student.safetensors is as it was")
    assert digests(finished) == before
    train(recipe(tmp_path))  # what is there is still what this recipe makes
    after = digests(finished)
    assert {name for name in before if after[name] != before[name]} == {"recipe.yaml"}  # of another folder


# Before the second checkpoint; after the last one; between weights and the rest; between the rest and the record.
MOMENTS = {
    "checkpoint": (Checkpoints, "save", 2),
    "weights": (trainings, "save_detector", 1),
    "folder": (trainings, "publish", 1),
    "recipe": (pipeline, "write_recipe", 2),
}


def test_a_recipe_that_is_done_names_the_interrupted_training_of_another(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, before = recipe(tmp_path), digests(finished)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, *MOMENTS["checkpoint"])
        train(recipe(tmp_path, *NEW))
    capsys.readouterr()
    train(old, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert f"note: {finished}/student.new holds an interrupted training with other settings" in said
    after = digests(finished)
    assert {name for name in before if after[name] != before[name]} <= {"recipe.yaml"}  # of another folder
    assert (finished / "student.new").is_dir()
    with pytest.raises(UserError, match=r"add --resume to continue it with its recipe, or remove \S+student\.new"):
        train(old)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_new_training_that_is_interrupted_loses_nothing_and_is_continued(
    tmp_path: Path, finished: Path, whole: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, before = recipe(tmp_path), digests(finished)
    new = recipe(tmp_path, *NEW)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, *MOMENTS[moment])
        train(new)
    if moment in ("checkpoint", "weights"):
        assert digests(finished) == before
        assert load_recipe(finished / "recipe.yaml").seed == old.seed
    if moment != "recipe":
        with pytest.raises(
            UserError, match=r"\(student\.new is unfinished\); add --resume .*remove \S+student\.new to"
        ):
            train(new)
    load_file(finished / "student.safetensors")
    (finished / "student.old").mkdir()  # as a kill leaves it that comes after the replacing
    with monkeypatch.context() as patch:
        if moment != "checkpoint":  # all steps are done
            patch.setattr(loop.Learner, "forward", None)
        train(new, resume=True)
    assert load_recipe(finished / "recipe.yaml") == new
    assert load_detector(finished / "student.safetensors")[1].recipe_sha256 == recipe_sha256(new)
    assert_same(*(load_file(folder / "student.safetensors") for folder in (whole, finished)))
    names = {path.name for path in finished.iterdir()} - {"student.onnx", "report.json"}
    assert names == {path.name for path in whole.iterdir()}


def test_two_runs_in_one_folder_are_told_apart(tmp_path: Path, finished: Path) -> None:
    before = digests(finished)
    with locked(finished / "run.lock", "held by a test"), pytest.raises(UserError, match="tiny: is in use by"):
        train(recipe(tmp_path, *NEW))
    assert digests(finished) == before


def test_an_export_into_the_folder_of_a_run_under_way_is_refused(tmp_path: Path, finished: Path) -> None:
    import compress

    with locked(finished / "run.lock", "held by a test"), pytest.raises(UserError, match="tiny: is in use by"):
        compress.export(finished / "student.safetensors")
    assert (finished / "student.onnx").read_text() == "made of it"


def test_a_full_disk_is_one_line_and_the_training_goes_on_to_the_same_bits(
    tmp_path: Path, finished: Path, whole: Path
) -> None:
    before, new = digests(finished), recipe(tmp_path, *NEW)
    with no_room(), pytest.raises(UserError) as full:
        train(new)
    assert str(full.value) == (
        f"{finished}/student.new/checkpoints/last.ckpt: File too large; the finished {finished}/student.safetensors is "
        "as it was"
    )
    assert digests(finished) == before
    assert not [path for path in finished.rglob(".*") if path.is_file()]
    train(new, resume=True)
    assert_same(*(load_file(folder / "student.safetensors") for folder in (whole, finished)))


def test_what_cannot_work_is_said_before_the_teacher_is_trained(tmp_path: Path) -> None:
    for key, said in {
        "train.batch_size=48": "student: batch_size 48 is more than the 24 training images",
        "methods.bckd.stop_epoch=9": r"methods\.bckd\.stop_epoch 9 is after the end of the training \(0\.7 epochs\)",
        "teacher.train.batch_size=48": "teacher: batch_size 48 is more than the 24 training images",
    }.items():
        asked = recipe(tmp_path, key)
        with pytest.raises(UserError, match=said):
            pipeline.distill(asked)
        assert not (asked.run_dir / "teacher").exists()


def test_settings_that_a_short_training_never_reaches_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = "train.schedule={name: multistep, milestones: [8, 11], warmup_steps: 0}"
    train(recipe(tmp_path, "train.steps=2", schedule, "train.eval_every=3", "train.checkpoint_every=50"))
    end = "after the end (0.3 epochs)"
    assert {line for line in capsys.readouterr().out.splitlines() if end in line} == {
        f"student: schedule.milestones 8, 11: {end}; the learning rate does not fall",
        f"student: eval_every 3: {end}; it is evaluated there alone",
        f"student: checkpoint_every 50: {end}; an interrupted training starts again",
    }
