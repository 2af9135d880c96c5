"""ONNX Runtime on the CPU for a graph that is being made: exports and quantized files are compared in it."""

from __future__ import annotations

from typing import Any


def cpu_session(model: bytes | str) -> Any:
    """Open a serialized model, or the file at a path, as an `InferenceSession` that logs errors alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
