"""Half precision: where float16 is, and where it is not; the file agrees with the float32 module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, shape_inference
from torch import Tensor, nn

from compress.detectors.base import DensePrediction
from compress.export.deployable import Deployable, half_precision
from deploy.core.card import PROCESSING, card_from_file, network_precision
from deploy.graph.diagnose import first_divergence
from deploy.graph.export import ExportMismatchError, export_onnx
from deploy.quantize.calibrate import activation_ranges
from deploy.quantize.qdq import check_format, quantize
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.tensorrt_build import build
from tests.helpers.tiny_onnx import CARD, TinyDetector, deployable, pictures


class NormedDetector(TinyDetector):
    """Network with a norm over the map, like the head of GFL."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.norm = nn.GroupNorm(3, 12)

    def features(self, images: Tensor) -> list[Tensor]:
        return [self.norm(level) for level in super().features(images)]

    def predict(self, features: list[Tensor]) -> DensePrediction:
        return super().predict(features)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = Deployable.from_card(NormedDetector(), CARD)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("half") / "tiny.fp16.onnx"
    report = export_onnx(
        half_precision(module), CARD, path, samples=pictures(4), reference=module, max_batch=4, score_tolerance=0.02,
        box_tolerance_px=0.5,
    )  # fmt: skip
    assert report.max_score_difference > 1e-6  # against float32, so rounding shows
    return path


def test_the_original_stays_in_float32_and_the_copy_has_islands() -> None:
    module = Deployable.from_card(NormedDetector(), CARD)  # type: ignore[arg-type]
    half = half_precision(module)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert {n for n, kind in kinds.items() if kind == torch.float32} == {"detector.norm.weight", "detector.norm.bias"}
    scores, boxes = half.dense(torch.from_numpy(pictures(2)))
    assert scores.dtype == boxes.dtype == torch.float32
    exact = module.dense(torch.from_numpy(pictures(2)))
    assert 0 < (scores - exact[0]).abs().max() < 0.02
    assert 0 < (boxes - exact[1]).abs().max() < 0.5


def test_the_file_computes_the_network_in_half_and_the_rest_in_float(halved: Path) -> None:
    card = card_from_file(halved)
    assert card.precision == {**dict.fromkeys(("stem", "down", "cls", "reg"), "fp16"), PROCESSING: "fp32"}
    assert network_precision(card.precision) == "fp16"
    graph = shape_inference.infer_shapes(onnx.load(str(halved))).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    by_op = {
        op: {kinds[n.output[0]] for n in graph.node if n.op_type == op} for op in ("Conv", "InstanceNormalization")
    }
    assert by_op == {"Conv": {TensorProto.FLOAT16}, "InstanceNormalization": {TensorProto.FLOAT}}
    for op in ("Sigmoid", "Softmax", "TopK"):
        assert all(kinds[n.output[0]] == TensorProto.FLOAT for n in graph.node if n.op_type == op)


def test_a_network_that_overflows_in_half_gets_no_file(tmp_path: Path) -> None:
    module = deployable()
    with torch.no_grad():
        module.detector.stem.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    with pytest.raises(ExportMismatchError):
        export_onnx(
            half_precision(module), CARD, tmp_path / "x.onnx", samples=pictures(2), reference=module, max_batch=2
        )
    assert list(tmp_path.iterdir()) == []


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
