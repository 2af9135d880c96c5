"""Writes the golden curves anew, or compares with them bit for bit (see `tests.golden.curves`).

python -m tests.golden.write [--exact] [FAMILY ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from deploy.core.files import write_text
from tests.golden.curves import FAMILIES, curves, differences, golden_file, to_text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.write", description="Golden curves of training.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all if none is named")
    parser.add_argument("--exact", action="store_true", help="write nothing: compare every digit")
    options = parser.parse_args()
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    problems: list[str] = []
    for family in options.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            found = curves(family, Path(folder))
        if options.exact:
            problems += differences(family, found, exact=True)
        else:
            write_text(golden_file(family), heading(family) + to_text(found))
        refused = [name for name, curve in found.items() if curve is None]
        print(f"{family}: {len(found) - len(refused)} curves; refused: {', '.join(refused) or 'none'}")
    if options.exact:
        print("\n".join(problems) if problems else "bit for bit the same")
    return 1 if problems else 0


def heading(family: str) -> str:
    """Versions and machine that wrote the file; not compared."""
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "torchvision", "numpy"))
    return (
        f"# Loss terms of {family} at each step; tests/golden/curves.py says how and why. Written with {versions} on "
        f"{torch.backends.cpu.get_cpu_capability()}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
