"""The OpenVINO runner: ONNX Runtime's detections, in the precision of the card, whatever the batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import deploy
from deploy.core.card import METADATA_KEY, card_from_file
from deploy.core.errors import UserError
from deploy.latency.measure import shared_settings
from deploy.quantize.calibrate import CalibrationImages, choose_images
from deploy.quantize.file import Quantizer
from deploy.runtimes import openvino as runtime
from deploy.runtimes.base import DetectionBatch
from deploy.runtimes.onnx import OnnxRunner
from deploy.runtimes.open import RUNNERS, open_runner, open_runners
from deploy.runtimes.openvino import OpenVINO, OpenVINORunner
from deploy.serve.triton_repo import write_triton_model
from deploy.tensorrt.card import claimed_precision, remedy
from tests.helpers.tiny_onnx import pictures


@pytest.fixture
def openvino() -> Any:
    return pytest.importorskip("openvino", reason="openvino is not installed: the extra openvino has it")


def with_precision(path: Path, out: Path, precision: str) -> Path:
    """The file with another precision on its card."""
    card = card_from_file(path)
    card = card.model_copy(update={"precision": dict.fromkeys(card.precision, precision)})
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {METADATA_KEY: card.model_dump_json()})
    onnx.save(model, str(out))
    return out


def together(parts: Sequence[DetectionBatch]) -> DetectionBatch:
    return DetectionBatch(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def assert_equal(a: DetectionBatch, b: DetectionBatch, *, score: float = 0.0, box_px: float = 0.0) -> None:
    """The same detections in the same order, up to these differences."""
    assert a.count.tolist() == b.count.tolist() and a.count.min() > 0
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=score)
    np.testing.assert_allclose(a.boxes, b.boxes, rtol=0, atol=box_px)


def layer_formats(runner: OpenVINORunner, kind: str) -> set[str]:
    """The formats in which OpenVINO computes the layers of a kind."""
    facts = [node.get_rt_info() for node in runner._compiled.get_runtime_model().get_ordered_ops()]
    return {fact["runtimePrecision"].value for fact in facts if fact["layerType"].value == kind}


def test_float32_is_onnx_runtimes_and_a_batch_is_its_images(openvino: Any, tiny_onnx: Path) -> None:
    """An image finds the same in a batch as alone, to the bit, with more streams than images as well."""
    images, runner = pictures(5), OpenVINORunner(tiny_onnx, threads=1)
    found = runner(images)
    assert_equal(found, OnnxRunner(tiny_onnx, threads=1)(images), score=1e-4, box_px=0.05)
    assert [array.dtype for array in vars(found).values()] == [np.float32, np.float32, np.int64, np.int32]
    assert_equal(found, together([runner(images[i : i + 1]) for i in range(5)]))
    assert_equal(found, OpenVINORunner(tiny_onnx, threads=2, settings=OpenVINO(streams=2))(images))
    assert_equal(found, OpenVINORunner(tiny_onnx, threads=1, settings=OpenVINO(streams=8))(images))


def test_settings_are_what_runs(openvino: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    runner = OpenVINORunner(tiny_onnx, threads=1)
    usual = {
        "inference_precision_hint": "f32",
        "performance_hint": "LATENCY",
        "num_streams": 1,
        "inference_num_threads": 1,
    }
    assert runner.settings == json.loads(json.dumps(runner.settings)) == usual
    assert (runner.backend, runner.on_cpu, runner.threads) == ("openvino cpu", True, 1)
    recorded = shared_settings({"a": [runner], "b": [OnnxRunner(tiny_onnx, threads=1)]}, [(tiny_onnx, b"")])
    assert recorded["runtime"] == {"a": usual}
    cache = tmp_path / "cache"
    runner = OpenVINORunner(tiny_onnx, threads=2, settings=OpenVINO(streams=2, cache=cache))
    assert runner.settings["num_streams"] == 2 and runner.settings["performance_hint"] == "THROUGHPUT"
    assert list(cache.iterdir())
    assert_equal(OpenVINORunner(tiny_onnx, settings=OpenVINO(cache=cache))(pictures(1)), runner(pictures(1)))


def test_the_card_says_the_precision(openvino: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    """In float32 whatever the processor would rather do; in bfloat16 when the card says so and nowhere else."""
    assert layer_formats(OpenVINORunner(tiny_onnx, threads=1), "Convolution") == {"f32"}
    half = with_precision(tiny_onnx, tmp_path / "tiny.bf16.onnx", "bf16")
    with pytest.raises(UserError, match=r"tiny.bf16.onnx: .*bfloat16: --provider openvino"):
        OnnxRunner(half)
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UserError, match="bfloat16, which the CPU here does not have"):
            OpenVINORunner(half)
        pytest.skip("this processor has no bfloat16")
    runner = OpenVINORunner(half, threads=1)
    assert layer_formats(runner, "Convolution") == {"bf16"}
    assert runner.settings["inference_precision_hint"] == "bf16"
    found, exact = runner(pictures(2)), OnnxRunner(tiny_onnx, threads=1)(pictures(2))
    difference = np.abs(found.scores[:, :5] - exact.scores[:, :5]).max()
    assert 1e-5 < difference < 0.05


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationImages:
    folder = tmp_path_factory.mktemp("images")
    for index, picture in enumerate(pictures(6, seed=5)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{index}.png")
    return choose_images(sorted(folder.iterdir()), 6)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_both_formats_of_int8_run_in_int8(
    openvino: Any, tiny_onnx: Path, calibration: CalibrationImages, target: Any, tmp_path: Path
) -> None:
    """It rescales inside its kernels, so its detections are near ONNX Runtime's and not those to the digit."""
    file = Quantizer(tiny_onnx, calibration, target).save(tmp_path / "tiny.int8.onnx", ()).path
    runner = OpenVINORunner(file, threads=1)
    assert layer_formats(runner, "Convolution") <= {"u8", "i8"}
    found, reference = runner(pictures(3)), OnnxRunner(file, threads=1)(pictures(3))
    np.testing.assert_allclose(found.scores[:, :5], reference.scores[:, :5], atol=0.03)


def test_it_is_asked_for_by_name(openvino: Any, tiny_onnx: Path) -> None:
    model = deploy.open(tiny_onnx, "openvino", threads=1)
    assert model.runner.backend == "openvino cpu"
    assert len(model.detect(pictures(1)[0].transpose(1, 2, 0))) > 0
    with pytest.raises(UserError, match=r"provider 'openvino': is a runtime of its own, .* give it alone"):
        open_runner(tiny_onnx, ("openvino", "cpu"))
    with pytest.raises(UserError, match="unknown provider 'vino': choose from cpu, cuda, tensorrt, openvino, open"):
        open_runner(tiny_onnx, ("vino",))
    missing = {"GPU", "NPU"} - {name.partition(".")[0] for name in openvino.Core().available_devices}
    for device in missing:
        with pytest.raises(UserError, match=f"OpenVINO finds no device {device} here; it finds "):
            open_runner(tiny_onnx, (f"openvino-{device.lower()}",))


def test_a_bf16_file_is_opened_where_it_can_be(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = with_precision(tiny_onnx, tmp_path / "tiny.bf16.onnx", "bf16")
    opened = []
    kind = RUNNERS[".onnx"]
    note = replace(kind, open=lambda path, providers, **_: opened.append((path.name, *providers)))
    monkeypatch.setitem(RUNNERS, ".onnx", note)
    open_runners([tiny_onnx, half], ["cpu", "openvino"])
    assert opened == [("tiny.onnx", "cpu"), ("tiny.onnx", "openvino"), ("tiny.bf16.onnx", "openvino")]
    with pytest.raises(UserError, match=r"tiny.bf16.onnx: the server's ONNX Runtime does not compute in bfloat16"):
        write_triton_model(tmp_path / "models", half)
    claim = claimed_precision("tiny.onnx", card_from_file(half))
    assert claim == "bf16" and remedy(claim, card_from_file(half)).endswith("build from that one")


def test_what_it_cannot_open_is_one_line(openvino: Any, tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(str(tiny_onnx))
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "NoSuchOperator"
    onnx.save(model, str(tmp_path / "odd.onnx"))
    for arguments, message in (
        ((tmp_path / "none.onnx",), "no such file"),
        ((tmp_path / "odd.onnx",), r"odd.onnx: OpenVINO cannot load it: .*NoSuchOperator"),
    ):
        with pytest.raises(UserError, match=message) as error:
            OpenVINORunner(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="threads must be at least 1"):
        OpenVINORunner(tiny_onnx, threads=0)
    with pytest.raises(UserError, match="streams must be at least 1"):
        OpenVINORunner(tiny_onnx, settings=OpenVINO(streams=0))
    with pytest.raises(UserError, match=r"images must be uint8 \[batch, 3, 64, 96\]"):
        OpenVINORunner(tiny_onnx)(pictures(1)[:, :, :32])


def test_without_the_package_it_says_what_to_install(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtime.openvino_core.cache_clear()
    with pytest.raises(UserError, match=r"^openvino is not installed: pip install 'compress-detectors\[openvino\]'$"):
        open_runner(tiny_onnx, ("openvino",))
