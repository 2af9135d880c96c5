"""Half precision: where float16 is, and where it is not; the file agrees with the float32 module."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper, shape_inference
from torch import Tensor, nn
from torch.nn import functional as F

from compress.detectors.base import DensePrediction
from compress.export.deployable import Deployable, marked_for_half
from deploy.core.card import PROCESSING, Form, card_from_file, network_precision, parse_card
from deploy.graph import export
from deploy.graph.diagnose import first_divergence
from deploy.graph.export import ExportMismatchError, export_onnx
from deploy.graph.form import reform
from deploy.graph.half import halve, rounded, typed
from deploy.graph.session import cpu_session
from deploy.quantize.calibrate import activation_ranges
from deploy.quantize.qdq import check_format, quantize
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.half_run import half_run, not_finite
from tests.helpers.harmed_graphs import set_initializer
from tests.helpers.tensorrt_build import build
from tests.helpers.tiny_onnx import CARD, TinyDetector, pictures

pytestmark = pytest.mark.usefixtures("few_rounds")

DENSE = ["dense_scores", "dense_boxes"]
STEM, STEM_BIAS, DOWN, DOWN_BIAS = (
    f"module.detector.{n}" for n in ("stem.weight", "stem.bias", "down.weight", "down.bias")
)
Plant = Callable[[onnx.ModelProto], None]


class NormedDetector(TinyDetector):
    """Network with a norm over the map, like the head of GFL, and a stem whose weights are 30,000 times as large as its
    batch norm makes them: a variance of 4e9 has no half."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.bn = nn.BatchNorm2d(12)
        self.norm = nn.GroupNorm(3, 12)
        with torch.no_grad():
            for value in (self.stem.weight, self.stem.bias):
                value.mul_(3e4)  # type: ignore[union-attr]
        self.bn.running_var.fill_(9e8)  # type: ignore[union-attr, operator]
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        first = F.relu(self.bn(self.stem((images.float() - 116.0) / 58.0)))
        return [self.norm(first), self.norm(F.relu(self.down(first)))]

    def predict(self, features: list[Tensor]) -> DensePrediction:
        return super().predict(features)


def module() -> Deployable:
    return Deployable.from_card(NormedDetector(), CARD)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def marked() -> onnx.ModelProto:
    return export._convert(marked_for_half(module()), pictures(2), 20)


@pytest.fixture(scope="module")
def halved(marked: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "tiny.fp16.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_convert", lambda *_: copy_of(marked))
        report = exported(path)
    assert report.max_score_difference > 1e-6  # against float32, so rounding shows
    assert report.half is not None and report.half.images == 3
    return path


def exported(path: Path) -> export.ExportReport:
    return export_onnx(
        marked_for_half(module()), CARD, path, samples=pictures(4), reference=module(), measured_on=pictures(3, seed=1),
        max_batch=4, score_tolerance=0.02, box_tolerance_px=0.5,
    )  # fmt: skip


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def dense(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    return list(cpu_session(model.SerializeToString()).run(DENSE, {"images": images}))


def wide(marked: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32."""
    return typed(marked, {node.name for node in marked.graph.node})


def test_the_original_stays_in_float32_and_the_copy_is_marked() -> None:
    original = module()
    copy = marked_for_half(original)
    assert {p.dtype for p in original.parameters()} == {torch.float32}
    kinds = {name: p.dtype for name, p in copy.named_parameters()}
    assert {n for n, kind in kinds.items() if kind == torch.float32} == {"detector.norm.weight", "detector.norm.bias"}
    assert {kind for n, kind in kinds.items() if ".norm." not in n} == {torch.float64}
    scores, boxes = copy.dense(torch.from_numpy(pictures(2)))
    assert scores.dtype == boxes.dtype == torch.float32


def test_the_file_computes_the_network_in_half_and_the_rest_in_float(halved: Path) -> None:
    card = card_from_file(halved)
    assert card.precision == {**dict.fromkeys(("stem", "down", "cls", "reg"), "fp16"), PROCESSING: "fp32"}
    assert network_precision(card.precision) == "fp16"
    assert card.half is not None and card.half.float32 == {} and 1 < card.half.largest < 100
    old = card.model_dump_json(exclude={"half"})
    assert parse_card(old, "an older file").half is None
    graph = shape_inference.infer_shapes(onnx.load(str(halved))).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    assert TensorProto.DOUBLE not in {*kinds.values(), *(item.data_type for item in graph.initializer)}
    by_op = {
        op: {kinds[n.output[0]] for n in graph.node if n.op_type == op} for op in ("Conv", "InstanceNormalization")
    }
    assert by_op == {"Conv": {TensorProto.FLOAT16}, "InstanceNormalization": {TensorProto.FLOAT}}
    for op in ("Sigmoid", "Softmax", "TopK"):
        assert all(kinds[n.output[0]] == TensorProto.FLOAT for n in graph.node if n.op_type == op)


# --- numbers that do not fit ----------------------------------------------------------------------------


def large_norm_input(model: onnx.ModelProto) -> None:
    """What the norms take is 200,000 times as large; they give the same."""
    for name in (STEM, STEM_BIAS, DOWN_BIAS):
        set_initializer(model, name, 2e5)


def large_inside(model: onnx.ModelProto) -> None:
    """A value of 90,000 between two convolutions, and the second one takes it back."""
    set_initializer(model, STEM, 4.2e4)
    set_initializer(model, STEM_BIAS, 4.2e4)
    set_initializer(model, DOWN, 1 / 4.2e4)


def small_inside(model: onnx.ModelProto) -> None:
    """A value of a hundred-thousandth, where float16 has a few bits left."""
    set_initializer(model, STEM, 1e-6)
    set_initializer(model, STEM_BIAS, 1e-6)
    set_initializer(model, DOWN, 1e6 / 200)
    set_initializer(model, DOWN_BIAS, 1 / 200)


PLANTED = pytest.mark.parametrize("plant", [large_norm_input, large_inside, small_inside])


@pytest.fixture
def planted(marked: onnx.ModelProto, plant: Plant) -> onnx.ModelProto:
    model = copy_of(marked)
    plant(model)
    return model


@PLANTED
def test_numbers_that_do_not_fit_are_computed_in_float32(planted: onnx.ModelProto, plant: Plant) -> None:
    images = pictures(2)
    exact = dense(wide(planted), images)
    bare = typed(planted, ())
    hidden = dense(bare, images)
    assert all(np.isfinite(value).all() for value in hidden), "onnxruntime shows no overflow"
    if plant is not small_inside:
        assert not_finite(half_run(bare, {"images": images}))
        assert not np.isfinite(np.concatenate([x.ravel() for x in dense(rounded(bare), images)])).all() or (
            np.abs(dense(rounded(bare), images)[0] - exact[0]).max() > 0.05
        )

    half, facts = halve(planted, pictures(3, seed=1))
    assert {"stem", "down"} <= set(facts.float32) and not {"cls", "reg"} & set(facts.float32)
    assert facts.largest < 32752
    onnx.checker.check_model(half)
    values = half_run(half, {"images": images})
    assert not_finite(values) == []
    for name, wanted, limit, again in zip(DENSE, exact, (0.02, 0.5), dense(rounded(half), images), strict=True):
        assert np.abs(values[name] - wanted).max() < limit
        assert np.abs(again - wanted).max() < limit


def test_the_check_of_an_export_sees_what_onnxruntime_hides(
    marked: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmed = copy_of(marked)
    large_norm_input(harmed)
    monkeypatch.setattr(export, "_convert", lambda *_: copy_of(harmed))
    with monkeypatch.context() as patch:
        patch.setattr(export, "halve", lambda model, images: (typed(model, ()), halve(model, images)[1]))
        with pytest.raises(ExportMismatchError, match="rounded to float16"):
            exported(tmp_path / "bare.onnx")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "islands.onnx"
    report = exported(file)
    card = card_from_file(file)
    assert report.half == card.half and card.half is not None and {"stem", "down"} <= set(card.half.float32)
    assert "reaches" in card.half.in_words() and network_precision(card.precision) == "fp16+fp32"
    if importlib.util.find_spec("tensorrt") is not None:
        assert build(file).half == 4
        mixed = quantize(onnx.load(str(file)), activation_ranges(onnx.load(str(file)), pictures(4)), "tensorrt")
        check_format(mixed, "tensorrt")
        onnx.save(mixed, str(tmp_path / "mixed.onnx"))
        assert build(tmp_path / "mixed.onnx").quantized == 4


@pytest.mark.parametrize("factor", [1e-2, 2e-3])
def test_small_weights_of_a_mixed_file_are_not_zeros(marked: onnx.ModelProto, factor: float) -> None:
    """A scale of 7e-6 or 1.5e-6 has few bits in float16, and onnxruntime gives such weights a scale of 1."""
    model = copy_of(marked)
    set_initializer(model, DOWN, factor)
    half, _ = halve(model, pictures(2))
    mixed = quantize(half, activation_ranges(half, pictures(2)), "tensorrt")
    check_format(mixed, "tensorrt")
    onnx.shape_inference.infer_shapes(mixed, strict_mode=True)
    values = {item.name: numpy_helper.to_array(item) for item in mixed.graph.initializer}
    scales = values[f"{DOWN}_scale"]
    assert scales.dtype == np.float16
    restored = values[f"{DOWN}_quantized"] * scales.astype(np.float64)[:, None, None, None]
    exact = next(numpy_helper.to_array(item) for item in model.graph.initializer if item.name == DOWN)
    largest = np.abs(exact).max()
    assert np.abs(restored - exact).max() < largest * (0.01 if factor == 1e-2 else 0.06)


def test_with_a_fixed_batch_it_computes_in_float(halved: Path, tmp_path: Path) -> None:
    """ONNX Runtime has no layers in float16 on these processors, and casts before each while it fixes shapes; the card
    says so."""
    card = reform(halved, tmp_path / "fixed.onnx", Form(batch=1))
    assert "fp16" in network_precision(card_from_file(halved).precision)
    assert network_precision(card.precision) == "fp32" and card.half is None
    assert reform(halved, tmp_path / "labels.onnx", Form(labels="int32")).precision == card_from_file(halved).precision


def test_half_and_mixed_files_build_in_tensorrt_with_a_dynamic_batch(halved: Path, tmp_path: Path) -> None:
    assert build(halved).half == 6
    model = onnx.load(str(halved))
    mixed = quantize(model, activation_ranges(model, pictures(4)), "tensorrt")
    check_format(mixed, "tensorrt")
    onnx.save(mixed, str(tmp_path / "mixed.onnx"))
    built = build(tmp_path / "mixed.onnx")
    assert built.quantized == 4 and built.half == 6
    half, both = OnnxRunner(halved)(pictures(2)), OnnxRunner(tmp_path / "mixed.onnx")(pictures(2))
    assert np.abs(half.scores[:, :5] - both.scores[:, :5]).max() < 0.05
    found = first_divergence(halved, tmp_path / "mixed.onnx", pictures(2))
    assert found.divergence is None and found.format == "int8"
