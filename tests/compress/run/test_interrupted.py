"""Work that is killed, sent a signal, or whose disk is full, at any moment: nothing finished is lost, and it is taken
up to the same bits. The program behind it: tests/helpers/interrupted.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = 1
ENDED = {"kill": -9, "full": 2, "interrupt": 130, "terminate": 143}


def interrupted(kind: str, how: str, folder: Path, count: int) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.helpers.interrupted",
        kind,
        how,
        str(folder / "tries"),
        str(SEED),
        str(count),
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tries = json.loads(done.stdout)
    assert len(tries) == count
    assert [(one["share"], one["wrong"]) for one in tries if one["wrong"]] == []
    assert any(one["ended"] == ENDED[how] for one in tries)


def test_labelling_that_is_killed(tmp_path: Path) -> None:
    interrupted("pseudo-label", "kill", tmp_path, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_training_that_is_interrupted(tmp_path: Path) -> None:
    interrupted("train", "interrupt", tmp_path, 2)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["interrupt", "terminate"])
@pytest.mark.parametrize("kind", ["train", "run"])
def test_twenty_signals(tmp_path: Path, kind: str, how: str) -> None:
    interrupted(kind, how, tmp_path, 20)


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("kind", ["run", "export", "pseudo-label"])
def test_twenty_moments(tmp_path: Path, kind: str, how: str) -> None:
    if how == "full" and os.geteuid() != 0:
        pytest.skip("a small disk is mounted, which takes root")
    interrupted(kind, how, tmp_path, 20)
