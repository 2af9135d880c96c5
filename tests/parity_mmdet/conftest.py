"""Comparison with mmdet itself, in the environment that has it: `make test-mmdet`. Elsewhere nothing here is collected.

The run ends with the largest difference of every quantity compared.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.parity_mmdet.compare import LARGEST

collect_ignore_glob = [] if find_spec("mmdet") else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LARGEST:
        terminalreporter.section("largest absolute difference from mmdet")
        for (model, quantity), difference in sorted(LARGEST.items()):
            terminalreporter.write_line(f"{model:<14} {quantity:<44} {difference:.1e}")
