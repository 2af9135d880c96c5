"""Students as they ship, from 320 to 800 pixels, parsed and built in TensorRT with batches of 1, 8 and 32.

The weights are random: what is tested is whether every operator, shape and number format of the graphs goes through,
and whether the built network is in the format that the file is called after.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
from PIL import Image

from compress.detectors.backbones import build_backbone
from compress.detectors.base import Detector
from compress.detectors.gfl import GFL
from compress.export.deployable import Deployable, marked_for_half
from compress.export.folded import folded
from deploy.core.card import OUTPUTS, ModelCard
from deploy.core.errors import UserError
from deploy.graph import export
from deploy.graph.half import halve
from deploy.graph.precision import precisions, set_card
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer
from deploy.tensorrt.build import build_engine
from deploy.tensorrt.card import EngineCard, EngineOptions, Layers
from tests.helpers import tensorrt_rig

tensorrt_rig.need_tensorrt()

pytestmark = pytest.mark.usefixtures("few_rounds")

SIZES = {"nano": (320, 320), "resnet18": (512, 640), "mobilenet_v3_small": (640, 640), "resnet50": (800, 800)}
BATCHES = (1, 8, 32)
BACKBONES = pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=[] if name == "nano" else pytest.mark.exhaustive) for name in SIZES],
)


def file_of(backbone: str, folder: Path, size: tuple[int, int], *, half: bool = False) -> Path:
    """The deployable graph of an untrained student, without the comparison that an export makes."""
    detector = GFL(3, build_backbone(backbone, weights="none"), neck_channels=32, head_depth=1)
    return file_with(detector, backbone, folder, size, half=half)


def file_with(
    detector: Detector,
    name: str,
    folder: Path,
    size: tuple[int, int],
    *,
    half: bool = False,
    images: np.ndarray | None = None,
) -> Path:
    card = ModelCard(
        name=name,
        class_names=[f"class {n}" for n in range(detector.num_classes)],
        category_ids=list(range(detector.num_classes)),
        input_size=size,
        candidates=100,
        max_detections=20,
    )
    module = cast(Deployable, folded(Deployable.from_card(detector, card)))
    module = marked_for_half(module) if half else module
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (2, 3, *card.input_size), np.uint8)
    model = export._convert(module, images, opset=20)
    model = halve(model, images)[0] if half else model
    del model.graph.output[len(OUTPUTS) :]
    set_card(model, card.model_copy(update={"precision": precisions(model)}))
    path = folder / f"{name}{'.fp16' if half else ''}.onnx"
    onnx.save(model, str(path))
    return path


def built(path: Path, level: int = 3) -> EngineCard:
    options = EngineOptions(batches=BATCHES, optimization_level=level)
    card = build_engine(path, options=options, timing_caches=path.parent / "timing")
    profile = card.profiles[0]
    assert (profile.min[0], profile.opt[0], profile.max[0]) == BATCHES
    assert profile.max[1:] == [3, *card.model.input_size] and card.inputs[0].shape[0] == -1
    return card


def majority(layers: Layers) -> str:
    return max(layers.share, key=lambda name: layers.share[name])


@pytest.mark.slow
@BACKBONES
def test_fp32_and_int8(backbone: str, tmp_path: Path) -> None:
    path = file_of(backbone, tmp_path, SIZES[backbone])
    card = built(path)
    assert card.precision == "fp32" and card.network.share == {"fp32": 1.0}

    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(picture)
    quantizer = Quantizer(path, choose_images([picture], 1), "tensorrt")
    onnx.save(quantizer.graph(), str(tmp_path / f"{backbone}.int8.onnx"))
    int8 = built(tmp_path / f"{backbone}.int8.onnx")
    assert int8.precision == "int8" and majority(int8.network) == "int8"
    assert int8.network.count == card.network.count and int8.model.quantization is not None
    # what TensorRT was given is what the card of the model counts
    kept = round(int8.network.count * int8.network.share.get("fp32", 0))
    assert kept >= len(int8.model.quantization.float_layers) > 0

    if backbone == "nano":  # the format for the CPU: refused, with the way out
        onnx.save(Quantizer(path, choose_images([picture], 1), "cpu").graph(), str(tmp_path / "cpu.int8.onnx"))
        with pytest.raises(UserError, match="--target tensorrt"):
            built(tmp_path / "cpu.int8.onnx")


@pytest.mark.slow
@BACKBONES
def test_fp16(backbone: str, tmp_path: Path) -> None:
    """The large sizes are built in the other formats: here each student is as small as it ships."""
    card = built(file_of(backbone, tmp_path, (320, 320), half=True), level=0)
    assert card.precision == "fp16" and majority(card.network) == "fp16"
    assert [(spec.name, spec.dtype) for spec in card.outputs[:2]] == [("boxes", "fp32"), ("scores", "fp32")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["d_fine", "rt_detr_v2", "rf_detr", "lw_detr"])
def test_detectors_of_queries(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    from compress.detectors.transformers.lw_detr import LwDetr, RfDetr
    from compress.detectors.transformers.real_time_detr import DFine, RTDetrV2
    from tests.helpers import tiny_detr

    kind = next(kind for kind in (DFine, RTDetrV2, RfDetr, LwDetr) if kind.family == family)
    detector = tiny_detr.with_statistics(kind, tiny_detr.pictures())
    path, half = (
        file_with(detector, family, tmp_path, tiny_detr.SIZE, half=half, images=tiny_detr.pictures())
        for half in (False, True)
    )
    assert built(path).network.share == {"fp32": 1.0}
    # of so small a detector the decoder, in float32, is most of the layers
    assert "fp16" in built(half.rename(tmp_path / f"{family}.mixed.onnx"), level=0).network.share
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(picture)
    int8 = tmp_path / f"{family}.int8.mixed.onnx"
    onnx.save(Quantizer(path, choose_images([picture], 1), "tensorrt").graph(), str(int8))
    assert "int8" in built(int8).network.share
