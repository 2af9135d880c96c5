"""The teacher's outputs on disk: what a training with them gives, beside one without; entries; room."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.data.batch import Batch, Target
from compress.data.views import picture_key
from compress.detectors.base import Capability, Detector, freeze
from compress.detectors.build import build_detector
from compress.distill import teacher_cache
from compress.distill.method import BOTH, Outputs
from compress.distill.teacher_cache import FILE_BYTES, TeacherCache, entry_bytes
from compress.distill.teacher_outputs import run_teacher
from compress.run import plans, trainings
from compress.run.data import open_data
from compress.run.trainings import Distillation
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe
from tests.helpers.teacher_passes import Passes
from tests.helpers.training_runs import assert_same, fabric, last_checkpoint

METHODS = Methods.model_validate({"fgd": {}, "bckd": {}, "crosskd": {}, "uet": {"of": "fgd", "certainty": True}})
HALF = 2.0**-11
"""Rounding to float16, relative."""


def model(family: str = "gfl", classes: int = 3) -> Detector:
    shape = Model.model_validate({"detector": family, "backbone": "nano", "neck_channels": 32, "head_depth": 2})
    detector = freeze(build_detector(shape, classes, 1))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in detector.named_parameters():  # so that logits differ, as a trained teacher's
        if "head" in name and parameter.dim() == 4:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return detector


@pytest.fixture(scope="module")
def teacher() -> Detector:
    return model()


def batch(*pictures: int) -> Batch:
    images = [
        torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        for n in pictures
    ]
    nothing = torch.zeros(0, dtype=torch.int64)
    targets = [
        Target(
            torch.zeros(0, 4), nothing, nothing.bool(), None, n, (64, 64), (64, 64), key=picture_key(image, (64, 64))
        )
        for n, image in zip(pictures, images, strict=True)
    ]
    return Batch(torch.stack(images), targets)


def tensors(outputs: Outputs, parts: frozenset[Capability] = BOTH) -> list[Tensor]:
    prediction = outputs.prediction
    maps = list(outputs.features) if Capability.FEATURES in parts else []
    if Capability.DENSE not in parts:
        return maps
    return [*maps, *prediction.logits, *prediction.distribution, *prediction.box_deltas, *prediction.centerness]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- trainings ------------------------------------------------------------------------------------------


def train(
    recipe: Recipe, teacher: Detector, cache: Path | None, *, max_steps: int | None = None, resume: bool = False
) -> Passes:
    """The tiny recipe's student with this teacher; what of it ran."""
    f = fabric()
    learns = Distillation(METHODS, cache=cache)
    plan = replace(plans.student_plan(recipe), teacher=teacher, distillation=learns, identity={"of": "a"})
    with Passes(teacher) as passes:
        trainings.train(f, plan, open_data(plans.data_plan(recipe), f), resume=resume, max_steps=max_steps)
    return passes


def rows(recipe: Recipe) -> list[dict[str, float]]:
    with open(recipe.run_dir / "student" / "metrics.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["loss"]]
    return [{k: float(v) for k, v in row.items() if k.startswith(("loss", "fgd", "bckd", "crosskd"))} for row in found]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Recipe]]:
    """Trainings of 14 steps, six an epoch, two views; with a folder each."""
    folder = tmp_path_factory.mktemp("trainings")

    def recipe(name: str) -> Recipe:
        settings = (
            "train.steps=14",
            "train.views=2",
            "data.photometric=true",
            "train.optimizer.lr=1e-4",
            "student.head_depth=2",
        )
        return tiny_recipe.recipe(folder / name, *settings)

    yield recipe


@pytest.fixture(scope="module")
def cached(recipes: Callable[[str], Recipe], teacher: Detector) -> tuple[Recipe, Path, Passes]:
    """A training that began with an empty cache, the cache, and what of the teacher ran."""
    recipe = recipes("cached")
    cache = recipe.runs.parent / "cache"
    return recipe, cache, train(recipe, teacher, cache)


def test_the_teacher_runs_once_for_each_view(
    cached: tuple[Recipe, Path, Passes], recipes: Callable[[str], Recipe], teacher: Detector
) -> None:
    _, cache, passes = cached
    assert passes.features == passes.head == 2 * 24
    assert len(files(cache)) == 2 * passes.features  # maps and predictions
    again = recipes("again")
    passes = train(again, teacher, cache)
    assert (passes.features, passes.head) == (0, 0)
    assert_same(last_checkpoint(cached[0]), last_checkpoint(again))


def test_losses_are_those_without_a_cache_up_to_half_precision(
    cached: tuple[Recipe, Path, Passes], recipes: Callable[[str], Recipe], teacher: Detector
) -> None:
    """With MC-dropout and certainty drawn anew from the maps. The first step differs by what rounding the teacher does;
    later ones also by what the student then learned."""
    plain = recipes("plain")
    passes = train(plain, teacher, None)
    assert passes.features == passes.head == 14
    ours, theirs = rows(cached[0]), rows(plain)
    assert len(ours) == len(theirs) == 3  # steps 1, 10 and 14
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys() and {"fgd_fg", "bckd_loc", "crosskd_reg"} <= a.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=(8 if number == 0 else 64) * HALF, abs=1e-6), (number, key)
    assert any(a[key] != b[key] for a, b in zip(ours, theirs, strict=True) for key in a), "nothing was rounded"


def test_resuming_is_exact_whatever_is_in_the_cache(
    cached: tuple[Recipe, Path, Passes], recipes: Callable[[str], Recipe], teacher: Detector
) -> None:
    """Stopped in the second epoch, with a part of the cache lost meanwhile."""
    parts = recipes("parts")
    cache = parts.runs.parent / "own cache"
    train(parts, teacher, cache, max_steps=8)
    for path in files(cache)[::3]:
        path.unlink()
    train(parts, teacher, cache, resume=True)
    assert_same(last_checkpoint(cached[0]), last_checkpoint(parts))


# --- entries --------------------------------------------------------------------------------------------


def opened(folder: Path, teacher: Detector, lines: list[str] | None = None, **changes: Any) -> TeacherCache:
    return TeacherCache(folder, teacher, {"of": "test"}, report=(lines if lines is not None else []).append, **changes)


@pytest.mark.parametrize("family", ["gfl", "fcos", "retinanet"])
def test_outputs_are_the_teachers_in_half_precision(family: str, tmp_path: Path) -> None:
    detector = model(family)
    cache = opened(tmp_path, detector)
    for _ in ("made", "read"):
        found, wanted = tensors(cache(batch(1, 2), BOTH)), tensors(run_teacher(detector, batch(1, 2).images, BOTH))
        assert len(found) == len(wanted)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=1.01 * HALF, atol=1e-5)
    assert (cache.read, cache.made) == (2, 2)
    size = sum(path.stat().st_size for path in files(tmp_path)) / 2
    assert size <= entry_bytes(detector, (64, 64), BOTH, None) <= 1.1 * size + 2 * FILE_BYTES


def test_an_entry_depends_on_its_picture_alone(tmp_path: Path, teacher: Detector) -> None:
    """Not on who shares the batch, on whether it was there, or on what else is asked."""
    together = opened(tmp_path / "a", teacher)
    whole = tensors(together(batch(1, 2, 3), BOTH))
    apart = opened(tmp_path / "b", teacher)
    apart(batch(2), frozenset({Capability.DENSE}))
    apart(batch(9, 1), frozenset({Capability.FEATURES}))
    for a, b in zip(whole, tensors(apart(batch(1, 2, 3), BOTH)), strict=True):
        assert torch.equal(a, b)
    names = [{path.name for path in files(tmp_path / name)} for name in "ab"]
    assert names[0] < names[1] and len(names[1] - names[0]) == 1


def test_only_what_is_asked_is_made_and_kept(tmp_path: Path, teacher: Detector) -> None:
    cache = opened(tmp_path, teacher)
    with Passes(teacher) as passes:
        outputs = cache(batch(1), frozenset({Capability.FEATURES}))
    assert (passes.features, passes.head) == (1, 0) and len(files(tmp_path)) == 1
    with pytest.raises(UserError, match=r"predictions and does not say so; add Capability\.DENSE"):
        outputs.prediction.logits  # noqa: B018
    outputs = cache(batch(1), frozenset({Capability.DENSE}))
    with pytest.raises(UserError, match=r"features and does not say so; add Capability\.FEATURES"):
        outputs.features[0]


@pytest.mark.parametrize("family", ["gfl", "retinanet"])
def test_of_some_classes_the_others_share_their_mean_probability(family: str, tmp_path: Path) -> None:
    detector = model(family, classes=7)
    parts = frozenset({Capability.DENSE})
    whole = opened(tmp_path, detector)(batch(1), parts).prediction
    some = opened(tmp_path, detector, classes=2)(batch(1), parts).prediction
    for level in range(len(whole.logits)):
        ours, theirs = some.class_logits(level), whole.class_logits(level)  # [B, K, M]
        best = theirs.topk(2, 1)
        assert torch.equal(ours.gather(1, best.indices), best.values)
        torch.testing.assert_close(ours.sigmoid().sum(1), theirs.sigmoid().sum(1), rtol=1e-2, atol=1e-4)
        others = ours.scatter(1, best.indices, torch.nan)
        assert bool((others.nan_to_num(torch.inf).amin(1) == others.nan_to_num(-torch.inf).amax(1)).all())
    for ours, theirs in zip(
        tensors(Outputs([], some, detector))[len(some.logits) :],
        tensors(Outputs([], whole, detector))[len(some.logits) :],
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    kinds = [opened(tmp_path, detector, classes=classes) for classes in (None, 7, 9)]
    assert {cache.classes for cache in kinds} == {None}, "all classes are all classes"


def test_another_teacher_has_another_folder(tmp_path: Path, teacher: Detector) -> None:
    """Weights, normalisation and precision; not what only its loss does."""

    def folder(detector: Detector, precision: str = "32") -> Path:
        cache = Distillation(METHODS, cache=tmp_path).open_cache(detector, precision)
        assert cache is not None
        return cache.folder

    same, other, darker = model(), model(), model()
    same.compiled = True
    next(other.parameters()).data.mul_(1.001)
    darker.set_normalisation(mean=(100.0, 100.0, 100.0))
    assert folder(same) == folder(teacher)
    assert len({folder(teacher), folder(other), folder(darker), folder(teacher, "bf16")}) == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_entry_is_named_and_made_again(tmp_path: Path, teacher: Detector, damage: str) -> None:
    lines: list[str] = []
    cache = opened(tmp_path, teacher, lines)
    before = tensors(cache(batch(1), BOTH))
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-7]), "empty": b""}[damage])
    for a, b in zip(before, tensors(cache(batch(1), BOTH)), strict=True):
        assert torch.equal(a, b)
    assert len(lines) == 1 and f"{path}: damaged" in lines[0] and "made again" in lines[0]
    cache(batch(1), BOTH)
    assert len(lines) == 1


def test_several_at_once_share_a_folder(tmp_path: Path, teacher: Detector) -> None:
    """Four that ask for the same pictures in different orders, each as a process of its own would."""
    lines: list[str] = []

    def work(order: list[int]) -> list[list[Tensor]]:
        cache = opened(tmp_path, teacher, lines)
        return [tensors(cache(batch(n), BOTH)) for n in order]

    orders = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, orders))
    for order, outputs in zip(orders, found, strict=True):
        for n, ours in zip(order, outputs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, found[0][n], strict=True))
    assert not lines and len(files(tmp_path)) == 8


def test_what_float16_does_not_hold_is_refused(tmp_path: Path) -> None:
    detector = model()
    with torch.no_grad():
        for parameter in detector.neck.parameters():  # type: ignore[union-attr]
            parameter.mul_(1e4)
    with pytest.raises(UserError, match=r"teacher\.cache: the teacher gives values that float16 does not hold"):
        opened(tmp_path, detector)(batch(1), BOTH)
    assert not files(tmp_path)


# --- room -----------------------------------------------------------------------------------------------


def free_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: usage._replace(free=free))


def test_a_cache_that_would_fill_the_disk_is_refused(
    tmp_path: Path, teacher: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, canvases = opened(tmp_path, teacher), {(640, 480): 1000, (480, 640): 3000}
    needed = 8 * 4000 * entry_bytes(teacher, (480, 640), BOTH, None)
    free_disk(monkeypatch, 2**30 + needed // 2 + 2**20)
    with pytest.raises(
        UserError, match=rf"32000 views of 4000 pictures need {needed / 2**30:.2f} GiB there, and \d+\.\d\d GiB"
    ):
        cache.need_room(canvases, 8, 10**6, BOTH)
    cache.need_room(canvases, 4, 10**6, BOTH)
    cache.need_room(canvases, 8, 4 * 4000, BOTH)  # a training that does not come to see all of them
    cache.need_room(canvases, 8, 10**6, frozenset({Capability.FEATURES}))


def test_what_is_there_already_needs_no_room(
    tmp_path: Path, teacher: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(tmp_path, teacher)
    free_disk(monkeypatch, 2**30 + 1)
    with pytest.raises(UserError, match=r"lower train\.views"):
        cache.need_room({(64, 64): 2}, 1, 100, BOTH)
    monkeypatch.undo()
    cache(batch(1, 2), BOTH)
    free_disk(monkeypatch, 2**30 + 1)
    cache.need_room({(64, 64): 2}, 1, 100, BOTH)


def test_a_disk_that_fills_up_meanwhile_costs_time_alone(
    tmp_path: Path, teacher: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    cache = opened(tmp_path / "full", teacher, lines)
    free_disk(monkeypatch, 2**29)
    found = tensors(cache(batch(1, 2), BOTH))
    assert not files(tmp_path) and len(lines) == 1 and "nothing more is kept (less than 1 GiB is free)" in lines[0]
    monkeypatch.undo()
    for a, b in zip(found, tensors(opened(tmp_path / "room", teacher)(batch(1, 2), BOTH)), strict=True):
        assert torch.equal(a, b)
