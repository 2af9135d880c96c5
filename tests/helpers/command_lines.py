"""Command lines in tests: how they are run, and a recipe for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RECIPE = """\
name: example
data: {synthetic: {train: 4, val: 2, size: 64}, short: 64, long: 64}
student: {backbone: nano}
train: {epochs: 1, batch_size: 2}
"""

Outcome = tuple[int, str, str]
Run = Callable[[str], Outcome]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() if file.is_file() else b"" for file in sorted(folder.rglob("*"))}
