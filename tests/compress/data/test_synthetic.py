from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.data import synthetic
from compress.data.check import check
from compress.data.shapes import SHAPES
from compress.data.synthetic import class_names, draw, generate
from deploy.core.errors import UserError


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_arguments_same_bytes_other_seed_other_images(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate(tmp_path / name, train=6, val=3, size=96, classes=5, seed=seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a if name.endswith(".png"))
    assert len(set(a.values())) == len(a)  # train and val share no image


def test_checks_clean(tmp_path: Path) -> None:
    generate(tmp_path / "d", train=40, val=10, size=96, classes=24, seed=0)
    for split in ("train", "val"):
        problems = check(tmp_path / "d" / f"{split}.json", tmp_path / "d" / "images").problems
        assert [p for p in problems if p.level == "error"] == []


def test_skips_when_whole_and_redraws_when_not(tmp_path: Path) -> None:
    folder, arguments = tmp_path / "d", dict(train=3, val=2, size=64, classes=3, seed=0)
    generate(folder, **arguments)
    first = files_of(folder)
    picture = folder / "images" / "train_000000.png"
    os.utime(picture, (1, 1))
    generate(folder, **arguments)
    assert picture.stat().st_mtime == 1  # untouched
    picture.unlink()
    generate(folder, **arguments)
    assert files_of(folder) == first
    Image.new("RGB", (64, 64)).save(picture)  # another picture of that name
    generate(folder, **arguments)
    assert files_of(folder) == first
    (folder / "train.json").write_text("{}")
    generate(folder, **arguments)
    assert files_of(folder) == first
    generate(folder, **{**arguments, "classes": 4})
    assert len(json.loads((folder / "train.json").read_text())["categories"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["d"]  # no temporary folder is left


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(synthetic, "draw", fail)
    with pytest.raises(RuntimeError):
        generate(tmp_path / "d", train=3, val=2, size=64, classes=3, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a synthetic dataset"):
        generate(tmp_path, train=3, val=2, size=64, classes=3, seed=0)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("bad", [{"classes": 1}, {"classes": 25}, {"train": 0}, {"val": 0}, {"size": 16}, {"seed": -1}])
def test_arguments_out_of_range(tmp_path: Path, bad: dict[str, int]) -> None:
    arguments = {"train": 3, "val": 2, "size": 64, "classes": 3, "seed": 0, **bad}
    with pytest.raises(UserError, match=next(iter(bad))):
        generate(tmp_path / "d", **arguments)


def test_classes_need_both_cues() -> None:
    assert len(set(class_names(24))) == 24
    for count in range(4, 25):
        textures, shapes = zip(*(name.split() for name in class_names(count)), strict=True)
        assert max(Counter(shapes).values()) > 1 and max(Counter(textures).values()) > 1
    for count in range(2, 25):
        names = set(class_names(count))
        rng = np.random.default_rng(0)
        for _ in range(50):
            shape, texture = synthetic._distractor(count, rng)
            assert f"{texture} {shape}" not in names


def test_statistics() -> None:
    size, scenes = 128, [draw(128, 10, np.random.default_rng([9, i])) for i in range(400)]
    counts = [len(boxes) for _, boxes in scenes]
    assert 0.02 < np.mean([count == 0 for count in counts]) < 0.10
    assert max(counts) <= 8 and 2.5 < np.mean(counts) < 4
    boxes = np.array([box.xyxy for _, row in scenes for box in row])
    assert boxes.min() >= 0 and boxes.max() <= size
    inside = boxes[(boxes.min(1) > 0) & (boxes.max(1) < size)]
    side = (inside[:, 2:] - inside[:, :2]).max(1)
    assert 11 < side.min() < 14 and size * 0.4 < side.max() < size * 0.65
    # Log-uniform: about as many in the lower half of the log range as in the upper.
    middle = math.sqrt(12 * size / 2)
    assert 0.35 < (side < middle).mean() < 0.65
    labels = Counter(box.label for _, row in scenes for box in row)
    assert set(labels) == set(range(10)) and min(labels.values()) > 0.6 * max(labels.values())


def test_box_encloses_the_object_tightly() -> None:
    """Oracle: the pixels that drawing the object changed."""
    for index in range(60):
        rng = np.random.default_rng([5, index])
        canvas = np.full((3, 100, 100), 128, np.float32)
        owner = np.full((100, 100), -1, np.int16)
        shape = list(SHAPES)[index % len(SHAPES)]
        xyxy, area, full = synthetic._object(canvas, owner, 0, shape, "striped", (50.0, 47.5, 22.0), rng)
        assert xyxy is not None
        rows, columns = np.nonzero(owner == 0)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.array(xyxy) - box).max() <= 1.0
        assert abs(area - len(rows)) < 0.06 * len(rows)
        assert abs(full - area) < 0.04 * full  # wholly inside the image


def test_hidden_objects_are_not_annotated(monkeypatch: pytest.MonkeyPatch) -> None:
    """All objects on one spot: the lower ones of equal size are covered."""
    monkeypatch.setattr(synthetic, "_place", lambda size, placed, rng: (64.0, 64.0, 25.0))
    monkeypatch.setattr(synthetic, "_CLASSES", [("disc", "striped"), ("disc", "checked")])
    monkeypatch.setattr(synthetic, "_distractor", lambda classes, rng: ("disc", "plain"))
    counts = [len(draw(128, 2, np.random.default_rng([3, i]))[1]) for i in range(60)]
    assert max(counts) == 1


def test_a_style_changes_the_look_and_nothing_else(tmp_path: Path) -> None:
    arguments = dict(train=6, val=2, size=64, classes=3, seed=0)
    generate(tmp_path / "plain", **arguments)
    generate(tmp_path / "night", **arguments, style="night")
    plain, night = files_of(tmp_path / "plain"), files_of(tmp_path / "night")
    for name in plain:
        if name.endswith(".png"):
            assert plain[name] != night[name]
            pair = (np.array(Image.open(tmp_path / style / name), np.float32) for style in ("plain", "night"))
            bright, dark = pair
            assert dark.mean() < 0.7 * bright.mean() and dark[..., 2].mean() > dark[..., 0].mean()
        elif name != "spec.json":
            assert plain[name] == night[name]
    assert json.loads(plain["spec.json"])["specification"].keys() == {"version", *arguments}
    generate(tmp_path / "plain", **arguments, style="night")
    assert files_of(tmp_path / "plain") == night
