"""Which images keep their labels, and sets that are joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compress.data.coco import CocoDetection
from compress.data.concat import ConcatDataset
from compress.data.label_split import choose, split_labels
from compress.data.loader import train_loader
from compress.data.transforms import eval_transform, train_transform


def content(classes_of: list[list[int]]) -> dict[str, Any]:
    """One image for each list of category ids."""
    images = [{"id": 10 * i, "file_name": f"{i}.png", "width": 40, "height": 40} for i in range(len(classes_of))]
    annotations = [
        {"image_id": 10 * i, "category_id": c, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0}
        for i, classes in enumerate(classes_of)
        for c in classes
    ]
    for index, row in enumerate(annotations):
        row["id"] = index + 1
    categories = [{"id": c, "name": f"c{c}"} for c in range(1, 6)]
    return {"images": images, "annotations": annotations, "categories": categories}


scenes = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=25)


@settings(max_examples=100)
@given(scenes, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_the_choice(classes_of: list[list[int]], fraction: float, other: float, seed: int) -> None:
    document = content(classes_of)
    low, high = sorted((fraction, other))
    chosen = choose(document, low, seed)
    assert len(chosen) == (0 if low == 0 else max(1, round(low * len(classes_of))))
    assert chosen <= choose(document, high, seed)
    shuffled = {**document, "images": document["images"][::-1], "annotations": document["annotations"][::-1]}
    assert choose(shuffled, low, seed) == chosen
    shown = {c for i, classes in enumerate(classes_of) if 10 * i in chosen for c in classes}
    if len(chosen) >= 5:  # room for one image a class
        assert shown == {c for classes in classes_of for c in classes}


def test_seeds_choose_others() -> None:
    document = content([[1]] * 50)
    choices = [frozenset(choose(document, 0.2, seed)) for seed in range(5)]
    assert len(set(choices)) == 5
    assert choices[0] == frozenset(choose(content([[1]] * 50), 0.2, 0))


def test_the_files(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(content([[1], [1], [2], [], [1, 3], [1]])))
    labelled, rest = tmp_path / "labelled.json", tmp_path / "rest.json"
    found = split_labels(tmp_path / "all.json", 0.5, 1, labelled=labelled, unlabelled=rest)
    kept, others = json.loads(labelled.read_text()), json.loads(rest.read_text())
    assert (found.labelled, found.unlabelled, found.missing) == (3, 3, ("c4", "c5"))
    ids = {row["id"] for row in kept["images"]}
    assert {20, 40} <= ids and ids | {row["id"] for row in others["images"]} == set(range(0, 60, 10))
    assert others["annotations"] == [] and others["categories"] == kept["categories"]
    every = content([[1], [1], [2], [], [1, 3], [1]])["annotations"]
    assert kept["annotations"] == [row for row in every if row["image_id"] in ids]
    split_labels(tmp_path / "all.json", 0, 1, labelled=labelled, unlabelled=rest)
    assert json.loads(labelled.read_text())["images"] == [] and len(json.loads(rest.read_text())["images"]) == 6


@pytest.fixture
def pair(tmp_path: Path) -> list[CocoDetection]:
    parts = []
    for name, scene in (("a", [[1], [2], [1]]), ("b", [[3], []])):
        document = content(scene)
        (tmp_path / name).mkdir()
        for index, row in enumerate(document["images"]):
            shade = np.full((40, 40, 3), 10 * index + 100 * (name == "b"), np.uint8)
            Image.fromarray(shade).save(tmp_path / name / row["file_name"])
        if name == "b":
            document["info"] = {"coverage": [3]}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
        parts.append(CocoDetection(tmp_path / f"{name}.json", tmp_path / name, train_transform(32, 32, 0.5)))
    return parts


def test_joined_sets_give_what_each_gives(pair: list[CocoDetection]) -> None:
    joined = ConcatDataset(pair)
    assert len(joined) == 5 and joined.num_boxes == 4 and len(joined.aspect_ratios) == 5
    for index, (part, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        for key, own in ((index, place), ((index, 7), (place, 7))):
            torch.manual_seed(3)
            image, target = joined[key]
            torch.manual_seed(3)
            expected, same = pair[part][own]
            assert torch.equal(image, expected) and torch.equal(target.boxes, same.boxes)
            assert (target.unlabeled_classes is None) == (part == 0)
    for outside in (5, -1):
        with pytest.raises(IndexError):
            joined[outside]
    batch = next(iter(train_loader(joined, batch_size=5, seed=0, workers=0)))
    assert len({int(image.float().mean()) for image in batch.images}) == 5


def test_sets_of_other_classes_are_not_joined(pair: list[CocoDetection], tmp_path: Path) -> None:
    document = content([[1]])
    document["categories"][0]["name"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(document))
    other = CocoDetection(tmp_path / "other.json", tmp_path / "a", eval_transform(32, 32))
    with pytest.raises(ValueError, match="same categories"):
        ConcatDataset([pair[0], other])
