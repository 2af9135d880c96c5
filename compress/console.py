"""One console for all output: as wide as the terminal, and wide enough for our tables where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 160  # characters; a log has no edge to wrap at


def open_console(*, quiet: bool = False) -> Console:
    """A console on stdout that colours nothing but what it is told to."""
    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(quiet=quiet, width=width, highlight=False)
