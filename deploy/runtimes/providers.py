"""Where an `.onnx` file can run: execution providers of ONNX Runtime, devices of OpenVINO, and ONNX Runtime Web.

OpenVINO is a runtime of its own here, not ONNX Runtime's provider of that name, and so is ONNX Runtime Web. They stand
in the same list because the question is the same one: `--provider cpu,openvino` runs a file in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Provider = Literal["cpu", "cuda", "tensorrt", "openvino", "openvino-gpu", "openvino-npu", "web"]

ONNX_RUNTIME: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Name in options and recipes → ONNX Runtime's name."""
OPENVINO: dict[str, str] = {"openvino": "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}
"""Name in options and recipes → OpenVINO's name of the device."""
WEB = "web"
"""ONNX Runtime Web: WebAssembly, as in a browser."""
ALONE = (*OPENVINO, WEB)
"""Runtimes of their own, which fall back on no other."""
PROVIDERS = (*ONNX_RUNTIME, *ALONE)
ON_CPU: tuple[Provider, ...] = ("cpu", "openvino", "web")
"""Those that compute with the threads of the CPU."""


def openings(providers: Sequence[str]) -> list[tuple[str, ...]]:
    """What of a list is opened together: ONNX Runtime's providers, in order of preference, where the first one stands;
    each other runtime alone.

    openings(["cuda", "openvino", "cpu"])  # [("cuda", "cpu"), ("openvino",)]
    """
    together = tuple(name for name in providers if name not in ALONE)
    found: list[tuple[str, ...]] = []
    for name in providers:
        opened = (name,) if name in ALONE else together
        if opened not in found:
            found.append(opened)
    return found
