"""The ONNX Runtime runner: providers are what was asked for, and wrong files are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploy.core import cuda_driver
from deploy.core.card import METADATA_KEY, Quantization, card_from_file
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.runtimes.onnx import OnnxRunner, TensorRTProvider, _tensorrt_settings, machine_key
from deploy.tensorrt import network as tensorrt_network
from tests.helpers.tiny_onnx import CARD, pictures


def cuda_works(path: Path) -> bool:
    session = onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    return "CUDAExecutionProvider" in session.get_providers()


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_does_not_come_up_is_an_error_unless_allowed(
    tiny_onnx: Path, provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if cuda_works(tiny_onnx):
        pytest.skip("this machine has a working CUDA provider")
    capfd.readouterr()
    with pytest.raises(UserError, match=f"provider '{provider}' does not come up") as error:
        OnnxRunner(tiny_onnx, (provider,))
    assert "\n" not in str(error.value)
    runner = OnnxRunner(tiny_onnx, (provider, "cpu"), allow_fallback=True)
    assert runner.active_providers == ("cpu",) and runner.backend == "onnxruntime cpu"
    assert runner(pictures(1)).count.shape == (1,)
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own complaint stays out of the user's way


def test_wrong_arguments_and_files_are_one_line_errors(tiny_onnx: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ({"providers": ("gpu",)}, "unknown provider 'gpu': choose from cpu, cuda, tensorrt"),
        ({"providers": ()}, "no provider given"),
        ({"threads": 0}, "threads must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            OnnxRunner(tiny_onnx, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such file"):
        OnnxRunner(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(UserError, match="cannot load it") as error:
        OnnxRunner(tmp_path / "text.onnx")
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["x"], ["y"])
    inputs, outputs = [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "plain.onnx"))
    with pytest.raises(UserError, match="no model card"):
        OnnxRunner(tmp_path / "plain.onnx")
    helper.set_model_props(model, {METADATA_KEY: CARD.model_dump_json()})
    onnx.save(model, str(tmp_path / "carded.onnx"))
    with pytest.raises(UserError, match="not a deployable file"):
        OnnxRunner(tmp_path / "carded.onnx")


@pytest.fixture
def carded(tmp_path: Path) -> Path:
    """A file with nothing but a card, of a student in fp16 and fp32."""
    graph = helper.make_graph([], "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    card = CARD.model_copy(update={"precision": {"backbone": "fp16", "head": "fp32"}})
    helper.set_model_props(model, {METADATA_KEY: card.model_dump_json()})
    onnx.save(model, str(tmp_path / "student.onnx"))
    return tmp_path / "student.onnx"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """GPU and versions that `machine_key` sees; to be changed."""
    seen = {"gpu": "NVIDIA L4", "tensorrt": "10.13.3", "onnxruntime": "1.24.0"}
    monkeypatch.setattr(cuda_driver, "gpu", lambda index: cuda_driver.Gpu(seen["gpu"], "8.9", "13.0", None))
    monkeypatch.setattr(tensorrt_network, "load_tensorrt", lambda: None)
    monkeypatch.setattr(tensorrt_network, "library", lambda trt: ("TensorRT", seen["tensorrt"]))
    monkeypatch.setattr(onnxruntime, "__version__", seen["onnxruntime"])
    return seen


def test_engines_are_kept_apart_by_what_they_depend_on(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [machine_key()]
    assert keys == ["onnxruntime-1.24.0-TensorRT-10.13.3-NVIDIA_L4-8.9"]
    for change in ({"gpu": "Tesla T4"}, {"tensorrt": "10.14"}):
        machine |= change
        keys.append(machine_key())
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.0")
    keys.append(machine_key())

    def missing() -> None:
        raise UserError("tensorrt is not installed")

    monkeypatch.setattr(tensorrt_network, "load_tensorrt", missing)
    keys.append(machine_key())
    monkeypatch.setattr(cuda_driver, "gpu", lambda index: None)
    keys.append(machine_key())
    assert keys[-1] == "onnxruntime-1.25.0-TensorRT-unknown-no_GPU" and len(set(keys)) == 6


def test_settings_of_the_tensorrt_provider(carded: Path, machine: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / machine_key()
    usual = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "True",
        "trt_int8_enable": "False",
    }
    assert _tensorrt_settings(carded, TensorRTProvider(tmp_path / "cache"), 0) == (carded, usual)
    assert folder.is_dir()
    _, settings = _tensorrt_settings(carded, TensorRTProvider(tmp_path / "cache", workspace_gb=1.5), 0)
    assert settings == {**usual, "trt_max_workspace_size": "1500000000"}

    wanted = TensorRTProvider(tmp_path / "cache", ep_context=True, max_batch=8)
    context = folder / f"student-{sha256_of(carded)[:16]}-8_ctx.onnx"
    file, settings = _tensorrt_settings(carded, wanted, 0)
    assert (file, settings) == (
        carded,
        usual
        | {
            # relative: ONNX Runtime does not open a context that names its engine by an absolute path
            "trt_engine_cache_path": context.stem,
            "trt_dump_ep_context_model": "True",
            "trt_ep_context_file_path": str(context),
            "trt_profile_min_shapes": "images:1x3x64x96",
            "trt_profile_opt_shapes": "images:8x3x64x96",
            "trt_profile_max_shapes": "images:8x3x64x96",
        },
    )
    assert (folder / context.stem).is_dir()
    context.write_bytes(b"compiled")
    assert _tensorrt_settings(carded, wanted, 0) == (context, usual)
    # another largest batch, file or machine: not that context
    assert _tensorrt_settings(carded, TensorRTProvider(tmp_path / "cache", True, 9), 0)[0] == carded
    machine["gpu"] = "Tesla T4"
    assert _tensorrt_settings(carded, wanted, 0)[0] == carded


@pytest.mark.parametrize(
    "images",
    [pictures(1)[0], pictures(1).astype(np.float32), pictures(1)[:, :, :32], pictures(1)[:0]],
)
def test_wrong_images_are_one_line_errors(tiny_onnx: Path, images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"images must be uint8 \[batch, 3, 64, 96\]"):
        OnnxRunner(tiny_onnx, threads=1)(images)


@pytest.mark.parametrize(("bits", "dot_product", "told"), [(8, False, True), (7, False, False), (8, True, False)])
def test_weights_that_saturate_are_told_of(
    bits: int,
    dot_product: bool,
    told: bool,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a processor without an integer dot product, where sums of 8-bit weights lose what does not fit."""
    monkeypatch.setattr("deploy.runtimes.onnx.integer_dot_product", lambda: dot_product)
    made = Quantization(target="cpu", weight_bits=bits, layers=1, method="minmax", images_sha256="", image_hashes=["0"])  # type: ignore[arg-type]
    model = onnx.load(str(tiny_onnx))
    card = card_from_file(tiny_onnx).model_copy(update={"quantization": made})
    onnx.helper.set_model_props(model, {METADATA_KEY: card.model_dump_json()})
    onnx.save(model, str(tmp_path / "int8.onnx"))
    OnnxRunner(tmp_path / "int8.onnx", threads=1)
    said = capsys.readouterr().err
    assert ("make the file with --reduce-range" in said) is told and (told or not said)
