"""What long work shows where there is no terminal."""

from __future__ import annotations

import pytest

from compress.console import progress


def test_a_log_gets_at_most_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("validating") as advance:
        for done in range(1, 251):
            advance(done, 250)
    assert capsys.readouterr().out.splitlines() == [f"validating: {25 * n} of 250" for n in range(1, 11)]
