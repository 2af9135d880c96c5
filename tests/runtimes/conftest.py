"""Runtimes that people ship to, in an environment that has them: `make test-runtimes`. Elsewhere nothing is collected.

The run ends with the table that docs/runtimes.md shows.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest

from tests.runtimes.matrix import ROWS, table

PACKAGES = ("MNN", "ai_edge_litert", "coremltools", "ncnn", "openvino", "pnnx", "tract")
there = all(find_spec(name) for name in PACKAGES) and shutil.which("onnx2tf")
collect_ignore_glob = [] if there else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("a file in each runtime")
        for line in table():
            terminalreporter.write_line(line)
