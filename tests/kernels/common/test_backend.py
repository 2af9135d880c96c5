"""Which implementation is chosen, on machines that lack something: what they lack is simulated, no GPU is needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension

from kernels.common import backend
from kernels.csrc import build as cuda

COMPILER_FAILS = """Error building extension 'detector_kernels_cuda': [1/4] c++ -Werror -c bindings.cpp -o bindings.o
FAILED: [code=1] bindings.o
In file included from bindings.cpp:2:
common.h:9:10: fatal error: cuda_bf16.h: No such file or directory
    9 | #include <cuda_bf16.h>
compilation terminated.
iou_loss.cu(12): error: identifier "kRows" is undefined
ninja: build stopped: subcommand failed.
"""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """A tensor that says it is on a GPU, in a process that has asked nothing about the extension."""
    cuda.load.cache_clear()
    monkeypatch.setattr(backend, "_problem", None)
    monkeypatch.setattr(backend, "_warned", False)
    with FakeTensorMode():
        yield torch.empty(0, device="cuda")
    cuda.load.cache_clear()


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", False)


def everything_but_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "_nvcc_exists", lambda: True)
    monkeypatch.setattr(cuda.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.7")


def test_auto(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    assert backend.chosen(on_gpu, has_cuda=True) == backend.chosen(on_gpu) == "triton"
    without_triton(monkeypatch)
    monkeypatch.setattr(cuda, "problem", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.chosen(on_gpu, has_cuda=True) == "cuda" and backend.chosen(on_gpu) == "torch"
        assert backend.chosen(on_gpu.to("cpu"), has_cuda=True) == "torch"


@pytest.mark.parametrize("lack", ["ROCm", "built with CUDA", "nvcc", r"C\+\+ compiler", "ninja", "finds none"])
def test_auto_falls_back_and_says_once_why(lack: str, on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    everything_but_a_gpu(monkeypatch)
    monkeypatch.setattr(cpp_extension, "load", lambda **_: pytest.fail("must not be compiled"))
    if lack == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    elif lack == "built with CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif lack == "nvcc":
        monkeypatch.setattr(cuda, "_nvcc_exists", lambda: False)
    elif lack == "ninja":
        monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    elif lack == "finds none":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    else:
        monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=lack) as caught:
        assert [backend.chosen(on_gpu, has_cuda=True) for _ in range(3)] == ["torch"] * 3
    assert len(caught) == 1


def test_a_failing_compiler_is_quoted(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    everything_but_a_gpu(monkeypatch)
    calls = []

    def fail(**_: object) -> None:
        calls.append(1)
        raise RuntimeError(COMPILER_FAILS)

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.warns(UserWarning, match="cuda_bf16.h: No such file"):
        assert backend.chosen(on_gpu, has_cuda=True) == "torch"
    with backend.use("cuda"), pytest.raises(ValueError, match="backend 'torch' does without") as error:
        backend.chosen(on_gpu, has_cuda=True)
    assert str(error.value).splitlines() == [
        "the CUDA C++ kernels do not compile:",
        "common.h:9:10: fatal error: cuda_bf16.h: No such file or directory",
        'iou_loss.cu(12): error: identifier "kRows" is undefined',
        "backend 'torch' does without them",
    ]
    assert len(calls) == 1, "compiled once a process, not at every call"


def test_output_without_errors_is_quoted_from_its_end() -> None:
    assert cuda.complaints("\n".join(map(str, range(40)))) == [str(i) for i in range(30, 40)]


def test_cuda_asked_for_is_refused_without_nvcc(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_but_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "_nvcc_exists", lambda: False)
    with backend.use("cuda"):
        with pytest.raises(ValueError, match=r"(?s)need nvcc.*backend 'torch' does without them$"):
            backend.chosen(on_gpu, has_cuda=True)
        assert backend.chosen(on_gpu) == "torch"  # an operator without a C++ version


def test_training_is_refused_at_its_start(tmp_path: Path, on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.training import distributed
    from deploy.core.errors import UserError
    from tests.helpers import tiny_recipe

    everything_but_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "_nvcc_exists", lambda: False)
    fabric = SimpleNamespace(device=on_gpu.device, launch=lambda: pytest.fail("the run has started"))
    monkeypatch.setattr(distributed, "Fabric", lambda **_: fabric)
    recipe = tiny_recipe.recipe(tmp_path, "train.kernels=cuda")
    with backend.use("auto"), pytest.raises(UserError, match=r"(?s)^train.kernels cuda: .*nvcc.*'torch'"):
        distributed.launch(recipe.train, unused_parameters=recipe.methods.end_early)
