"""What holds for all tests: Triton's interpreter on machines without a GPU, examples without a time limit, and
`--cpu-report`.

The interpreter is chosen here, and not in tests/kernels, because the choice is made when triton is imported first, and
torchvision imports it.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")

# An export makes some hundred thousand objects; Python's own thresholds spend an eighth of it looking for garbage.
gc.set_threshold(50_000, 20, 20)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if find_spec("hypothesis"):  # not in the environment of tests/parity_mmdet
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-report", type=Path, metavar="FILE", help="write the CPU seconds of every test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: Ctrl-C would reach no test
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from tests.helpers.cpu_budget import CpuReport

    config.pluginmanager.register(CpuReport(config.getoption("--cpu-report")), "cpu-report")


@pytest.fixture(scope="module")
def few_rounds() -> Iterator[None]:
    """For tests that export, and are not about suppression."""
    from tests.helpers.cheap_exports import rounds

    with rounds(4):
        yield


@pytest.fixture(scope="session", autouse=True)
def convert_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Networks with the same weights are converted to ONNX once in a session."""
    from tests.helpers.cheap_exports import conversions, shared_folder

    with conversions(shared_folder(tmp_path_factory, "converted-once")):
        yield
