"""Files whose boxes are nonsense are refused in one line; poor detectors never are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from compress import cli
from compress.config.teacher import Onnx, OnnxInput, OnnxOutput, Source
from compress.teachers.base import BoxTeacher
from compress.teachers.first_look import BOXES, IMAGES, FirstLook
from compress.teachers.load import open_teacher
from compress.teachers.results import ResultsTeacher
from deploy.core.errors import UserError
from tests.helpers.teacher_files import CPU, constant, noise, sample

SIZE = (480, 640)


def look(boxes: np.ndarray, images: int = 4, size: tuple[int, int] = SIZE) -> None:
    first = FirstLook("a.onnx", "look again")
    for _ in range(images):
        first.look(boxes.astype(np.float32), size)


def centred(rng: np.random.Generator, sides: tuple[float, float], number: int = 30) -> np.ndarray:
    """Boxes with a centre anywhere on the canvas."""
    centre, size = rng.uniform(0, (640, 480), (number, 2)), rng.uniform(*sides, (number, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], 1)


def one_place(rng: np.random.Generator) -> np.ndarray:
    return np.tile([[300.0, 200, 340, 260]], (30, 1))


def in_the_padding(rng: np.random.Generator) -> np.ndarray:
    return centred(rng, (10, 40)) * [1, 0.1, 1, 0.1] + [0, 430, 0, 430]


def a_corner_of_the_image(rng: np.random.Generator) -> np.ndarray:
    """A station's sign in the corner of each picture, and nothing else."""
    return np.tile([[2.0, 2, 40, 30]], (30, 1)) + rng.normal(0, 1, (30, 4))


POOR: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "boxes of any place and size": lambda rng: centred(rng, (2, 400)),
    "tiny objects": lambda rng: centred(rng, (1.5, 4)),
    "flat objects": lambda rng: centred(rng, (0.1, 300)),
    "one place": one_place,
    "the padding": in_the_padding,
    "a corner of the image": a_corner_of_the_image,
    "half of it nonsense": lambda rng: np.concatenate([centred(rng, (2, 400)), rng.uniform(0, 4, (30, 4))]),
}


@pytest.mark.parametrize("kind", POOR)
def test_a_poor_detector_is_none_of_that(kind: str) -> None:
    for seed in range(20):
        look(POOR[kind](np.random.default_rng(seed)))


NONSENSE: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], str]] = {
    "shares as pixels": (lambda rng: centred(rng, (50, 200)) / [640, 480, 640, 480], "are smaller than a pixel"),
    "pixels as shares": (lambda rng: (10 + centred(rng, (5, 9)).clip(0)) * [640, 480, 640, 480], "lie outside"),
    "offsets": (
        lambda rng: np.tile([0, 0, 4, 4], (30, 1)) + rng.uniform(0, 4, (30, 4)),
        "lie within 8 pixels of a corner",
    ),
    "turned over": (lambda rng: centred(rng, (5, 90))[:, [2, 3, 0, 1]], "second corner before the first"),
    "infinite": (lambda rng: np.full((30, 4), np.inf), "second corner before the first"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused(kind: str) -> None:
    made, said = NONSENSE[kind]
    with pytest.raises(UserError, match=rf"a.onnx: of the first 30 boxes, in 1 image, .*{said}.*; look again$"):
        look(made(np.random.default_rng(0)))


def test_few_boxes_say_nothing_and_later_images_are_not_looked_at() -> None:
    bad = np.zeros((BOXES - 1, 4))
    look(bad, images=1)
    with pytest.raises(UserError, match=r"in 2 images"):
        look(bad, images=2)
    first = FirstLook("a.onnx", "")
    for _ in range(IMAGES):
        first.look(np.empty((0, 4)), SIZE)
    first.look(np.zeros((100, 4)), SIZE)


# ---------------------------------------------------------------------------------------- through the teachers


def undecoded(folder: Path) -> Path:
    """What YOLOX's export makes by default: 20 cells of [1, 336, 5 + 2] with an object."""
    rng = np.random.default_rng(0)
    rows = np.zeros((1, 336, 7), np.float32)
    rows[0, 40:60] = np.concatenate([rng.normal(0.3, 0.5, (20, 2)), rng.normal(1, 0.5, (20, 2)), np.ones((20, 3))], 1)
    return constant(folder / "yolox_raw.onnx", {"output": rows})


OUTPUT: dict[str, Any] = {"combined": "output", "columns": "box_objectness_classes", "box_format": "cxcywh"}


def opened(path: Path, output: dict[str, Any], **more: Any) -> BoxTeacher:
    source = Onnx(file=path, input=OnnxInput(), output=OnnxOutput(**output), class_names=("a", "b"), **more)
    return open_teacher(Source(onnx=source), CPU)


def test_a_grid_that_nobody_decodes(tmp_path: Path) -> None:
    path, image = undecoded(tmp_path), [sample(noise(96, 128))]
    with pytest.raises(UserError, match=r"yolox_raw.onnx: of the first 40 boxes.*output.strides, .*check_boxes: false"):
        opened(path, OUTPUT).detect(image, score_threshold=0.05)
    (found,) = opened(path, OUTPUT, check_boxes=False).detect(image, score_threshold=0.05)
    assert len(found.boxes) and found.boxes.max() < 10
    (found,) = opened(path, OUTPUT | {"strides": (8, 16, 32)}).detect(image, score_threshold=0.05)
    assert found.boxes[:, 2].max() > 100  # cells 40 to 59 of 16 a row: the third and the fourth


def test_pseudo_label_writes_nothing_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.fromarray(noise(96, 128, number)).save(tmp_path / "images" / f"{number}.png")
    teacher = {"onnx": {"file": str(undecoded(tmp_path)), "class_names": ["a", "b"], "output": OUTPUT}}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump({"teacher": teacher}))
    words = ["pseudo-label", str(tmp_path / "teacher.yaml"), "--images", str(tmp_path / "images")]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--out", str(tmp_path / "pseudo.json")])
    assert stopped.value.code == 2 and not (tmp_path / "pseudo.json").exists()
    said = capsys.readouterr().err.strip().splitlines()
    assert "those are no objects" in said[-1] and "Traceback" not in "".join(said)


def test_results_in_shares_of_the_sides(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [{"image_id": 1, "category_id": 1, "bbox": [0.1, 0.2, 0.3, 0.4], "score": 0.5}] * BOXES
    path.write_text(json.dumps(rows))
    with pytest.raises(
        UserError, match=r"results.json: bbox must be .* in pixels .*; 10 of 10 are smaller than a pixel"
    ):
        ResultsTeacher(path, {1: "a"})
    path.write_text(json.dumps(rows[1:]))
    assert ResultsTeacher(path, {1: "a"}).class_names == ("a",)
