"""INT8 files: the format of each target, honest cards, calibration apart from validation, TensorRT."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from deploy.core.card import card_from_file
from deploy.core.errors import UserError
from deploy.graph.precision import PROCESSING, precisions
from deploy.graph.structure import structure_of
from deploy.quantize.calibrate import (
    CalibrationImages,
    activation_ranges,
    check_apart,
    choose_images,
    list_images,
)
from deploy.quantize.file import Quantizer, dense_outputs, output_error
from deploy.quantize.qdq import check_format, quantize
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.tiny_onnx import SIZE, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of the network's own size."""
    where = tmp_path_factory.mktemp("images")
    for index, picture in enumerate(pictures(12, seed=5)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(where / f"{index:02}.png")
    return where


@pytest.fixture(scope="module")
def images(folder: Path) -> CalibrationImages:
    return choose_images(list_images(folder), 8)


def nodes_of(model: onnx.ModelProto, *ops: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ops]


def test_layers_are_weights_and_the_last_ones_are_outputs(tiny_onnx: Path) -> None:
    found = structure_of(onnx.load(str(tiny_onnx)).graph)
    assert [(layer.name, len(layer.nodes), layer.output) for layer in found.layers] == [
        ("stem", 1, False), ("down", 1, False), ("cls", 2, True), ("reg", 2, True),
    ]  # fmt: skip
    assert found.output_names == ("cls", "reg")
    assert len(found.ends) == 4


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges_cover_what_the_network_computes(tiny_onnx: Path, method: Any) -> None:
    model = onnx.load(str(tiny_onnx))
    ranges = activation_ranges(model, pictures(6), method)
    tapped = onnx.load(str(tiny_onnx))
    names = [node.output[0] for node in nodes_of(tapped, "Relu")]
    tapped.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    import onnxruntime

    session = onnxruntime.InferenceSession(tapped.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, value in zip(names, session.run(names, {"images": pictures(6)}), strict=True):
        low, high = ranges[name]
        if method == "minmax":
            assert (low, high) == pytest.approx((float(value.min()), float(value.max())), rel=1e-5)
        else:
            assert 0.2 * value.max() < high <= value.max() * 1.001


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_format_is_the_targets_and_the_values_are_those_of_the_formula(
    tiny_onnx: Path, images: CalibrationImages, target: Any
) -> None:
    quantizer = Quantizer(tiny_onnx, images, target)
    model = quantizer.graph()
    check_format(model, target)
    with pytest.raises(ValueError, match=r"activations are|zero point|no weight"):
        check_format(model, "cpu" if target == "tensorrt" else "tensorrt")
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    original = {item.name: numpy_helper.to_array(item) for item in quantizer.model.graph.initializer}
    weights = [node for node in nodes_of(model, "DequantizeLinear") if node.input[0].endswith("weight_quantized")]
    assert len(weights) == 2  # stem and down; the output layers are float
    for node in weights:
        integers, scale, zero = (values[name] for name in node.input)
        weight = original[node.input[0].removesuffix("_quantized")].reshape(len(scale), -1).astype(np.float64)
        assert integers.dtype == np.int8 and not zero.any()
        assert scale == pytest.approx(np.abs(weight).max(1) / 127, rel=0.02)  # symmetric, a scale a channel
        error = np.abs(integers.reshape(len(scale), -1) * scale[:, None].astype(np.float64) - weight)
        assert (error <= 0.51 * scale[:, None]).all()
    biases = [values[node.input[2]] for node in nodes_of(model, "Conv") if node.input[2] in values]
    assert all(bias.dtype == np.float32 for bias in biases)
    assert len(biases) == (6 if target == "tensorrt" else 4)  # the cpu's integer layers have int32 biases


def test_keeping_and_quantizing_layers_by_name(tiny_onnx: Path) -> None:
    model = onnx.load(str(tiny_onnx))
    ranges = activation_ranges(model, pictures(4))
    assert precisions(quantize(model, ranges, "cpu", keep_float=()))["cls"] == "int8"
    found = precisions(quantize(model, ranges, "tensorrt", keep_float=("stem", "cls", "reg")))
    assert found == {"stem": "fp32", "down": "int8", "cls": "fp32", "reg": "fp32", PROCESSING: "fp32"}
    with pytest.raises(UserError, match="no layer is called neck: choose from stem, down, cls, reg"):
        quantize(model, ranges, "cpu", keep_float=("neck",))
    with pytest.raises(UserError, match="nothing would be quantized"):
        quantize(model, ranges, "cpu", keep_float=("stem", "down", "cls", "reg"))
    with pytest.raises(UserError, match="is quantized already"):
        quantize(quantize(model, ranges, "cpu"), ranges, "cpu")


def test_seven_bits_for_processors_that_saturate(tiny_onnx: Path, images: CalibrationImages) -> None:
    quantizer = Quantizer(tiny_onnx, images, "cpu", reduce_range=True)
    model = quantizer.graph()
    integers = [numpy_helper.to_array(x) for x in model.graph.initializer if x.name.endswith("weight_quantized")]
    assert integers and all(np.abs(value).max() == 64 for value in integers)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_file_tells_the_truth_and_detects_nearly_the_same(
    tiny_onnx: Path, images: CalibrationImages, target: Any, tmp_path: Path
) -> None:
    report = Quantizer(tiny_onnx, images, target).save(tmp_path / "tiny.int8.onnx")
    card = card_from_file(report.path)
    assert card.precision == {"stem": "int8", "down": "int8", "cls": "fp32", "reg": "fp32", PROCESSING: "fp32"}
    assert card.quantization is not None
    assert (card.quantization.target, card.quantization.layers, card.quantization.method) == (target, 2, "minmax")
    assert card.quantization.float_layers == ["cls", "reg"] and card.quantization.guided_map_drop is None
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in images.files]
    assert card.quantization.image_hashes == [digest[:16] for digest in hashes]
    assert card.quantization.images_sha256 == hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()
    assert 0 < report.score_error < 0.1 and 0 < report.box_error < 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.int8.onnx"]
    exact, found = OnnxRunner(tiny_onnx)(pictures(5, seed=9)), OnnxRunner(report.path)(pictures(5, seed=9))
    assert np.abs(exact.scores[:, :5] - found.scores[:, :5]).max() < 0.05


def test_errors_of_dense_outputs_against_hand_made_numbers() -> None:
    scores = np.array([[[0.8, 0.0], [0.2, 0.0]]])
    boxes = np.array([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    moved = boxes.copy()
    moved[0, 0] = [5, 0, 15, 10]  # IoU 1/3
    assert output_error((scores, boxes), (scores, boxes)) == (0.0, 0.0)
    assert output_error((scores, boxes), (scores * 0.5, moved)) == pytest.approx((0.5, 0.8 * 2 / 3))


def test_calibration_images_are_spread_unique_and_apart(folder: Path, tmp_path: Path) -> None:
    files = list_images(folder)
    assert [file.name for file in choose_images(files, 4).files] == ["00.png", "03.png", "06.png", "09.png"]
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[3].read_bytes())
    assert len(choose_images([*files, copy], 100).files) == 12
    chosen = choose_images(files, 4)
    check_apart(chosen, [files[1], files[2]])
    with pytest.raises(UserError, match=r"1 of 4 calibration images are among the validation images.*03\.png.*copy"):
        check_apart(chosen, [files[1], copy])

    coco = folder / "train.json"
    coco.write_text(json.dumps({"images": [{"file_name": "01.png"}, {"file_name": "02.png"}]}))
    assert [file.name for file in list_images(coco)] == ["01.png", "02.png"]
    coco.unlink()
    (tmp_path / "bad.json").write_text("[]")
    for index, name in enumerate((5, None, "", ["a"])):
        (tmp_path / f"name{index}.json").write_text(
            json.dumps({"images": [{"file_name": "01.png"}, {"file_name": name}]})
        )
    for source, message in (
        (tmp_path / "bad.json", "neither a folder of images nor a COCO JSON"),
        (tmp_path / "name0.json", r"name0.json: images\[1\].file_name is 5, which names no file"),
        (tmp_path / "name1.json", "file_name is null, which names no file"),
        (tmp_path / "name2.json", 'file_name is "", which names no file'),
        (tmp_path / "name3.json", r'file_name is \["a"\], which names no file'),
        (tmp_path / "none", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            list_images(source)


def test_validation_refuses_calibration_images(
    tiny_onnx: Path, folder: Path, images: CalibrationImages, tmp_path: Path
) -> None:
    from deploy.validate.accuracy import validate

    int8 = tmp_path / "tiny.int8.onnx"
    Quantizer(tiny_onnx, images, "cpu").save(int8)
    size = {"width": SIZE[1], "height": SIZE[0]}
    rows = [{"id": i, "file_name": file.name, **size} for i, file in enumerate(images.files)]
    box = {"id": 1, "image_id": 0, "category_id": 2, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    categories = [{"id": i, "name": n} for i, n in zip((2, 4, 9), "abc", strict=True)]
    data = tmp_path / "val.json"
    data.write_text(json.dumps({"images": rows, "annotations": [box], "categories": categories}))
    with pytest.raises(UserError, match=r"int8: was calibrated on .*00\.png, which is one of the validation images"):
        validate({"float": OnnxRunner(tiny_onnx), "int8": OnnxRunner(int8)}, data, folder)


def test_dense_outputs_are_those_before_suppression(tiny_onnx: Path) -> None:
    scores, boxes = dense_outputs(onnx.load(str(tiny_onnx)), pictures(2))
    assert scores.shape == (2, 8 * 12 + 4 * 6, 3) and boxes.shape == (2, 8 * 12 + 4 * 6, 4)
    best = OnnxRunner(tiny_onnx)(pictures(2))
    assert scores.max((1, 2)) == pytest.approx(best.scores[:, 0], abs=1e-6)


def test_int8_for_tensorrt_parses_and_builds_with_a_dynamic_batch(
    tiny_onnx: Path, images: CalibrationImages, tmp_path: Path
) -> None:
    from tests.helpers.tensorrt_build import build

    Quantizer(tiny_onnx, images, "tensorrt").save(tmp_path / "tiny.int8.onnx")
    built = build(tmp_path / "tiny.int8.onnx")
    assert built.quantized == 4 and built.half == 0  # input and weight of the two inner layers
