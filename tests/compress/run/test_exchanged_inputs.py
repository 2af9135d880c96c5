"""What an exchanged input does again: exactly the stages that depend on it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import exchanged_inputs
from tests.helpers.exchanged_inputs import TRAINED, Faked, document, picture, save_teacher

CHECKS = {"teacher_check", "pseudo labels: check of teacher 1", "keep teacher"}
LABELS = {"pseudo labels: folder 1"}
TRAININGS = {"baseline", "student.pseudo", "student"}
RETRAINED = {*TRAININGS, "keep baseline"}
MEASURED = {"validate", "benchmark", "report"}
FILES = {"export", "export fp16", "export int8", "export qad"}
INT8 = {"qad calibration", "qad", "export int8", "export qad"}
BEHIND_THE_STUDENT = {*INT8, *FILES, *MEASURED, "keep student"}


def new_picture(name: str) -> Callable[[Path], None]:
    """Exchange one: the same size in pixels, another colour, under the old name."""
    return lambda folder: picture(folder / name, (1, 2, len(name)))


def moved_box(name: str) -> Callable[[Path], None]:
    def exchange(folder: Path) -> None:
        names = [row["file_name"] for row in json.loads((folder / name).read_text())["images"]]
        (folder / name).write_text(json.dumps(document(names, side=21)))

    return exchange


def touched(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        os.utime(path)


def read_elsewhere(folder: Path) -> None:
    shutil.copytree(folder / "train", folder / "elsewhere")


@dataclass
class Row:
    exchange: Callable[[Path], object]
    redone: set[str]
    settings: tuple[str, ...] = ()


def nothing(folder: Path) -> None:
    pass


ROWS = {
    "nothing": Row(nothing, set()),
    "times of the files": Row(touched, set()),
    "folder of the training pictures": Row(read_elsewhere, set(), ("data.train.images={folder}/elsewhere",)),
    "training picture": Row(new_picture("train/train1.png"), RETRAINED | BEHIND_THE_STUDENT),
    "training labels": Row(moved_box("train.json"), RETRAINED | BEHIND_THE_STUDENT),
    "validation picture": Row(new_picture("val/val1.png"), CHECKS | RETRAINED | BEHIND_THE_STUDENT),
    "validation labels": Row(moved_box("val.json"), CHECKS | RETRAINED | BEHIND_THE_STUDENT),
    "unlabelled picture": Row(
        new_picture("more/more1.png"), LABELS | {"student.pseudo", "student"} | BEHIND_THE_STUDENT
    ),
    "unlabelled picture more": Row(
        new_picture("more/more9.png"), LABELS | {"student.pseudo", "student"} | BEHIND_THE_STUDENT
    ),
    "calibration picture": Row(new_picture("calibration/calibration1.png"), INT8 | MEASURED),
    "teacher": Row(
        lambda folder: save_teacher(folder / "teacher.safetensors", seed=1),
        CHECKS | LABELS | {"student.pseudo", "student"} | BEHIND_THE_STUDENT,
    ),
    "data.flip": Row(nothing, RETRAINED | BEHIND_THE_STUDENT, ("data.flip=0.1",)),
    "data.workers": Row(nothing, set(), ("data.workers=1",)),
    "methods": Row(nothing, {"student.pseudo", "student"} | BEHIND_THE_STUDENT, ("methods.bckd.weight=2",)),
    "pseudo_labels.tau": Row(
        nothing, LABELS | {"student.pseudo", "student"} | BEHIND_THE_STUDENT, ("pseudo_labels.tau=0.5",)
    ),
    "deploy.score_threshold": Row(nothing, FILES | MEASURED, ("deploy.score_threshold=0.1",)),
    "deploy.max_map_drop": Row(nothing, {"export int8"} | MEASURED, ("deploy.max_map_drop=0.6",)),
    "deploy.benchmark": Row(nothing, {"benchmark", "report"}, ("deploy.benchmark.seconds=0.1",)),
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a finished run, and a copy of it."""
    folder = tmp_path_factory.mktemp("exchanged") / "inputs"
    exchanged_inputs.make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        assert set(Faked(patch).run(folder)) == {*CHECKS, *LABELS, *RETRAINED, *BEHIND_THE_STUDENT}
    return folder, Path(shutil.copytree(folder, folder.with_name("copy")))


@pytest.mark.parametrize("name", ROWS)
def test_an_exchanged_input(snapshot: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copy = snapshot
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    row = ROWS[name]
    row.exchange(folder)
    redone = Faked(monkeypatch).run(folder, *(text.format(folder=folder) for text in row.settings))
    assert set(redone) == row.redone and len(redone) == len(row.redone)


def test_what_ends_in_the_same_bits_does_nothing_behind_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanged pictures, and trainings that leave the same weights. Half precision is measured on training pictures;
    the search for float layers is scored on train0 and train3."""
    exchanged_inputs.make_inputs(tmp_path)
    faked = Faked(monkeypatch)
    faked.equal = True
    run = {"teacher": TRAINED, "calibration": True}
    assert {"teacher", "teacher_check"} <= set(faked.run(tmp_path, **run))
    picture(tmp_path / "train" / "train1.png", (1, 2, 3))
    trainings = {"teacher", "qad", *TRAININGS}
    assert set(faked.run(tmp_path, **run)) == {*trainings, "export fp16", *MEASURED}
    picture(tmp_path / "train" / "train0.png", (1, 2, 4))
    assert set(faked.run(tmp_path, **run)) == {*trainings, "export fp16", "export int8", *MEASURED}
    picture(tmp_path / "val" / "val0.png", (1, 2, 5))
    checked_on = {"export", "export fp16", "export int8", "export qad"}
    kept = {"keep baseline", "keep student"}
    assert set(faked.run(tmp_path, **run)) == {*trainings, *CHECKS, *checked_on, *kept, *MEASURED}


def test_calibration_on_training_pictures_knows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of six are taken, train0 and train3."""
    exchanged_inputs.make_inputs(tmp_path)
    faked = Faked(monkeypatch)
    faked.equal = True
    settings = ("deploy.int8.guided=false", "deploy.precisions=[fp32, int8]")
    faked.run(tmp_path, *settings, calibration=False)
    picture(tmp_path / "train" / "train1.png", (1, 2, 3))
    assert set(faked.run(tmp_path, *settings, calibration=False)) == {"qad", *TRAININGS, "report"}
    picture(tmp_path / "train" / "train3.png", (1, 2, 4))
    redone = set(faked.run(tmp_path, *settings, calibration=False))
    assert redone == {"qad calibration", "qad", "export int8", "export qad", *TRAININGS, *MEASURED}


def test_a_missing_picture_is_known_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.core.errors import UserError

    exchanged_inputs.make_inputs(tmp_path)
    for name in ("train1.png", "train4.png"):
        (tmp_path / "train" / name).unlink()
    faked = Faked(monkeypatch)
    with pytest.raises(UserError) as refused:
        faked.run(tmp_path)
    assert faked.done == []
    where = f"{tmp_path}/train/train1.png: an image of {tmp_path}/train.json (and 1 more of 6): the file is missing"
    assert str(refused.value) == where
