"""One process at a time, and nothing to clean up after one that was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.core import lock
from deploy.core.errors import UserError
from deploy.core.lock import locked

HOLDER = """
import sys
from pathlib import Path
from deploy.core.lock import locked
with locked(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "new" / "run.lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_in_one_line_that_names_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError) as refused, locked(tmp_path / "new" / "run.lock", "runs/first"):
        pass
    said = r"runs/first: is in use by process (\d+) on \S+, since \S+; wait for its end, or take another name"
    found = re.fullmatch(said, str(refused.value))
    assert found is not None and int(found[1]) == holder.pid


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    file = tmp_path / "new" / "run.lock"
    assert file.is_file()
    with locked(file, "runs/first"):
        pass
    assert not file.exists()


def test_it_is_free_at_the_end_however_the_work_ends(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(file, "runs/first"):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_a_process_does_not_take_it_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with locked(tmp_path / "run.lock", "runs/first"):
        for folder in (tmp_path, tmp_path / "link"):
            with pytest.raises(UserError, match="runs/first: is in use by this process"):
                locked(folder / "run.lock", "runs/first").__enter__()


def test_a_child_that_lives_on_does_not_keep_it(tmp_path: Path) -> None:
    """Loader processes are forked, and outlive a killed parent by seconds."""
    reading, writing = os.pipe()
    with locked(tmp_path / "run.lock", "runs/first"):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        assert subprocess.run(command, env=environment, input="", capture_output=True, text=True).stdout == "held\n"
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    with locked(tmp_path / "run.lock", "runs/first"):
        pass
    said = "run.lock: this file system keeps no locks (No locks available); start no second run here\n"
    assert capsys.readouterr().err.endswith(said)
