"""The exported file: what it computes, what it carries, and exports that must fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from compress.export.deployable import Deployable, TorchRunner
from deploy.core.card import card_from_file
from deploy.core.errors import UserError
from deploy.graph.export import ExportMismatchError, export_onnx
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.cheap_exports import rounds
from tests.helpers.tiny_onnx import CARD, SIZE, TinyDetector, deployable, export_tiny, pictures


def test_the_file_gives_what_torch_gives_at_every_batch_size(tiny_onnx: Path) -> None:
    onnx_runner, torch_runner = OnnxRunner(tiny_onnx, threads=1), TorchRunner(deployable(), CARD)
    for batch in (1, 2, 3, 8, 11):
        images = pictures(batch, seed=100 + batch)
        found, wanted = onnx_runner(images), torch_runner(images)
        assert wanted.count.min() >= 2
        np.testing.assert_array_equal(found.count, wanted.count)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
        assert (found.boxes.dtype, found.labels.dtype, found.count.dtype) == (np.float32, np.int64, np.int32)


@rounds(4)
def test_the_report_tells_what_was_compared(tmp_path: Path) -> None:
    report = export_tiny(tmp_path / "tiny.onnx", seed=3)
    assert report.batches == (1, 2, 8) and report.images == 8
    assert report.detections > 50 and report.matched == 1.0
    assert 0 < report.max_score_difference < 1e-4 and 0 < report.max_box_difference_px < 1e-2
    assert report.size_bytes == (tmp_path / "tiny.onnx").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.onnx"]


def test_the_file_carries_its_card_and_nothing_of_this_machine(tiny_onnx: Path) -> None:
    card = card_from_file(tiny_onnx)
    assert card.precision == dict.fromkeys(("stem", "down", "cls", "reg", "pre- and post-processing"), "fp32")
    assert card.model_copy(update={"precision": CARD.precision}) == CARD
    model = onnx.load(str(tiny_onnx))
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels", "count"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and [d.dim_value for d in shape][1:] == [3, *SIZE]
    assert {entry.domain for entry in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    text = tiny_onnx.read_bytes()
    for leak in (b".py", b"stack_trace", str(Path.cwd()).encode()):
        assert leak not in text
    assert "NonMaxSuppression" not in {node.op_type for node in model.graph.node}


def test_boxes_lie_on_the_canvas_and_the_rest_is_zero(tiny_onnx: Path) -> None:
    found = OnnxRunner(tiny_onnx, threads=1)(pictures(4, seed=5))
    assert found.boxes.min() >= 0
    assert found.boxes[..., 0::2].max() <= SIZE[1] and found.boxes[..., 1::2].max() <= SIZE[0]
    for image in range(4):
        n = int(found.count[image])
        scores = found.scores[image]
        assert (scores[:n] > CARD.score_threshold).all() and (np.diff(scores[:n]) <= 0).all()
        assert not found.boxes[image, n:].any() and not scores[n:].any() and not found.labels[image, n:].any()


class _WrongDense(Deployable):
    """Computes something else while it is traced: an export bug, as seen from outside."""

    def dense(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().dense(images)
        return (scores * 0.99, boxes) if torch.compiler.is_exporting() else (scores, boxes)


class _WrongSelect(Deployable):
    def select(self, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = super().select(scores, boxes)
        return (out[0], out[1], out[2] * 0, out[3]) if torch.compiler.is_exporting() else out


@rounds(4)
@pytest.mark.parametrize(("kind", "message"), [(_WrongDense, "in score"), (_WrongSelect, "detections")])
def test_a_file_that_disagrees_with_torch_is_not_written(tmp_path: Path, kind: Any, message: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("the file of yesterday")
    with pytest.raises(ExportMismatchError, match=message):
        export_onnx(kind.from_card(TinyDetector(), CARD), CARD, path, samples=pictures(2))
    assert path.read_text() == "the file of yesterday"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@rounds(4)
def test_a_detector_that_finds_nothing_is_compared_all_the_same(tmp_path: Path) -> None:
    card = CARD.model_copy(update={"score_threshold": 1.0})
    report = export_tiny(tmp_path / "m.onnx", card=card)
    assert report.detections == 0 and report.max_score_difference > 0
    assert OnnxRunner(tmp_path / "m.onnx", threads=1)(pictures(2)).count.tolist() == [0, 0]


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros((0, 3, *SIZE), np.uint8),
        np.zeros((1, 3, *SIZE), np.float32),
        np.zeros((1, 3, 32, 32), np.uint8),
    ],
)
def test_wrong_samples_are_one_line_errors(tmp_path: Path, samples: np.ndarray) -> None:
    with pytest.raises(UserError, match="at least one sample image"):
        export_onnx(deployable(), CARD, tmp_path / "m.onnx", samples=samples)
    assert not list(tmp_path.iterdir())


def test_input_size_must_fit_the_strides() -> None:
    with pytest.raises(UserError, match="multiples of 32"):
        Deployable(TinyDetector(), (50, 64))  # type: ignore[arg-type]
