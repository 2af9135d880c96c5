"""The graph of the tiny detector, to be harmed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest


@pytest.fixture
def model(tiny_onnx: Path) -> onnx.ModelProto:
    return onnx.load(str(tiny_onnx))
