"""ONNX Runtime on the CPU for a graph that is being made: exports and quantized files are compared in it."""

from __future__ import annotations

from typing import Any


def cpu_session(model: bytes | str, *, as_written: bool = False) -> Any:
    """Open a serialized model, or the file at a path, as an `InferenceSession` that logs errors alone.

    as_written: each node is computed as it stands. By default ONNX Runtime fuses some, others where shapes are known
    beforehand, which moves the last bits.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
