"""`deploy.open(file).detect(picture)`: every form of a picture, one and many, and the same figures as elsewhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deploy
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.runtimes.onnx import OnnxRunner
from deploy.runtimes.open import open_runner
from deploy.validate import validate
from tests.helpers.encoded_pictures import encode
from tests.helpers.red_rectangle_model import CARD, picture, write_red_model

ROOT = Path(__file__).parents[2]
RED = picture((480, 640), (100, 100, 300, 200))
PNG = encode(RED)


@pytest.fixture(scope="module")
def red_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("red") / "red.onnx"
    write_red_model(path)
    return path


@pytest.fixture(scope="module")
def model(red_onnx: Path) -> deploy.Model:
    return deploy.open(red_onnx, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b.png").write_bytes(PNG)
    (folder / "a.png").write_bytes(encode(picture((96, 128), None)))
    (folder / "c.png").write_bytes(encode(picture((300, 500), (50, 60, 450, 200))))
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_picture_in_any_form_is_the_same_picture(model: deploy.Model, folder: Path) -> None:
    found = model.detect(folder / "b.png")
    assert isinstance(found, deploy.Detections) and isinstance(found, Detections)
    assert [(one.box, one.class_name, one.category_id) for one in found] == [((100.0, 100.0, 300.0, 200.0), "red", 7)]
    assert found.path == folder / "b.png" and found.class_names == ("red", "large red")
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    for form in (str(folder / "b.png"), PNG, Image.open(io.BytesIO(PNG)), RED):
        assert model.detect(form) == found
    assert model.detect(RED).path is None and model.detect(PNG, min_score=0.99) == found[[]]


def test_many_pictures_are_a_list_in_their_order(model: deploy.Model, folder: Path) -> None:
    wanted = [model.detect(folder / name) for name in ("a.png", "b.png", "c.png")]
    assert [len(one) for one in wanted] == [0, 1, 1] and wanted[2][0].class_name == "large red"
    for batch_size in (1, 2, 8):
        found = model.detect(folder, batch_size=batch_size)
        assert found == wanted and [one.path.name for one in found] == ["a.png", "b.png", "c.png"]
    assert model.detect([folder / "b.png", PNG, RED, folder / "a.png"]) == [wanted[1]] * 3 + wanted[:1]
    assert model.detect(np.stack([RED, RED])) == [wanted[1]] * 2
    assert model.detect([]) == [] and list(model.detect_each(iter([PNG]))) == [wanted[1]]


def test_pictures_are_read_when_they_are_needed(model: deploy.Model, folder: Path) -> None:
    """Never more than two batches are in memory."""
    read: list[int] = []

    def pictures() -> object:
        for number in range(40):
            read.append(number)
            yield RED

    stream = model.detect_each(pictures(), batch_size=4)  # type: ignore[arg-type]
    assert len(next(stream)) == 1 and len(read) <= 8
    assert len(list(stream)) == 39


def test_a_picture_turned_by_exif_is_found_where_it_is_seen(model: deploy.Model, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RED).save(path, quality=100, exif=exif)
    (one,) = model.detect(path)
    assert model.detect(path) == model.detect(Image.open(path)) == model.detect(path.read_bytes())
    x1, y1, x2, y2 = one.box
    pixels = load_image(path)
    assert pixels.shape == (640, 480, 3)
    assert (pixels[int(y1 + y2) // 2, int(x1 + x2) // 2] > [200, 0, 0]).any() and x2 - x1 < y2 - y1


def test_what_is_no_picture_is_said_in_one_line(model: deploy.Model, folder: Path, tmp_path: Path) -> None:
    for pictures, message in (
        (folder / "none.png", "the file is missing"),
        (folder / "notes.txt", "cannot be read as an image"),
        (b"hello", "cannot be read as an image"),
        (np.zeros((4, 4), np.uint8), r"pixels must be uint8 \[height, width, 3\], got uint8 \[4, 4\]"),
        (np.zeros((2, 4, 4, 3), np.float32), "pixels must be uint8"),
        (tmp_path, "no images in it"),
    ):
        with pytest.raises(UserError, match=message) as error:
            model.detect(pictures)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        model.detect([PNG], batch_size=0)
    with pytest.raises(UserError, match=r"ends in none of .onnx, .xml, .engine"):
        deploy.open(folder / "notes.txt")


def test_validate_and_benchmark_are_those_of_the_package(model: deploy.Model, red_onnx: Path, folder: Path) -> None:
    images = [{"id": 1, "file_name": "b.png"}, {"id": 2, "file_name": "c.png"}]
    boxes = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [100, 100, 200, 100]},
        {"id": 2, "image_id": 2, "category_id": 9, "bbox": [50, 60, 400, 100]},
    ]
    categories = [{"id": 7, "name": "red"}, {"id": 9, "name": "large red"}]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    (wanted,) = validate({"red": OnnxRunner(red_onnx, threads=1)}, file, folder)
    result = model.validate(file, folder, reference=model)
    assert result.metrics == wanted.metrics and 0 < result.metrics.map < 100
    assert (result.map_drop, result.gate, result.agreement.share) == (0.0, "pass", 1.0)
    with pytest.raises(UserError, match=r"reference: needs a model, as open\(\) gives it, got PosixPath"):
        model.validate(file, folder, reference=red_onnx)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none: no such folder"):
        model.benchmark(folder / "none")
    report = model.benchmark(folder, seconds=0.05, rounds=2, warm_up_seconds=0.0, scopes=("end_to_end",))
    assert [cell.runner for cell in report.cells] == [str(red_onnx)]


def test_any_runner_becomes_a_model(red_onnx: Path) -> None:
    model = deploy.Model(open_runner(red_onnx, threads=1))
    assert model.name == "red" and model.card == CARD and len(model.detect(RED)) == 1
    assert repr(model) == "<red: 2 classes, input 96x128, onnxruntime cpu>"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deploy.nothing  # noqa: B018


def test_a_runner_that_gives_something_else_is_named(red_onnx: Path) -> None:
    class Wrong(OnnxRunner):
        def __call__(self, images: np.ndarray) -> Any:
            return 1, 2

    with pytest.raises(UserError, match="red: gives a value of type tuple, not a DetectionBatch"):
        deploy.Model(Wrong(red_onnx, threads=1)).detect(RED)


def test_no_torch_is_loaded(red_onnx: Path, folder: Path) -> None:
    code = (
        "import sys, deploy\n"
        "assert 'numpy' not in sys.modules\n"
        f"found = deploy.open({str(red_onnx)!r}).detect({str(folder / 'b.png')!r})\n"
        "print(len(found), *({'torch', 'compress', 'kernels'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
