"""Execution providers on which ONNX Runtime can run a file."""

from __future__ import annotations

from typing import Literal

Provider = Literal["cpu", "cuda", "tensorrt"]

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Name in options and recipes → ONNX Runtime's name."""
