"""A file cut at its output layers, decoded: the detections of the whole file; what cannot be cut is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from compress.config.model import Model
from compress.detectors.build import build_detector
from compress.export.deployable import Deployable
from compress.export.folded import folded
from deploy.core.card import Heads, ModelCard, card_from_file
from deploy.core.errors import UserError
from deploy.graph import heads as module
from deploy.graph.export import export_onnx
from deploy.graph.heads import cut_heads
from deploy.graph.precision import set_card
from deploy.runtimes.open import open_runner
from tests.helpers import samples
from tests.helpers.tiny_onnx import SIZE, pictures


@pytest.fixture(scope="module")
def gfl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student of 64 × 64 pixels, whose two coarsest levels have one place each."""
    return samples.unpack("v0_1", tmp_path_factory.mktemp("sample")) / "runs" / "sample" / "student.onnx"


def drawn(count: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [count, 3, H, W]: noise in the first half, rectangles on one colour in the second."""
    rng, (height, width) = np.random.default_rng(3), size
    images = rng.integers(0, 256, (count, 3, height, width), np.uint8)
    for image in images[count // 2 :]:
        image[:] = rng.integers(0, 256, (3, 1, 1))
        for _ in range(3):
            top, left = rng.integers(0, height - 16), rng.integers(0, width - 16)
            image[:, top : top + rng.integers(8, 40), left : left + rng.integers(8, 40)] = rng.integers(
                0, 256, (3, 1, 1)
            )
    return images


def same_detections(whole: Path, cut: Path, images: np.ndarray) -> None:
    wanted, found = open_runner(whole, threads=1)(images), open_runner(cut, threads=1)(images)
    assert wanted.count.sum() > len(images)
    for name, most in {"count": 0, "labels": 0, "scores": 1e-5, "boxes": 1e-3}.items():
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=most, err_msg=name)


def test_detections_of_a_trained_student(gfl: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.heads.onnx"
    card = cut_heads(gfl, out)
    heads = Heads(strides=[8, 16, 32, 64, 128], bins=17)
    assert card == card_from_file(out) and card.form.heads == heads
    graph = onnx.load(str(out)).graph
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.output}
    assert list(shapes) == heads.names == [f"{kind}_{stride}" for stride in heads.strides for kind in ("cls", "box")]
    assert shapes["cls_8"] == [1, 3, 8, 8] and shapes["box_64"] == shapes["box_128"] == [1, 68, 1, 1]
    (images,) = graph.input
    assert images.type.tensor_type.elem_type == TensorProto.FLOAT
    assert not {node.op_type for node in graph.node} & {"Shape", "Sigmoid", "Softmax", "TopK", "Cast", "Expand"}
    same_detections(gfl, out, drawn(8, (64, 64)))


def test_detections_of_another_head(tiny_onnx: Path, tmp_path: Path) -> None:
    """Of two levels without factors, on a canvas that is no square, with crowds."""
    out = tmp_path / "tiny.heads.onnx"
    assert cut_heads(tiny_onnx, out).form.heads == Heads(strides=[8, 16], bins=5)
    same_detections(tiny_onnx, out, np.concatenate([pictures(3), drawn(4, SIZE)]))


def test_detections_of_an_int8_file(gfl: Path, tmp_path: Path) -> None:
    """But for what ONNX Runtime fuses otherwise, where integers may differ by one."""
    whole, cut = gfl.with_name("student.int8.onnx"), tmp_path / "heads.onnx"
    cut_heads(whole, cut)
    wanted, found = (open_runner(path, threads=1)(drawn(8, (64, 64))) for path in (whole, cut))
    assert np.abs(wanted.count - found.count).max() <= 1
    np.testing.assert_allclose(found.scores[:, 0], wanted.scores[:, 0], atol=0.02)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "size"), [("fcos", (64, 96)), ("fcos", (128, 128)), ("retinanet", (64, 64))])
def test_other_families(family: str, size: tuple[int, int], few_rounds: None, tmp_path: Path) -> None:
    detector = build_detector(Model(detector=family, backbone="nano", neck_channels=32, head_depth=1), 3, 0).eval()
    with torch.no_grad():
        for name, weights in detector.named_parameters():
            if "cls_logits" in name:
                weights.mul_(30) if name.endswith("weight") else weights.fill_(-1)
    card = ModelCard(name=family, class_names=list("abc"), category_ids=[1, 2, 3], input_size=size, candidates=200)
    whole = Deployable.from_card(detector, card)
    source, out = tmp_path / "x.onnx", tmp_path / "x.heads.onnx"
    export_onnx(folded(whole), card, source, samples=drawn(4, size), reference=whole, max_batch=2)
    if family == "retinanet":
        with pytest.raises(UserError, match=r"of \[27, 36\] channels for 3 classes: a place has several boxes there"):
            cut_heads(source, out)
        return
    heads = cut_heads(source, out).form.heads
    assert heads is not None and (heads.bins, heads.centerness, heads.fitted) == (1, True, size == (64, 96))
    same_detections(source, out, drawn(6, size))


def test_boxes_of_another_code_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    """And detections that are chosen otherwise."""
    model = onnx.load(str(tiny_onnx))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Hardmax"
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(
        UserError, match=r"decoded as those of gfl and fcos are, they give scores \S+ and boxes \S+ px away"
    ):
        cut_heads(tmp_path / "other.onnx", tmp_path / "out.onnx")
    model = onnx.load(str(tiny_onnx))
    set_card(model, card_from_file(tiny_onnx).model_copy(update={"nms_threshold": 0.5}))
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(UserError, match="chooses detections in a way of its own"):
        cut_heads(tmp_path / "other.onnx", tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["other.onnx"]


def test_what_has_no_such_layers_is_refused(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_heads(tiny_onnx, tmp_path / "heads.onnx")
    with pytest.raises(UserError, match=r"heads.onnx: has a fixed batch of 1, float32 pixels, outputs to be decoded; "):
        cut_heads(tmp_path / "heads.onnx", tmp_path / "out.onnx")
    monkeypatch.setattr(module, "SCORES", "elsewhere")
    with pytest.raises(UserError, match="cannot be cut at its output layers: no dense scores and boxes in it; gfl and"):
        cut_heads(tiny_onnx, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
