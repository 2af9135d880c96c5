"""`compress serve` in a process of its own, ready."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from benchmarks.lib.load import Target
from benchmarks.lib.results import ROOT


@contextmanager
def started(command: Sequence[str], errors: IO[str] | None = None) -> Iterator[tuple[Target, subprocess.Popen[str]]]:
    """Run the command until the block ends, from when it says that it is ready. errors: for its log."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"ready: http://([\d.]+):(\d+)", line):
                yield Target(match[1], int(match[2])), process
                break
        else:
            raise RuntimeError(f"the server ended with {process.wait()}")
    finally:
        process.kill()
        process.wait()
