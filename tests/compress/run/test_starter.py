"""`compress init`: recipes that fit the data, and what a run will take."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import cli
from compress.config.data import Split
from compress.config.recipe import Recipe, load_recipe
from compress.config.teacher import Source
from compress.data import coco
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.detectors.checkpoints import load_detector
from compress.run import estimate, starter
from compress.run.starter import starter_recipe
from compress.run.starter_text import Facts, Wishes
from deploy.core.errors import UserError
from tests.helpers import random_teacher
from tests.helpers.kinds_of_data import KINDS, draw

CHEAP = ("9 images",)
"""Kinds that are always tried to the end; the others are with `make test-exhaustive`."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Nothing is timed: trainings take so many seconds for a pixel, a step and an image."""
    speed = {"trainings": 2e-6, "rest": 30.0}

    def cost(draft: Any, *_: object) -> tuple[float, float]:
        pixels = draft.limits[0] * draft.limits[1] * draft.choice.student["neck_channels"] / 64
        return speed["trainings"] * pixels * draft.steps * draft.batch, speed["rest"]

    monkeypatch.setattr(starter, "_cost", cost)
    return speed


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of 20,000 images is large enough for an index, which is not to lie in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(kind: str, folder: Path, budget: float = 600.0, **wishes: Any) -> tuple[Recipe, list[str]]:
    """The recipe for a kind of data, and what was said."""
    train, val, images = draw(KINDS[kind], folder)
    said: list[str] = []
    splits = (Split(annotations=file, images=images) for file in (train, val))
    text = starter_recipe(Wishes("own", *splits, budget=budget, device="cpu", **wishes), said.append)
    (folder / "own.yaml").write_text(text)
    return load_recipe(folder / "own.yaml"), said


EXPECTED: Mapping[str, Mapping[str, Any]] = {
    "one class": {"short": 120, "long": 160},
    "300 classes": {"short": 120, "long": 160},
    "40 images": {"long": 160, "batch": 8},
    "9 images": {"batch": 4},
    "20,000 images": {"batch": 16, "long": 96},
    "tiny objects": {"short": 480, "long": 640},
    "huge pictures": {"short": 240, "long": 320, "cache": True},
    "portrait": {"short": 115, "long": 192},
    "mixed": {"short": 192, "long": 192, "norm": "batch"},
    "grey, folders, ids from 7": {"long": 160},
    "crowded": {"long": 320, "boxes": 250},
    "thumbnails, half of them empty": {"short": 32, "long": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gets_a_recipe(kind: str, tmp_path: Path, quick: dict[str, float]) -> None:
    quick["trainings"] = 1e-12
    recipe, said = written(kind, tmp_path)
    wanted = EXPECTED[kind]
    found = {
        "short": recipe.data.short,
        "long": recipe.data.long,
        "batch": recipe.train.batch_size,
        "cache": recipe.data.cache,
        "norm": recipe.student.head_norm,
        "boxes": recipe.deploy.max_detections,
    }
    assert {key: found[key] for key in wanted} == wanted, said
    assert recipe.methods.fgd is not None and recipe.teacher is not None and recipe.teacher.inherit
    assert recipe.train.steps is not None and recipe.train.steps >= starter.ENOUGH[0]
    assert recipe.teacher.train is not None and recipe.teacher.train.steps is not None
    assert recipe.teacher.train.steps == int(1.5 * recipe.train.steps)


@pytest.mark.parametrize(
    "kind", [kind if kind in CHEAP else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KINDS]
)
def test_a_recipe_passes_its_rehearsal(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, with steps that are really timed, though few of them."""
    monkeypatch.setattr(estimate, "TIMED_STEPS", 1)
    draw(KINDS[kind], tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        cli.main(["init", "data", "--budget", "2min", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("everything fits together\nnext: compress run data.yaml\n")
    table = out[out.index("estimate, ") :].splitlines()
    assert [line.split()[0] for line in table[1:6]] == ["teacher", "baseline", "student", "files", "in"]
    for line in table[1:4]:
        assert " steps x " in line and " validation images" in line


def test_the_budget_decides(tmp_path: Path, quick: dict[str, float]) -> None:
    """With less time: fewer steps, then a smaller detector and smaller images; what is lost is said."""
    seen = []
    for index, seconds in enumerate((144_000.0, 5000.0, 1130.0, 40.0)):
        recipe, said = written("tiny objects", tmp_path / str(index), seconds)
        student, steps = recipe.student, recipe.train.steps or 0
        seen.append((student.backbone, student.neck_channels, recipe.data.long, steps, "\n".join(said)))
    rich, medium, tight, hopeless = seen
    assert rich[:4] == ("resnet18", 128, 640, 2400) and "chosen: resnet18 student" in rich[4]
    assert medium[:2] == ("nano", 64) and starter.ENOUGH[0] <= medium[3] < 2400
    assert tight[:2] == ("nano", 32) and tight[2] < 640
    assert "images of 640 x 480 would be better; the budget does not allow them" in tight[4]
    assert hopeless[3] < starter.ENOUGH[0] and "would be good; the budget allows" in hopeless[4]
    assert "the budget of 40 s is too short for any run; this one takes about" in hopeless[4]
    assert "too short" not in tight[4]


def test_smaller_images_are_not_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget makes 160 x 120 smaller; then the sets that are open are timed at the smaller size."""
    timed: list[tuple[Any, estimate.Sets]] = []

    def cost(draft: Any, sets: estimate.Sets, *_: object) -> tuple[float, float]:
        timed.append((draft.limits, sets))
        return 1000.0, 30.0

    opened: list[Path] = []
    open_coco = coco.label_tables
    monkeypatch.setattr(starter, "_cost", cost)
    monkeypatch.setattr(coco, "label_tables", lambda file, images: (opened.append(file), open_coco(file, images))[1])
    recipe, _ = written("one class", tmp_path, budget=700.0)
    assert [file.name for file in opened] == ["train.json", "val.json"]
    (first, sets), (last, smaller) = timed[0], timed[-1]
    assert (first, last) == ((120, 160), (96, 128)) and last == (recipe.data.short, recipe.data.long)
    assert sets.canvas == (128, 160) and smaller.canvas == (96, 128)
    assert smaller.val[0][0].shape[1:] == (96, 128) and max(smaller.train[(0, 0)][0].shape[1:]) <= 128


@given(
    steps=st.integers(600, 10**6),
    seconds=st.floats(0.1, 1e7),
    available=st.floats(-100, 1e7),
    images=st.integers(1, 10**6),
)
def test_steps_fit_the_time(steps: int, seconds: float, available: float, images: int) -> None:
    batch = starter.batch_size(images)
    found = starter.steps_for(steps, seconds, available, images, batch)
    assert starter.LEAST_STEPS <= found <= max(starter.MOST[0], starter.MOST[1] * images // batch)
    assert found == starter.LEAST_STEPS or found * seconds / steps <= available * (1 + 1e-9)


@given(
    share=st.floats(1e-4, 1.0), short=st.integers(20, 8000), more=st.integers(0, 4000), mixed=st.booleans(),
    largest=st.sampled_from([640, 1024]),
)  # fmt: skip
def test_images_are_no_larger_than_pictures(share: float, short: int, more: int, mixed: bool, largest: int) -> None:
    facts = Facts(10, 5, 20, {1: "thing"}, (short, short + more), mixed, share, 3, 10**6)
    found = starter.image_limits(facts, largest)
    assert found[0] <= found[1] <= largest and found[1] % 32 == 0
    assert found[1] <= max(32, short + more + 16)  # the nearest multiple
    assert found[1] * share >= starter.OBJECT_PX * 0.9 or found[1] in (largest, 32 * round(found[1] / 32))


def test_a_teacher_that_is_there(tmp_path: Path, quick: dict[str, float]) -> None:
    """Its width is taken, and a method that fits it; its neck and head only where the classes are the same."""
    for kind, same in (("one class", False), ("300 classes", False), ("40 images", True)):
        folder = tmp_path / kind
        folder.mkdir()
        names = tuple(f"thing {label}" for label in range(3))
        file = random_teacher.teacher(folder / "teacher.safetensors", names, 0, resize_short_long=(96, 128))
        recipe, _ = written(kind, folder / "data", teacher=Source(checkpoint=file))
        assert recipe.teacher is not None and recipe.teacher.checkpoint == file
        assert (recipe.data.short, recipe.data.long) == (96, 128), "what the teacher was trained on"
        assert recipe.teacher.train is None and recipe.methods.fgd is not None
        assert (recipe.student.neck_channels, recipe.teacher.inherit) == (32, same)


def test_a_teacher_of_boxes_alone_needs_pictures_to_label(tmp_path: Path, quick: dict[str, float]) -> None:
    results = tmp_path / "results.json"
    results.write_text("[]")
    with pytest.raises(UserError, match="it gives boxes alone; it can label pictures"):
        written("one class", tmp_path / "a", teacher=Source(results=results))
    more = tmp_path / "more"
    more.mkdir()
    recipe, _ = written("one class", tmp_path / "b", teacher=Source(results=results), unlabeled=more)
    assert recipe.teacher is None and not recipe.methods.enabled()
    assert recipe.pseudo_labels is not None and recipe.pseudo_labels.unlabeled == (more,)
    assert recipe.pseudo_labels.teachers == (Source(results=results),)


def test_a_teacher_of_more_classes_is_timed(tmp_path: Path) -> None:
    train, val, images = draw(KINDS["one class"], tmp_path / "data")
    transform = eval_transform(64, 96)
    opened = [CocoDetection(file, images, transform) for file in (train, val)]
    names = tuple(f"c{label}" for label in range(20))
    detector = load_detector(Path(random_teacher.teacher(tmp_path / "t.safetensors", names, 0)))[0]
    sets = estimate.Sets(opened[0], opened[1], 40, 12, False, (96, 96))
    assert 0 < estimate.seconds_an_image(detector, sets, torch.device("cpu")) < 60


def test_steps_are_counted_out() -> None:
    stages = [estimate.Stage("teacher", "10 steps", 100.0, 2 * 10**9), estimate.Stage("files", "1 exported", 8000.0)]
    shown = estimate.lines(stages, torch.device("cpu"), left_out=["the cut"])
    assert shown[0].startswith("estimate, from steps timed here on cpu, ") and shown[0].endswith("; without the cut:")
    assert [line.split() for line in shown[1:]] == [
        ["teacher", "10", "steps", "2", "min", "2.0", "GB"],
        ["files", "1", "exported", "2.2", "h"],
        ["in", "all", "2.2", "h", "2.0", "GB"],
    ]
