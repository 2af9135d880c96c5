"""Calling a runtime's own converter, which is a program of its own and leaves files where it runs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from deploy.core.errors import UserError


def convert(source: Path, words: Sequence[str], name: str, folder: Path, made: Path) -> None:
    """Run a converter in `folder`.

    words: the command. name: of the converter, for people. made: what it should write. source: the exported file.

    Raises UserError, with its last error or its last line, where it fails or `made` is not there.
    """
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode == 0 and made.is_file():
        return
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    said = [line for line in lines if "ERROR" in line] or lines or [f"it ends with {done.returncode}"]
    raise UserError(f"{source}: {name} fails: {said[-1][:300]}")
