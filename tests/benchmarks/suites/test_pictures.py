"""The variants of the suite `pictures` differ where they should, and only there."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks.lib.results import Row
from benchmarks.suites.pictures import VARIANTS, measure
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.red_rectangle_model import picture, write_red_model

BOX = (60, 40, 150, 100)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Row]:
    folder = tmp_path_factory.mktemp("pictures")
    write_red_model(folder / "red.onnx")
    names = ("a.jpg", "b.jpg")
    for name in names:
        Image.fromarray(picture((150, 200), BOX)).save(folder / name, quality=95)
    width, height = BOX[2] - BOX[0], BOX[3] - BOX[1]
    document = {
        "images": [{"id": i, "file_name": name, "width": 200, "height": 150} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": [*BOX[:2], width, height], "area": width * height,
             "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 7, "name": "red"}, {"id": 9, "name": "large red"}],
    }  # fmt: skip
    (folder / "val.json").write_text(json.dumps(document))
    found = measure(OnnxRunner(folder / "red.onnx"), folder / "val.json", folder, 2)
    return {(row.variant, row.metric): row for row in found}


def test_decoders_agree_and_a_hurried_one_does_not(rows: dict[tuple[str, str], Row]) -> None:
    furthest = {name: rows[name, "furthest"].value for name in VARIANTS}
    assert furthest["ours"] == furthest["decoded by Pillow"] == furthest["decoded by torchvision"] == 0
    assert furthest["decoded in a hurry"] > 0


def test_filters_differ_and_training_s_hardly(rows: dict[tuple[str, str], Row]) -> None:
    assert rows["resized by torchvision", "furthest"].value <= 2
    for name in ("torchvision, no antialias", "OpenCV, linear", "Pillow, nearest", "Pillow, Lanczos"):
        assert rows[name, "furthest"].value > 2, name


def test_map_is_that_of_the_detections(rows: dict[tuple[str, str], Row]) -> None:
    assert rows["ours", "mAP"].value > 50  # the box is found, to a pixel of the canvas
    for name in VARIANTS:
        assert rows[name, "mAP lost"].value == pytest.approx(rows["ours", "mAP"].value - rows[name, "mAP"].value)
