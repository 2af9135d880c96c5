"""ONNX teachers: files of this project, foreign ones that find a rectangle, and the arithmetic of descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.config.teacher import Onnx, OnnxInput, OnnxOutput, Source
from compress.teachers.base import BoxTeacher
from compress.teachers.load import open_teacher, source_of
from compress.teachers.onnx import suppressed
from compress.teachers.onnx_input import Placed, prepare
from compress.teachers.onnx_output import boxes_of
from deploy.core.errors import UserError
from tests.helpers.teacher_files import (
    CENTRE,
    CORNERS,
    CPU,
    PIXELS,
    SHARES,
    constant,
    deployable,
    noise,
    rectangle,
    sample,
    spot,
)

NAMES = ("a", "b", "c")
SEPARATE = "float[N,4] boxes, float[N] scores, int64[N] labels"
PLAIN = """
  shape = Constant<value_ints=[1,4]>()
  boxes = Reshape(box, shape)
  scores = Constant<value_floats=[0.75]>()
  labels = Constant<value_ints=[2]>()
"""


def foreign(path: Path, output: dict[str, Any], names: tuple[str, ...] = NAMES, **how: Any) -> BoxTeacher:
    source = Onnx(file=path, input=OnnxInput(**how), output=OnnxOutput(**output), class_names=names)
    return open_teacher(Source(onnx=source), CPU)


@pytest.mark.parametrize("resize", ["letterbox", "letterbox_center", "stretch", "keep_ratio"])
@pytest.mark.parametrize("units", ["pixels", "normalised"])
@pytest.mark.parametrize("box_format", ["xyxy", "cxcywh"])
def test_the_rectangle_is_found_where_it_is(tmp_path: Path, resize: str, units: str, box_format: str) -> None:
    """A network that sees a rectangle after any resize and in any form of boxes; the truth is the drawing."""
    corners = CORNERS if box_format == "xyxy" else CENTRE
    scaled = PIXELS if units == "pixels" else SHARES
    path = spot(tmp_path / "spot.onnx", rest=corners + scaled + PLAIN, outputs=SEPARATE)
    output = {"boxes": "boxes", "scores": "scores", "labels": "labels", "box_format": box_format, "box_units": units}
    teacher = foreign(path, output, resize=resize, size=(96, 128), pad_color=0)
    for height, width, box in [(60, 150, (20, 10, 130, 40)), (150, 60, (5, 30, 40, 120)), (96, 128, (0, 0, 128, 96))]:
        (found,) = teacher.detect([sample(rectangle(height, width, box, (255, 255, 255)))], score_threshold=0.05)
        one_pixel = max(height / 96, width / 96, 1.0)  # of the canvas, in pixels of the image, at the most
        np.testing.assert_allclose(found.boxes[0], box, atol=one_pixel)
        assert found.labels.tolist() == [2] and found.scores.tolist() == [0.75]


def test_channels_scale_and_layout(tmp_path: Path) -> None:
    """A blue rectangle, for a network that looks at the first channel of BGR, normalised, channels last."""
    path = spot(tmp_path / "spot.onnx", rest=CORNERS + PIXELS + PLAIN, outputs=SEPARATE, shape="H,W,3", limit=0.9,
                channel=3)  # fmt: skip
    output = {"boxes": "boxes", "scores": "scores", "labels": "labels"}
    how = {"size": (64, 64), "layout": "nhwc", "divide_by": 255.0, "mean": (0.5, 0.1, 0.1), "std": (0.5, 1.0, 1.0)}
    image = sample(rectangle(64, 64, (10, 20, 30, 50), (0, 0, 250)))
    (found,) = foreign(path, output, color="bgr", pad_color=0, **how).detect([image], score_threshold=0.05)
    assert found.boxes.tolist() == [[10, 20, 30, 50]]
    (found,) = foreign(path, output, color="rgb", pad_color=0, **how).detect([image], score_threshold=0.05)
    assert len(found.boxes) == 0  # its first channel is dark: a box from the far side to the near one has no area


def test_rows_of_box_score_label_and_scores_a_class(tmp_path: Path) -> None:
    image = sample(rectangle(64, 64, (10, 20, 30, 50), (255, 255, 255)))
    rows = """
  more = Constant<value_floats=[0.5, 1.0]>()
  row = Concat<axis=0>(box, more)
  shape = Constant<value_ints=[1,1,6]>()
  out = Reshape(row, shape)
"""
    path = spot(tmp_path / "rows.onnx", rest=CORNERS + PIXELS + rows, outputs="float[1,N,6] out")
    (found,) = foreign(path, {"combined": "out"}, size=(64, 64)).detect([image], score_threshold=0.05)
    assert (found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()) == ([[10, 20, 30, 50]], [0.5], [1])

    columns = """
  more = Constant<value_floats=[0.25, 0.75, 0.0]>()
  row = Concat<axis=0>(box, more)
  shape = Constant<value_ints=[1,7,1]>()
  out = Reshape(row, shape)
"""
    path = spot(tmp_path / "columns.onnx", rest=CENTRE + PIXELS + columns, outputs="float[1,7,N] out")
    output = {"combined": "out", "columns": "box_classes", "transposed": True, "box_format": "cxcywh"}
    (found,) = foreign(path, output, size=(64, 64)).detect([image], score_threshold=0.05)
    assert found.boxes.tolist() == [[10, 20, 30, 50]] * 2
    assert (found.scores.tolist(), found.labels.tolist()) == ([0.75, 0.25], [1, 0])


def test_a_second_input_gets_the_size(tmp_path: Path) -> None:
    """Input of the image's size, as in RT-DETR's own export: boxes are multiplied by it in the file."""
    rest = """
  scale = Cast<to=1>(wh)
  twice = Concat<axis=1>(scale, scale)
  all = Squeeze(twice)
  scaled = Mul(share, all)
"""
    rest = CORNERS + SHARES.replace("box =", "share =") + rest + PLAIN.replace("Reshape(box", "Reshape(scaled")
    path = spot(tmp_path / "spot.onnx", rest=rest, outputs=SEPARATE, more=", int64[1,2] wh")
    output = {"boxes": "boxes", "scores": "scores", "labels": "labels"}
    teacher = foreign(path, output, name="pixels", size_name="wh", size=(64, 96), resize="stretch")
    (found,) = teacher.detect([sample(rectangle(128, 96, (10, 20, 30, 50), (255, 255, 255)))], score_threshold=0.05)
    assert found.boxes.tolist() == [[10, 20, 30, 50]]
    with pytest.raises(UserError, match=r"spot.onnx: needs input 'wh' as well"):
        foreign(path, output, name="pixels", size=(64, 96))
    with pytest.raises(UserError, match=r"has 2 inputs \(pixels, wh\); name that of the image in input.name"):
        foreign(path, output, size=(64, 96))


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return deployable(tmp_path / "ours.onnx")


def test_a_file_of_this_project(ours: Path) -> None:
    """Several images of several sizes in one call, each enlarged or made smaller as the card says."""
    teacher = open_teacher(str(ours), CPU)
    assert teacher.class_names == NAMES and teacher.detector is None
    drawn = [(64, 96, (10, 20, 30, 50)), (128, 192, (100, 30, 180, 90)), (32, 32, (4, 8, 30, 20))]
    pictures = [sample(rectangle(height, width, box, (255, 255, 255))) for height, width, box in drawn]
    found = teacher.detect(pictures, score_threshold=0.25)
    for (height, width, box), one in zip(drawn, found, strict=True):
        np.testing.assert_allclose(one.boxes, [box], atol=max(height / 64, width / 96, 1.0))
        canvas_px = min(64 / height, 96 / width)
        assert one.scores[0] == pytest.approx(box[2] * canvas_px / 96, abs=0.02) and one.labels.tolist() == [0]
    assert len(teacher.detect(pictures[:1], score_threshold=0.35)[0].scores) == 0  # its score is 30 / 96


# ----------------------------------------------------------------------- the arithmetic, against slow Python

share = st.floats(0.05, 0.95)
boxes_strategy = st.lists(st.tuples(share, share, share, share), min_size=1, max_size=5)


def expected(box: tuple[float, float, float, float], how: OnnxOutput, placed: Placed) -> list[float]:
    """A box of the file's format in pixels of the image, side by side in Python floats."""
    a, b, c, d = box
    left, top, right, bottom = {
        "xyxy": (a, b, c, d),
        "yxyx": (b, a, d, c),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    }[how.box_format]
    height, width = placed.canvas
    if how.box_units == "normalised":
        left, right, top, bottom = left * width, right * width, top * height, bottom * height
    return [
        (left - placed.offset[0]) / placed.scale[0],
        (top - placed.offset[1]) / placed.scale[1],
        (right - placed.offset[0]) / placed.scale[0],
        (bottom - placed.offset[1]) / placed.scale[1],
    ]


@settings(max_examples=150)
@given(
    boxes=boxes_strategy,
    box_format=st.sampled_from(["xyxy", "yxyx", "xywh", "cxcywh"]),
    units=st.sampled_from(["pixels", "normalised"]),
    batched=st.booleans(),
    background=st.sampled_from(["none", "first", "last"]),
    activation=st.sampled_from(["none", "sigmoid", "softmax"]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scores_a_class(
    boxes: list[tuple[float, float, float, float]],
    box_format: Any,
    units: Any,
    batched: bool,
    background: Any,
    activation: Any,
    transposed: bool,
    seed: int,
) -> None:
    K, placed = 3, Placed((64, 96), (0.5, 0.4), (7, 3))
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(len(boxes), K + (background != "none")))
    if activation == "none":
        raw = rng.random(raw.shape)
    how = OnnxOutput(
        combined="out", columns="box_classes", transposed=transposed, box_format=box_format, box_units=units,
        background=background, activation=activation,
    )  # fmt: skip
    rows = np.concatenate([np.array(boxes), raw], 1).astype(np.float32)
    rows = rows.T if transposed else rows
    found, scores, labels = boxes_of({"combined": rows[None] if batched else rows}, how, K, placed)
    assert len(found) == len(scores) == len(labels) == K * len(boxes)
    for index, box in enumerate(boxes):
        row = [float(value) for value in raw[index]]
        if activation == "sigmoid":
            row = [1 / (1 + np.exp(-value)) for value in row]
        if activation == "softmax":
            total = sum(np.exp(value) for value in row)
            row = [np.exp(value) / total for value in row]
        row = row[1:] if background == "first" else row[:-1] if background == "last" else row
        for label in range(K):
            place = index * K + label
            assert labels[place] == label and scores[place] == pytest.approx(row[label], abs=1e-5)
            np.testing.assert_allclose(found[place], expected(box, how, placed), atol=1e-3)


@settings(max_examples=150)
@given(
    boxes=boxes_strategy,
    box_format=st.sampled_from(["xyxy", "yxyx", "xywh", "cxcywh"]),
    units=st.sampled_from(["pixels", "normalised"]),
    form=st.sampled_from(["separate", "five", "box_score_label", "box_label_score"]),
    background=st.sampled_from(["none", "first", "last"]),
    batched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_score_a_box(
    boxes: list[tuple[float, float, float, float]],
    box_format: Any,
    units: Any,
    form: str,
    background: Any,
    batched: bool,
    seed: int,
) -> None:
    K, n, placed = 3, len(boxes), Placed((64, 96), (2.0, 1.5))
    rng = np.random.default_rng(seed)
    scores, labels = rng.random(n).astype(np.float32), rng.integers(0, K + (background != "none"), n)
    how: dict[str, Any] = {"box_format": box_format, "box_units": units, "background": background}
    b, s, lab = np.array(boxes, np.float32), scores[:, None], labels[:, None].astype(np.float32)
    outputs: dict[str, np.ndarray]
    if form == "separate":
        outputs, how = {"boxes": b, "scores": scores, "labels": labels}, how | {"boxes": "b", "scores": "s"}
    elif form == "five":
        outputs, how = {"boxes": np.concatenate([b, s], 1), "labels": labels}, how | {"boxes": "b"}
    else:
        order = [b, s, lab] if form == "box_score_label" else [b, lab, s]
        outputs, how = {"combined": np.concatenate(order, 1)}, how | {"combined": "c", "columns": form}
    if "combined" not in how:
        how["labels"] = "l"
    if batched:
        outputs = {key: value[None] for key, value in outputs.items()}
    settled = OnnxOutput(**how)
    found, got, ids = boxes_of(outputs, settled, K, placed)
    nothing = {"none": -1, "first": 0, "last": K}[background]
    kept = [index for index in range(n) if labels[index] != nothing]
    assert ids.tolist() == [labels[index] - (background == "first") for index in kept]
    assert got.tolist() == [scores[index] for index in kept]
    for place, index in enumerate(kept):
        np.testing.assert_allclose(found[place], expected(boxes[index], settled, placed), atol=1e-3)


def test_objectness_and_count() -> None:
    placed = Placed((64, 64), (1.0, 1.0))
    rows = np.array([[1, 2, 3, 4, 0.0, 0.0, 2.0], [9, 9, 9, 9, 9, 9, 9]], np.float32)
    how = OnnxOutput(combined="c", columns="box_objectness_classes", activation="sigmoid", count="n")
    _, scores, labels = boxes_of({"combined": rows, "count": np.array([1])}, how, 2, placed)
    np.testing.assert_allclose(scores, [0.25, 0.5 * torch.tensor(2.0).sigmoid()], rtol=1e-6)
    assert labels.tolist() == [0, 1]


def test_suppression_and_the_limit(tmp_path: Path) -> None:
    rest = """
  shift = Constant<value_floats=[1.0, 1.0, 1.0, 1.0]>()
  moved = Add(corners, shift)
  both = Concat<axis=0>(corners, moved)
  shape = Constant<value_ints=[2,4]>()
  boxes = Reshape(both, shape)
  flatscores = Constant<value_floats=[0.5, 0.0, 0.75, 0.25]>()
  shape2 = Constant<value_ints=[2,2]>()
  scores = Reshape(flatscores, shape2)
"""
    path = spot(tmp_path / "spot.onnx", rest=CORNERS + rest, outputs="float[N,4] boxes, float[N,K] scores")
    image = sample(rectangle(64, 64, (10, 20, 30, 50), (255, 255, 255)))
    output: dict[str, Any] = {"boxes": "boxes", "scores": "scores"}
    for more, wanted in (
        ({}, [0.75, 0.5, 0.25]),
        ({"nms_threshold": 0.5}, [0.75, 0.25]),
        ({"max_detections": 1}, [0.75]),
    ):
        teacher = foreign(path, output | more, names=("a", "b"), size=(64, 64))
        (found,) = teacher.detect([image], score_threshold=0.05)
        assert found.scores.tolist() == wanted


def outputs_of(rows: list[list[float]]) -> dict[str, np.ndarray]:
    return {"output": np.array([rows], np.float32)}


def test_boxes_are_suppressed_before_they_are_clipped(tmp_path: Path) -> None:
    """Two boxes whose parts in the image are the same, and which overlap by half: two objects."""
    path = constant(tmp_path / "a.onnx", outputs_of([[-50, 0, 100, 100, 0.9], [0, 0, 50, 100, 0.8]]))
    output = {"combined": "output", "columns": "box_classes", "box_format": "xywh"}
    image = sample(noise(128, 128))
    for threshold, wanted in ((0.6, [0.9, 0.8]), (0.4, [0.9])):
        teacher = foreign(path, output | {"nms_threshold": threshold}, ("a",))
        (found,) = teacher.detect([image], score_threshold=0.05)
        assert found.boxes.tolist() == [[0, 0, 50, 100]] * len(wanted)
        np.testing.assert_allclose(found.scores, wanted, rtol=1e-6)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000))
def test_suppression_is_that_of_each_class_alone(seed: int) -> None:
    """Against greedy suppression in Python; coordinates below zero, where an offset a class is not enough."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(-60, 60, (12, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + rng.integers(-2, 60, (12, 2))], 1)).float()
    scores, labels = torch.from_numpy(rng.permutation(12) / 12).float(), torch.from_numpy(rng.integers(0, 3, 12))
    expected: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[place].tolist()
        if x2 <= x1 or y2 <= y1:
            continue
        alike = [other for other in expected if labels[other] == labels[place]]
        if all(overlap((x1, y1, x2, y2), boxes[other].tolist()) <= 0.5 for other in alike):
            expected.append(place)
    assert suppressed(boxes, scores, labels, 0.5).tolist() == sorted(expected)


def overlap(a: Any, b: Any) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@pytest.mark.parametrize("gap", [None, "N/A", "background", ""])
def test_labels_that_stand_for_nothing(tmp_path: Path, gap: str | None) -> None:
    """As in COCO's 91 columns: they are no classes, and boxes of them are left out."""
    rows = [[10, 10, 50, 50, 0.9, 0.1, 0.2, 0.3], [60, 60, 90, 90, 0.1, 0.8, 0.7, 0.4]]
    path = constant(tmp_path / "a.onnx", outputs_of([[float(value) for value in row] for row in rows]))
    names: tuple[Any, ...] = (gap, "cat", gap, "dog")
    output: dict[str, Any] = {"combined": "output", "columns": "box_classes"}
    image = sample(noise(128, 128))
    teacher = foreign(path, output, names)
    assert teacher.class_names == ("cat", "dog")
    (found,) = teacher.detect([image], score_threshold=0.25)
    assert found.labels.tolist() == [0, 1, 1]
    np.testing.assert_allclose(found.scores, [0.8, 0.4, 0.3], rtol=1e-6)
    (found,) = foreign(path, output | {"best_class_only": True}, names).detect([image], score_threshold=0.25)
    assert found.labels.tolist() == [0]  # the best of the first box is no class
    labelled = [[10.0, 10, 50, 50, 0.9, 0], [60, 60, 90, 90, 0.8, 1], [20, 20, 50, 50, 0.7, 3]]
    path = constant(tmp_path / "b.onnx", outputs_of(labelled))
    (found,) = foreign(path, {"combined": "output"}, names).detect([image], score_threshold=0.25)
    assert found.labels.tolist() == [0, 1] and found.boxes[1].tolist() == [20, 20, 50, 50]


@pytest.mark.parametrize("shape", [(3, 128, 128), ("c", "h", "w"), (1, 3, 128, 128), ("n", 3, 128, 128)])
def test_with_a_batch_axis_or_without(tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    path = constant(tmp_path / "a.onnx", outputs_of([[10, 10, 50, 50, 0.9]]), shape)
    output = {"combined": "output", "columns": "box_classes"}
    teacher = foreign(path, output, ("a",), size=(128, 128))
    (found,) = teacher.detect([sample(noise(128, 128))], score_threshold=0.05)
    assert found.boxes.tolist() == [[10, 10, 50, 50]]
    if shape[-1] == 128:
        assert foreign(path, output, ("a",)).settings["size"] == [128, 128]


def test_prepare_equals_pixels_in_place() -> None:
    image = noise(40, 60)
    pixels, placed = prepare(image, OnnxInput(size=(40, 80), resize="letterbox_center", pad_color=9), (40, 80))
    assert placed == Placed((40, 80), (1.0, 1.0), (10, 0)) and pixels.shape == (1, 3, 40, 80)
    np.testing.assert_array_equal(pixels[0].transpose(1, 2, 0)[:, 10:70], image)
    assert (pixels[0, :, :, :10] == 9).all() and (pixels[0, :, :, 70:] == 9).all()
    pixels, placed = prepare(image, OnnxInput(size=(40, 60), resize="keep_ratio"), (40, 60))
    assert pixels.shape == (1, 3, 64, 64) and placed == Placed((64, 64), (1.0, 1.0))
    np.testing.assert_array_equal(pixels[0, :, :40, :60].transpose(1, 2, 0), image)


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_one_line(tmp_path: Path, ours: Path) -> None:
    path = spot(tmp_path / "spot.onnx", rest=CORNERS + PIXELS + PLAIN, outputs=SEPARATE)
    output = {"boxes": "boxes", "scores": "scores", "labels": "labels"}
    image = sample(rectangle(64, 64, (10, 20, 30, 50), (255, 255, 255)))

    def refused(message: str, *arguments: Any, run: bool = False, **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            teacher = foreign(*arguments, **options)
            assert run
            teacher.detect([image], score_threshold=0.05)
        assert "\n" not in str(caught.value)

    refused("no such file", tmp_path / "none.onnx", output)
    refused("has no output 'box'; it has boxes, scores, labels", path, output | {"boxes": "box"}, size=(64, 64))
    refused("has no input 'x'; it has pixels", path, output, name="x", size=(64, 64))
    refused(r"of \[1, 3, 'H', 'W'\] does not fix height and width; give input.size", path, output)
    refused("gives label 2, class_names has 2", path, output, ("a", "b"), run=True, size=(64, 64))
    combined = {"combined": "boxes", "columns": "box_classes"}
    refused("does not fit box_classes", path, combined, run=True, size=(64, 64))
    refused(
        r"one score a box needs output.labels", path, {"boxes": "boxes", "scores": "scores"}, run=True, size=(64, 64)
    )
    refused("cannot be run on float32", path, output, run=True, size=(64, 64), layout="nhwc")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    refused("broken.onnx: ONNX Runtime cannot load it", tmp_path / "broken.onnx", output, size=(64, 64))
    with pytest.raises(UserError, match=r"spot.onnx: not exported by this program; say what it takes and gives"):
        open_teacher(str(path), CPU)
    logits = PLAIN.replace("0.75", "3.5")
    path = spot(tmp_path / "logits.onnx", rest=CORNERS + PIXELS + logits, outputs=SEPARATE)
    refused("outside 0..1; set output.activation to sigmoid", path, output, run=True, size=(64, 64))


@pytest.mark.parametrize(
    ("shape", "how", "message"),
    [
        ((8, 3, 64, 64), {}, r"'images' takes 8 images at once, \[8, 3, 64, 64\]; export it for one image"),
        ((1, 64, 64, 3), {}, r"of \[1, 64, 64, 3\] has 64 channels as nchw; set input.layout: nhwc"),
        ((64, 64, 3), {}, r"of \[64, 64, 3\] has 64 channels as nchw; set input.layout: nhwc"),
        ((1, 3, 64, 64), {"layout": "nhwc"}, r"has 64 channels as nhwc; set input.layout: nchw"),
        ((1, 1, 64, 64), {}, r"has 1 channels as nchw; an RGB image has 3"),
        ((64, 64), {}, r"'images' has 2 axes, \[64, 64\]; an image has three, and a fourth for a batch"),
        ((1, 2, 3, 64, 64), {"size": (64, 64)}, r"has 5 axes"),
        ((3, "h", "w"), {}, r"of \[3, 'h', 'w'\] does not fix height and width; give input.size"),
    ],
)
def test_inputs_that_are_no_image(tmp_path: Path, shape: Any, how: dict[str, Any], message: str) -> None:
    path = constant(tmp_path / "a.onnx", outputs_of([[10, 10, 50, 50, 0.9]]), shape)
    with pytest.raises(UserError, match=message) as caught:
        foreign(path, {"combined": "output", "columns": "box_classes"}, ("a",), **how)
    assert "\n" not in str(caught.value)


GRID: dict[str, Any] = {"combined": "c", "columns": "box_classes", "box_format": "cxcywh", "strides": (8, 16)}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (GRID | {"box_format": "xyxy"}, "set box_format: cxcywh, box_units: pixels"),
        (GRID | {"columns": "box_score_label"}, "a grid has a score a class"),
        (GRID | {"count": "n"}, "excludes count and labels"),
        (GRID | {"combined": ("a",)}, "must be one output, or 2, one a stride"),
        (GRID | {"anchors": (((1, 1),),)}, "must be 2 lists, one a stride, of equal length"),
        (GRID | {"anchors": (((1.0, 1.0),), ((1.0, 1.0), (2.0, 2.0)))}, "must be 2 lists"),
        ({"combined": ("a", "b")}, "a list of outputs needs strides"),
        ({"combined": "c", "anchors": (((1.0, 1.0),),)}, "needs strides, one for each list of anchors"),
        ({"combined": "c", "best_class_only": True}, "needs a score a class; here a box has one score"),
        ({"boxes": "b", "scores": "s", "labels": "l", "best_class_only": True}, "needs a score a class"),
        ({"boxes": "b", "objectness": "o"}, "needs scores, which it is multiplied with"),
        ({"combined": "c", "objectness": "o"}, "excludes combined"),
    ],
)
def test_descriptions_that_contradict_themselves(output: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OnnxOutput(**output)


def test_grids_of_another_size_and_scores_that_are_none() -> None:
    placed, grid = Placed((32, 64), (1.0, 1.0)), OnnxOutput(**GRID)
    with pytest.raises(ValueError, match=r"gives 3 boxes, and strides \[8, 16\] with 1 a cell on 64 x 32 .* make 40"):
        boxes_of({"combined": np.zeros((3, 6), np.float32)}, grid, 2, placed)
    with pytest.raises(ValueError, match=r"stride 16 does not divide the input of 64 x 24"):
        boxes_of({"combined": np.zeros((40, 6), np.float32)}, grid, 2, Placed((24, 64), (1.0, 1.0)))
    levels = {"combined 1": np.zeros((1, 6, 8, 4), np.float32), "combined 2": np.zeros((1, 8, 6), np.float32)}
    two = grid.model_copy(update={"combined": ("p3", "p4")})
    with pytest.raises(ValueError, match=r"combined 1 has the shape \[1, 6, 8, 4\]; its stride makes a grid of 4 x 8"):
        boxes_of(levels, two, 2, placed)
    with pytest.raises(ValueError, match="scores that are no numbers"):
        boxes_of(
            {"combined": np.full((40, 6), np.nan, np.float32)}, OnnxOutput(**GRID, activation="sigmoid"), 2, placed
        )


def test_paths_of_the_command_line(tmp_path: Path, ours: Path) -> None:
    assert source_of("a.onnx").given == ("onnx",) and source_of("a.json").given == ("results",)
    assert source_of("zoo:quickstart").given == source_of("a.pth").given == ("checkpoint",)
    with pytest.raises(UserError, match=r"a.txt: is not a teacher; use .safetensors, .pth"):
        source_of("a.txt")
    (tmp_path / "teacher.yaml").write_text(f"teacher:\n  onnx: {{file: {ours}}}\n")
    assert source_of(str(tmp_path / "teacher.yaml")) == source_of(str(ours))
    (tmp_path / "wrong.yaml").write_text("teacher:\n  onnx:\n    fil: a.onnx\n")
    with pytest.raises(UserError, match=r"wrong.yaml:3: teacher.onnx.fil: unknown key; did you mean file\?"):
        source_of(str(tmp_path / "wrong.yaml"))
