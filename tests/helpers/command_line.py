"""What tests of the command line share: a recipe, and the type of their fixture `run`."""

from __future__ import annotations

from collections.abc import Callable

RECIPE = """\
name: example
data: {synthetic: {train: 4, val: 2, size: 64}, short: 64, long: 64}
student: {backbone: nano}
train: {epochs: 1, batch_size: 2}
"""

Outcome = tuple[int, str, str]
"""Exit code, stdout, stderr."""

Run = Callable[[str], Outcome]
