"""Triton's interpreter for machines without a GPU. Here, and not in tests/kernels, because the choice is made when
triton is imported first, and torchvision imports it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-report", type=Path, metavar="FILE", help="write the CPU seconds of every test to FILE")


def pytest_configure(config: pytest.Config) -> None:
    from tests.helpers.cpu_budget import CpuReport

    config.pluginmanager.register(CpuReport(config.getoption("--cpu-report")), "cpu-report")
