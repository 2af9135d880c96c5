"""Installs the rig into the environment that runs this file, or says in one line why not. `make test` calls it.

It never goes beside a real TensorRT, and is not needed to pass: the tests that use it are skipped with the reason.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REAL = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-cu12-libs", "tensorrt-cu13-libs")


def main() -> int:
    if reason := obstacle():
        print(f"TensorRT rig not installed: {reason}")
        return 0
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*command, str(Path(__file__).parent)]).returncode


def obstacle() -> str | None:
    """Why the rig cannot be here; None when it can."""
    installed = {(found.metadata["Name"] or "").lower().replace("_", "-") for found in metadata.distributions()}
    if real := sorted(installed.intersection(REAL)):
        return f"{real[0]} is here, and the tests use that"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"TensorRT-RTX has no package for {platform.system()} {platform.machine()}"
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "no C compiler on PATH"
    return None


if __name__ == "__main__":
    sys.exit(main())
