"""What a run says about its images at second 0, and pictures that calibration leaves out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.config.data import Split
from compress.config.deploy import Int8
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.pseudo.images import images_in
from compress.run.data_notes import notes_about
from compress.run.quantize import Quantizing
from deploy.core.errors import UserError


def write(folder: Path, names: list[str], boxes: list[list[float]], seed: int) -> Split:
    """A set of noise pictures of 40x30 pixels, with the boxes in the first of them."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / "images" / name)
    rows: list[dict[str, Any]] = [
        {"id": 1 + number, "image_id": 1, "category_id": 1, "bbox": box} for number, box in enumerate(boxes)
    ]
    images = [{"id": 1 + n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names)]
    categories = [{"id": 0, "name": "root"}, {"id": 1, "name": "cat"}]
    (folder / "set.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    return Split(annotations=folder / "set.json", images=folder / "images")


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Split, Split]:
    train = write(tmp_path / "train", ["a.png", "b.png", "c.png"], [[1, 1, 9, 9], [1, 1, 9, 9]], 0)
    return train, write(tmp_path / "val", ["v.png", "w.png"], [[i / 4, 1, 9, 9] for i in range(101)], 1)


def opened(split: Split) -> tuple[Split, CocoDetection]:
    return split, CocoDetection(split.annotations, split.images, eval_transform(40, 40))


def test_labels_that_cost_accuracy_are_named(sets: tuple[Split, Split]) -> None:
    train, val = sets
    assert notes_about(opened(train), opened(val)) == [
        f"note: {train.annotations}: annotation 2: is annotation 1 once more: same image, category and box",
        f"note: {train.annotations}: category 0: 'root' has no box; nothing teaches it",
        f"note: {val.annotations}: category 0: 'root' has no box; nothing teaches it",
        f"note: {val.annotations}: image 1: holds 101 objects; mAP counts 100 detections of a class, and "
        "an exported file gives deploy.max_detections, 100",
    ]


def test_pictures_of_one_colour_are_named(sets: tuple[Split, Split]) -> None:
    train, val = sets
    Image.new("RGB", (40, 30), (9, 9, 9)).save(train.images / "c.png")
    line = notes_about(opened(train), opened(val))[-1]
    assert line.startswith(
        f"note: {train.annotations}: 1 of 3 images that were looked at have odd pixels, the first is"
    )
    assert "c.png: nearly one colour" in line
    Image.new("RGB", (41, 30)).save(train.images / "c.png")
    with pytest.raises(UserError, match=r"c\.png: the file is 41x30 pixels, the annotations say 40x30"):
        notes_about(opened(train), opened(val))


def test_validation_images_that_are_trained_on_are_named(sets: tuple[Split, Split]) -> None:
    train, val = sets
    shutil.copy(train.images / "b.png", val.images / "w.png")
    line = notes_about(opened(train), opened(val))[-1]
    assert line.startswith(
        "warning: 1 of 2 validation images are also training images, so mAP is too high: w.png (= b."
    )


def test_calibration_leaves_validation_images_out(
    sets: tuple[Split, Split], capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = sets
    shutil.copy(train.images / "b.png", val.images / "w.png")
    found = Quantizing(Int8(), train, val).images
    assert [file.name for file in found.files] == ["a.png", "c.png"]
    assert "calibration: 1 of 3 images are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"deploy\.int8\.calibration \(--calibration\): all 3 calibration images are"):
        assert Quantizing(Int8(), train, train).images
    assert [file.name for file in Quantizing(Int8(calibration=train.images), None, val).images.files] == [
        "a.png",
        "c.png",
    ]


def test_pictures_behind_links_are_labelled_too(tmp_path: Path) -> None:
    write(tmp_path / "one", [f"{n}.png" for n in range(10)], [], 0)
    write(tmp_path / "two", [f"{n}.png" for n in range(3)], [], 1)
    (tmp_path / "one" / "images" / "more").symlink_to(tmp_path / "two" / "images")
    found = images_in(tmp_path / "one" / "images")
    assert len(found) == 13 and found.names[-1] == "more/2.png"
    rows = [
        {"id": 1, "file_name": "0.png", "width": None, "height": None},
        {"id": 2, "file_name": "1.png", "width": 40},
    ]
    (tmp_path / "list.json").write_text(json.dumps({"images": rows}))
    assert images_in(tmp_path / "list.json", tmp_path / "two" / "images").sizes == [None, None]
    (tmp_path / "two" / "images").rename(tmp_path / "two" / "gone")
    with pytest.raises(UserError, match=r"more: a link to .*images, where nothing is"):
        images_in(tmp_path / "one" / "images")
