"""Engines of the tiny file, built once; and a way to build more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploy.tensorrt.build import build_engine
from deploy.tensorrt.card import (
    EngineCard,
    EngineOptions,
    card_path,
)
from tests.helpers import tensorrt_rig

tensorrt_rig.need_tensorrt()


@pytest.fixture(scope="session")
def other_onnx(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student after more training: other weights, the same structure."""
    model = onnx.load(str(tiny_onnx))
    rng = np.random.default_rng(0)
    for item in model.graph.initializer:
        if item.name.startswith("module.detector"):
            value = numpy_helper.to_array(item)
            item.CopyFrom(
                numpy_helper.from_array((value + rng.normal(0, 0.02, value.shape)).astype(np.float32), item.name)
            )
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    onnx.save(model, str(path))
    return path


@pytest.fixture
def model(tiny_onnx: Path) -> onnx.ModelProto:
    return onnx.load(str(tiny_onnx))


@pytest.fixture
def build(tiny_onnx: Path, tmp_path: Path) -> Callable[..., EngineCard]:
    """Build the tiny file, or another, into tmp_path/tiny.engine."""

    def build(onnx_file: Path = tiny_onnx, name: str = "tiny.engine", **options: Any) -> EngineCard:
        chosen = EngineOptions(**{"batches": (1, 4, 8), **options})
        return tensorrt_rig.if_possible(
            lambda: build_engine(onnx_file, tmp_path / name, chosen, timing_caches=tmp_path / "timing"), options
        )

    return build


@pytest.fixture(scope="session")
def built(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with its card, which tests copy."""
    folder = tmp_path_factory.mktemp("built")
    build_engine(tiny_onnx, folder / "tiny.engine", EngineOptions(batches=(1, 4, 8)), timing_caches=folder)
    return folder / "tiny.engine"


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy of an engine with its card."""
    for path in (built, card_path(built)):
        shutil.copy(path, tmp_path)
    return tmp_path / "tiny.engine"
