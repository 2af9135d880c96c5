"""End of a command: what it says last, and its exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from deploy.core.storage import shown


def gate_failed(what: str) -> NoReturn:
    to_stderr(f"failed: {what}")
    raise typer.Exit(1)


def next_command(*command: Any) -> None:
    _suggest("next: ", command)


def or_command(*command: Any) -> None:
    """Another one that leads on, after `next_command`."""
    _suggest("or:   ", command)


STDOUT = Path("-")
"""The place of results that go to stdout, where nothing else is written then."""
_stdout: list[TextIO] = []


@contextmanager
def own_stdout() -> Iterator[None]:
    """Around a command: `only_results_on_stdout` holds until its end."""
    before = sys.stdout
    _stdout.append(before)
    try:
        yield
    finally:
        sys.stdout = _stdout.pop()


def only_results_on_stdout() -> None:
    """From here on lines for people go to stderr."""
    sys.stdout = sys.stderr


@contextmanager
def results_file(place: Path) -> Iterator[Path]:
    """The file to write results to. Those for `STDOUT` are written to a file first, and then printed."""
    if place != STDOUT:
        yield place
        return
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        yield file
        _stdout[-1].write(file.read_text(encoding="utf-8"))
        _stdout[-1].flush()


def _suggest(what: str, command: tuple[Any, ...]) -> None:
    if is_rank_zero():
        print(f"{what}{shlex.join(['compress', *map(shown, command)])}")


def is_rank_zero() -> bool:
    """Training with several devices starts this program once for each; one of them speaks."""
    return next((os.environ[key] for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), "0") == "0"


def to_stderr(line: str, *, everywhere: bool = False) -> None:
    """`everywhere`: a line that this process alone can say, so it speaks even when it is not the first."""
    if everywhere or is_rank_zero():
        print(shown(line), file=sys.stderr)
