"""End of a command: what it says last, and its exit code."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any, NoReturn

import typer


def gate_failed(what: str) -> NoReturn:
    to_stderr(f"failed: {what}")
    raise typer.Exit(1)


def next_command(*command: Any) -> None:
    if is_rank_zero():
        print(f"next: {shlex.join(['compress', *map(str, command)])}")


def is_rank_zero() -> bool:
    """Training with several devices starts this program once for each; one of them speaks."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def to_stderr(line: str, *, everywhere: bool = False) -> None:
    """`everywhere`: a line that this process alone can say, so it speaks even when it is not the first."""
    if everywhere or is_rank_zero():
        print(line, file=sys.stderr)
