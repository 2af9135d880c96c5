from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_onnx import export_tiny


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployable file of the tiny detector."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    export_tiny(path)
    return path
