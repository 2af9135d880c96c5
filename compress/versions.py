"""Versions of what shapes a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from compress import __version__

PACKAGES = (
    "torch", "torchvision", "lightning", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy",
    "pycocotools",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Package name → version, of those that are installed."""
    found = {"compress": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
