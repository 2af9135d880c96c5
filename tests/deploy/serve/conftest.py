from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.core.card import OperatingPoint
from tests.helpers.cheap_exports import tiny_file
from tests.helpers.red_rectangle_model import CARD, write_red_model
from tests.helpers.server_process import Server, server


@pytest.fixture(scope="session")
def red_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that finds the red rectangle, at once. It has an operating point."""
    path = tmp_path_factory.mktemp("red") / "red.onnx"
    point = OperatingPoint(score=0.2549, f1=0.8, precision=1, recall=2 / 3, class_scores=[0.2549, None], images=3)
    write_red_model(path, card=CARD.model_copy(update={"operating_point": point}))
    return path


@pytest.fixture(scope="session")
def slow_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Server of the same file, with some milliseconds of work an image."""
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    write_red_model(path, work=12)
    return path


@pytest.fixture(scope="session")
def red_server(red_onnx: Path) -> Iterator[Server]:
    """A server of the red model with everything at its default, but patient: the tests share their machine."""
    with server(red_onnx, "--threads", "1", "--deadline-ms", "600000") as running:
        yield running


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with decoding and suppression in its graph."""
    return tiny_file(tmp_path_factory)
