from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.split import split
from deploy.core.errors import UserError


def write(folder: Path, boxes: dict[str, list[int]], *, ids: int = 1, **more: Any) -> Path:
    """A set of images by name, each with the categories of its boxes."""
    images = [{"id": ids + n, "file_name": name, "width": 9, "height": 9} for n, name in enumerate(boxes)]
    rows = [
        {"id": 0, "image_id": image["id"], "category_id": category, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
        for image, labels in zip(images, boxes.values(), strict=True)
        for category in labels
    ]
    rows = [{**row, "id": 100 + number} for number, row in enumerate(rows)]
    categories = [
        {"id": key, "name": f"c{key}"} for key in sorted({c for labels in boxes.values() for c in labels} | {1})
    ]
    path = folder / "all.json"
    path.write_text(json.dumps({**more, "images": images, "annotations": rows, "categories": categories}))
    return path


def names_of(path: Path) -> set[str]:
    return {row["file_name"] for row in json.loads(path.read_text())["images"]}


def test_every_image_comes_to_one_side_with_its_boxes(tmp_path: Path) -> None:
    boxes = {f"{n}.png": [1 + n % 3] * (n % 4) for n in range(50)}
    path = write(tmp_path, boxes, info={"year": 2026}, licenses=[{"id": 3}])
    whole = json.loads(path.read_text())
    made = split(path, tmp_path / "out", {"val": 0.2, "test": 0.1}, 0)
    assert [(part.out.name, part.images) for part in made.parts] == [
        ("train.json", 35),
        ("val.json", 10),
        ("test.json", 5),
    ]
    documents = [json.loads(part.out.read_text()) for part in made.parts]
    for key in ("images", "annotations"):
        rows = [row for document in documents for row in document[key]]
        assert sorted(rows, key=lambda row: row["id"]) == whole[key]
    for document, part in zip(documents, made.parts, strict=True):
        there = {row["id"] for row in document["images"]}
        assert all(row["image_id"] in there for row in document["annotations"])
        assert {key: document[key] for key in ("info", "licenses", "categories")} == {
            key: whole[key] for key in ("info", "licenses", "categories")
        }
        assert sum(part.boxes.values()) == len(document["annotations"])


def test_the_names_and_the_seed_decide(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(40)]
    one = write(tmp_path, {name: [1] for name in names})
    val = names_of(split(one, tmp_path / "a", {"val": 0.25}, 7).parts[1].out)
    other = tmp_path / "turned"
    other.mkdir()
    turned = write(other, {name: [1] for name in reversed(names)}, ids=500)
    assert names_of(split(turned, tmp_path / "b", {"val": 0.25}, 7).parts[1].out) == val
    assert names_of(split(one, tmp_path / "c", {"val": 0.25}, 8).parts[1].out) != val
    # the rule as documented: another one would divide everybody's data anew
    assert val == set(sorted(names, key=lambda name: hashlib.sha256(f"7:{name}".encode()).hexdigest())[:10])


def test_copies_and_groups_stay_together(tmp_path: Path) -> None:
    boxes = {f"clip{n // 5}_{n % 5}.png": [1] for n in range(40)}
    path = write(tmp_path, boxes)
    folder = tmp_path / "images"
    folder.mkdir()
    for n, name in enumerate(boxes):
        (folder / name).write_bytes(b"the same" if n in (0, 12, 33) else str(n).encode())
    for seed in range(6):
        made = split(path, tmp_path / "out", {"val": 0.25}, seed, images=folder, force=True)
        sides = [names_of(part.out) for part in made.parts]
        copies = {list(boxes)[n] for n in (0, 12, 33)}
        assert made.together == 3 and any(copies <= side for side in sides)
        assert made.parts[1].images in (9, 10, 11)
        made = split(path, tmp_path / "out", {"val": 0.25}, seed, group_by="^(clip[0-9]+)_", force=True)
        clips = [{name.partition("_")[0] for name in names_of(part.out)} for part in made.parts]
        assert not clips[0] & clips[1] and made.parts[1].images == 10
    made = split(path, tmp_path / "out", {"val": 0.25}, 0, images=folder, group_by="clip[0-9]+", force=True)
    clips = [{name.partition("_")[0] for name in names_of(part.out)} for part in made.parts]
    assert any({"clip0", "clip2", "clip6"} <= side for side in clips) and not clips[0] & clips[1]


def test_strata(tmp_path: Path) -> None:
    """A rare class that is drawn to one side by chance is on both when stratified."""
    boxes = {f"{n}.png": [1] * 3 + ([2] if n % 10 == 0 else []) + ([3] if n % 25 == 3 else []) for n in range(100)}
    path = write(tmp_path, boxes)
    for seed in range(5):
        made = split(path, tmp_path / "out", {"val": 0.2, "test": 0.2}, seed, stratify=True, force=True)
        counts = [part.boxes for part in made.parts]
        assert [count["c2"] for count in counts] == [6, 2, 2]
        assert sorted(count["c3"] for count in counts) in ([1, 1, 2], [0, 1, 3]) and counts[0]["c3"] >= 2
        for part, images in zip(made.parts, (60, 20, 20), strict=True):
            assert abs(part.images - images) <= 1
    empty = write(tmp_path, {f"{n}.png": [] for n in range(10)})
    assert [part.images for part in split(empty, tmp_path / "e", {"val": 0.3}, 0, stratify=True).parts] == [7, 3]


@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize("images", [2, 3, 7])
def test_no_set_is_empty(tmp_path: Path, images: int, stratify: bool) -> None:
    path = write(tmp_path, {f"{n}.png": [1] for n in range(images)})
    for share in (0.01, 0.99):
        made = split(path, tmp_path / "out", {"val": share}, 0, stratify=stratify, force=True)
        assert [part.images for part in made.parts] == ([images - 1, 1] if share < 0.5 else [1, images - 1])


def test_nothing_is_overwritten_or_lost(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{n}.png": [1] for n in range(4)})
    for shares, says in (
        ({"val": 0.0}, "--val: needs a share above 0 and below 1, got 0"),
        ({"val": float("nan")}, "--val: needs a share"),
        ({"val": 0.5, "test": 0.5}, "--val and --test: leave nothing to train on, together they are 1"),
    ):
        with pytest.raises(UserError, match=says):
            split(path, tmp_path, shares, 0)
    for pattern, says in (("(", "is no regular expression"), ("^[0-2]", "does not match 3.png; every image needs")):
        with pytest.raises(UserError, match=f"--group-by: .*{says}"):
            split(path, tmp_path, {"val": 0.5}, 0, group_by=pattern)
    with pytest.raises(UserError, match=r"4 images in 1 groups cannot be divided into 2 sets"):
        split(path, tmp_path, {"val": 0.5}, 0, group_by="png")
    with pytest.raises(UserError, match=r"--images: .*0\.png: the file is missing"):
        split(path, tmp_path, {"val": 0.5}, 0, images=tmp_path)
    (tmp_path / "val.json").write_text("mine")
    with pytest.raises(UserError, match=r"val\.json: is there already; --force replaces it"):
        split(path, tmp_path, {"val": 0.5}, 0)
    assert (tmp_path / "val.json").read_text() == "mine" and not (tmp_path / "train.json").exists()
    path.write_text(path.read_text().replace('"area": 25', '"area": NaN', 1))
    with pytest.raises(UserError, match=r"all\.json: holds NaN or Infinity, which are no JSON"):
        split(path, tmp_path, {"val": 0.5}, 0, force=True)
    assert (tmp_path / "val.json").read_text() == "mine" and not (tmp_path / "train.json").exists()
    path.rename(tmp_path / "train.json")
    with pytest.raises(UserError, match=r"train\.json: is the file to divide; name another folder"):
        split(tmp_path / "train.json", tmp_path, {"val": 0.5}, 0, force=True)
    content = json.loads((tmp_path / "train.json").read_text())
    content["annotations"][1]["image_id"] = 77
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"annotations\[1\]: image_id 77 is not in images"):
        split(tmp_path / "train.json", tmp_path / "out", {"val": 0.5}, 0)
