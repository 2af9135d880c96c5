"""One console for all output: as wide as the terminal, and wide enough for our tables where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from deploy.core import interrupts

WIDTH_WITHOUT_TERMINAL = 160  # characters; a log has no edge to wrap at


def open_console(*, quiet: bool = False) -> Console:
    """A console on stdout that colours nothing but what it is told to."""
    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(quiet=quiet, width=width, highlight=False)


@contextmanager
def progress(what: str, *, at_least: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Gives a function (done, total): a bar that vanishes at the end on a terminal, ten plain lines elsewhere, if the
    total is `at_least` so large."""
    console = open_console()
    with Progress(console=console, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        before = 0

        def advance(done: int, total: int) -> None:
            nonlocal before
            interrupts.check()
            if bar.disable and total >= at_least and done * 10 // total > before * 10 // total:
                print(f"{what}: {done} of {total}", flush=True)
            before = done
            bar.update(task, completed=done, total=total)

        yield advance
