from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cheap_exports import tiny_file


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployable file of the tiny detector."""
    return tiny_file(tmp_path_factory)
