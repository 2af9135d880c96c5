"""Descriptions of docs/teachers.md against the libraries that the files come from: pixels that the network gets, and
boxes that the library makes of what it gives (numbers made once with each library, see docs/oracles.md)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from compress.config.recipe import load_teacher_file
from compress.config.teacher import OnnxInput, Source
from compress.teachers.load import open_teacher
from compress.teachers.onnx_input import prepare, resized
from tests.helpers.teacher_files import CPU, constant, sample
from tests.oracles import TEACHERS

PAGE = Path(__file__).parents[3] / "docs" / "teachers.md"
PLACES = [(0, 0, 0), (1, 3, 1), (21, 5, 2), (22, 64, 0), (40, 101, 1), (63, 127, 2), (64, 64, 0), (80, 10, 1),
          (104, 126, 2), (105, 127, 0), (127, 127, 1)]  # fmt: skip
"""Of each library's input the rows, columns and channels that were written down."""


def picture(height: int, width: int) -> np.ndarray:
    """The picture that the libraries were given."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * x * (3 + c) + y * y * (5 - c) + 7 * x * y + 40 * c) // 16 % 256).astype(np.uint8)


def rough(height: int, width: int) -> np.ndarray:
    """A picture whose neighbours differ much, for filters."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((37 * x * x + 61 * y * y + 29 * x * y + 40 * c) % 256).astype(np.uint8)


def shown(file: str, folder: Path) -> Source:
    """The description of docs/teachers.md whose `file` is this one, for the file of that name in `folder`."""
    for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        if yaml.safe_load(block)["teacher"].get("onnx", {}).get("file") == file:
            (folder / "teacher.yaml").write_text(block.replace(file, str(folder / file)))
            return load_teacher_file(folder / "teacher.yaml")
    raise AssertionError(f"docs/teachers.md does not show {file}")


def grid(rows: list[list[Any]], number: int) -> np.ndarray:
    """[1, n, C] with these rows, each after its place, and nothing likely elsewhere."""
    array = np.zeros((1, number, len(rows[0][1:])), np.float32)
    for place, *values in rows:
        array[0, place] = values
    return array


def found(source: Source, case: dict[str, Any]) -> tuple[np.ndarray, list[float], list[str]]:
    teacher = open_teacher(source, CPU)
    (one,) = teacher.detect([sample(picture(*case["picture"]))], score_threshold=case["threshold"])
    assert teacher.class_names is not None
    return one.boxes.numpy(), one.scores.tolist(), [teacher.class_names[label] for label in one.labels.tolist()]


def check(source: Source, case: dict[str, Any], *, names: list[str]) -> None:
    """Compare with the library's boxes, best first, and with the pixels that it makes."""
    boxes, scores, labels = found(source, case)
    order = np.argsort(-np.array(case["scores"]), kind="stable")
    assert labels == [names[case["labels"][index]] for index in order]
    np.testing.assert_allclose(scores, np.array(case["scores"])[order], atol=2e-5)
    np.testing.assert_allclose(boxes, np.array(case["boxes"])[order], atol=2e-3)
    if "pixels" in case:
        assert source.onnx is not None and source.onnx.input is not None
        pixels, _ = prepare(picture(*case["picture"]), source.onnx.input, (case["canvas"], case["canvas"]))
        np.testing.assert_allclose([pixels[0, c, y, x] for y, x, c in PLACES], case["pixels"], atol=5e-6)


def test_ultralytics_with_suppression_to_be_done(tmp_path: Path) -> None:
    """Among the boxes: two alike inside the picture that stay, two classes of one box of which one counts."""
    case = TEACHERS["ultralytics_raw"]
    constant(tmp_path / "yolo11n.onnx", {"output0": np.array(case["output"], np.float32)[None]})
    check(shown("yolo11n.onnx", tmp_path), case, names=["cat", "dog", "bird"])


def test_ultralytics_in_rows(tmp_path: Path) -> None:
    case = TEACHERS["ultralytics_rows"]
    constant(tmp_path / "yolo26n.onnx", {"output0": np.array(case["output"], np.float32)[None]})
    check(shown("yolo26n.onnx", tmp_path), case, names=["cat", "dog", "bird"])


@pytest.mark.parametrize("decoded", [False, True])
def test_yolox(tmp_path: Path, decoded: bool) -> None:
    """Its boxes are divided by the ratio before rounding, ours by what the picture of 250 x 166 became: 128 x 84."""
    case = TEACHERS["yolox"]
    rows = grid(case["decoded" if decoded else "raw"], case["rows"])
    constant(tmp_path / "yolox_s.onnx", {"output": rows})
    source = shown("yolox_s.onnx", tmp_path)
    assert source.onnx is not None and source.onnx.output is not None
    output = source.onnx.output.model_copy(update={"nms_threshold": 0.45} | ({"strides": None} if decoded else {}))
    source = Source(onnx=source.onnx.model_copy(update={"output": output}))
    height, width = case["picture"]
    boxes = np.array(case["boxes"]) * case["ratio"] / ([128 / width, 84 / height] * 2)
    check(source, case | {"boxes": boxes.clip(0, [width, height] * 2)}, names=["cat", "dog", "bird"])


@pytest.mark.parametrize(("key", "file"), [("rfdetr_own", "rf-detr.onnx"), ("rfdetr_coco", "rf-detr-nano-coco.onnx")])
def test_rf_detr(tmp_path: Path, key: str, file: str) -> None:
    """Rows of the library for what has no class are left out; there are some."""
    case = dict(TEACHERS[key])
    outputs = {"dets": case["dets"], "labels": case["labels_output"]}
    constant(tmp_path / file, {name: np.array(rows, np.float32)[None] for name, rows in outputs.items()})
    source = shown(file, tmp_path)
    assert source.onnx is not None and source.onnx.class_names is not None
    names = [str(name) for name in source.onnx.class_names]
    real = [index for index, label in enumerate(case["labels"]) if label < len(names) and names[label] != "N/A"]
    assert 0 < len(real) < len(case["labels"])
    for what in ("boxes", "scores", "labels"):
        case[what] = [case[what][index] for index in real]
    check(source, case, names=names)


@pytest.mark.parametrize(
    ("key", "file"), [("transformers_sigmoid", "dfine.onnx"), ("transformers_softmax", "detr.onnx")]
)
def test_transformers(tmp_path: Path, key: str, file: str) -> None:
    case = TEACHERS[key]
    outputs = {name: np.array(case[name], np.float32)[None] for name in ("pred_boxes", "logits")}
    constant(tmp_path / file, outputs, (1, 3, "height", "width") if file == "detr.onnx" else (1, 3, 128, 128))
    check(shown(file, tmp_path), case, names=["cat", "dog", "bird"])


def test_anchors_after_the_published_formula(tmp_path: Path) -> None:
    """Grids of YOLOv5 and YOLOv7, as each of their exports leaves them, against the formula in Python's floats."""
    source = shown("yolov7.onnx", tmp_path)
    assert source.onnx is not None and source.onnx.output is not None and source.onnx.output.anchors is not None
    rng = np.random.default_rng(3)
    levels = [rng.normal(-1, 0.5, (3, 128 // stride, 128 // stride, 8)).astype(np.float32) for stride in (8, 16, 32)]
    for level in levels:
        level[..., 4] = -9
    expected = []
    for level, anchor, y, x, label in [(0, 1, 5, 9, 2), (1, 0, 3, 2, 0), (2, 2, 1, 3, 1)]:
        row = levels[level][anchor, y, x]
        row[4:] = [2.0, -4.0, -4.0, -4.0]
        row[5 + label] = 1.5 - label
        s = [1 / (1 + np.exp(-float(value))) for value in row]
        stride, (width, height) = (8, 16, 32)[level], source.onnx.output.anchors[level][anchor]
        cx, cy = (2 * s[0] - 0.5 + x) * stride, (2 * s[1] - 0.5 + y) * stride
        w, h = (2 * s[2]) ** 2 * width, (2 * s[3]) ** 2 * height
        corners = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).clip(0, 128)
        expected.append((corners, s[4] * s[5 + label], ("cat", "dog", "bird")[label]))
    case = {"picture": [128, 128], "threshold": 0.25}
    names = ("p3", "p4", "p5")
    channels_first = [level.transpose(0, 3, 1, 2).reshape(1, -1, *level.shape[1:3]) for level in levels]
    together = np.concatenate([level.reshape(-1, 8) for level in levels])[None]
    forms: list[tuple[dict[str, np.ndarray], Any]] = [
        (dict(zip(names, [level[None] for level in levels], strict=True)), names),
        (dict(zip(names, channels_first, strict=True)), names),
        (dict(zip(names, [level.reshape(1, -1, 8) for level in levels], strict=True)), names),
        ({"all": together}, "all"),
    ]
    for outputs, combined in forms:
        constant(tmp_path / "yolov7.onnx", outputs)
        output = source.onnx.output.model_copy(update={"combined": combined})
        boxes, scores, labels = found(Source(onnx=source.onnx.model_copy(update={"output": output})), case)
        assert len(boxes) == 3
        for corners, score, label in expected:
            place = int(np.abs(np.array(scores) - score).argmin())
            np.testing.assert_allclose(boxes[place], corners, atol=1e-3)
            assert scores[place] == pytest.approx(score, abs=1e-5) and labels[place] == label


def test_objectness_of_its_own(tmp_path: Path) -> None:
    outputs = {
        "boxes_xyxy": [[10, 20, 60, 70], [64, 64, 100, 120]],
        "obj_logits": [[0.0], [2.0]],
        "cls_logits": [[1.0, -9.0, -9.0], [-9.0, -9.0, 0.0]],
    }
    constant(tmp_path / "yololite.onnx", {name: np.array(rows, np.float32)[None] for name, rows in outputs.items()})
    boxes, scores, labels = found(shown("yololite.onnx", tmp_path), {"picture": [128, 128], "threshold": 0.25})
    one = torch.tensor([0.0, 1.0, 2.0]).sigmoid().tolist()
    np.testing.assert_allclose(scores, [one[2] * one[0], one[0] * one[1]], atol=1e-6)
    assert labels == ["bird", "cat"] and boxes.tolist() == [[64, 64, 100, 120], [10, 20, 60, 70]]


@pytest.mark.parametrize("case", TEACHERS["filters"]["sizes"], ids=lambda case: "x".join(map(str, case["size"])))
def test_filters(case: dict[str, Any]) -> None:
    """OpenCV's to the bit; torch's in floats; Pillow's is another one where a picture gets smaller."""
    image, size = rough(*TEACHERS["filters"]["picture"]), (case["size"][0], case["size"][1])
    np.testing.assert_array_equal(resized(image, size, "opencv"), case["opencv"])
    np.testing.assert_allclose(resized(image, size, "torch"), case["torch"], atol=1e-3)
    assert np.abs(resized(image, size, "opencv") - np.array(case["torch"])).max() < 1
    if size[0] < image.shape[0]:
        assert np.abs(resized(image, size, "pillow").astype(int) - np.array(case["opencv"])).max() > 10


def test_opencv_halves_by_the_mean_of_four() -> None:
    np.testing.assert_array_equal(resized(rough(8, 14), (4, 7), "opencv"), TEACHERS["filters"]["half"])


@pytest.mark.parametrize(("rounding", "inside"), [("nearest", (64, 21)), ("even", (64, 20)), ("down", (64, 20))])
def test_sides_of_a_letterbox(rounding: Any, inside: tuple[int, int]) -> None:
    """Of 128 x 41 on 64 x 64 the short side is 20.5."""
    how = OnnxInput(size=(64, 64), rounding=rounding, pad_color=200)
    pixels, placed = prepare(np.zeros((128, 41, 3), np.uint8), how, (64, 64))
    assert placed.scale == (inside[1] / 41, inside[0] / 128)
    assert (pixels[0, 0, 0] == 0).sum() == inside[1]
