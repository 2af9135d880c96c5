"""A run that rounds: onnx's own evaluator, which computes float16 in float16, with every value of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class GatherElements(OpRun):
    """onnx's own stops at some sixty entries."""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis),)


def half_run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every value that the graph computes, by name."""
    with np.errstate(all="ignore"):
        found: dict[str, Any] = ReferenceEvaluator(model, new_ops=[GatherElements]).run(None, feed, intermediate=True)
    return found


def not_finite(values: dict[str, Any]) -> list[str]:
    """Names of the float16 values that hold an infinity or no number."""
    halves = {name: value for name, value in values.items() if getattr(value, "dtype", None) == np.float16}
    assert halves
    return [name for name, value in halves.items() if not np.isfinite(value).all()]
