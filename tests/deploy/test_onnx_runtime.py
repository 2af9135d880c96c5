"""The ONNX Runtime runner: providers are what was asked for, and wrong files are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploy.card import METADATA_KEY
from deploy.errors import UserError
from deploy.runtimes.onnx import OnnxRunner
from tests.deploy.tiny import CARD, pictures


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


@pytest.mark.parametrize(
    "images",
    [pictures(1)[0], pictures(1).astype(np.float32), pictures(1)[:, :, :32], pictures(1)[:0]],
)
def test_wrong_images_are_one_line_errors(tiny_onnx: Path, images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"images must be uint8 \[batch, 3, 64, 96\]"):
        OnnxRunner(tiny_onnx, threads=1)(images)
