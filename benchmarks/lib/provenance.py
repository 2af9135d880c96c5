"""Provenance of a measurement: commit, machine, versions, command. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

from benchmarks.lib.results import ROOT

PACKAGES = (
    "torch", "torchvision", "lightning", "numpy", "pillow", "simplejpeg", "onnx", "onnxruntime", "onnxruntime-gpu",
    "openvino", "pycocotools", "faster-coco-eval", "hotcoco", "ultrafast-pycocotools", "vernier", "mmdet", "mmcv",
    "mmengine", "opencv-python",
)  # fmt: skip


def provenance(suite: str, code: str, arguments: list[str]) -> dict[str, str]:
    """The columns of a row that are the same for a whole run. code: the fingerprint of what the suite measures."""
    return {
        "suite": suite,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "code": code,
        "machine": machine(),
        "versions": versions(),
        "command": " ".join(["python -m benchmarks", suite, *map(_relative, arguments)]),
    }


def commit(root: Path = ROOT) -> str:
    """Short hash of the checkout, with a `+` when files that git knows have changed since; empty without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """Processor, number of CPUs, memory, system and the GPUs that the driver names."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    parts = [f"{_cpu_model()}, {os.cpu_count()} CPUs, {memory:.1f} GiB, {platform.system()} {platform.machine()}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parts += [f"{line.strip()} (driver)" for line in output.splitlines()]
    return "; ".join(parts)


def versions() -> str:
    """Python and the packages that matter, as installed for this interpreter."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _relative(word: str) -> str:
    """A word of the command line for a file that others read: without absolute paths of this machine."""
    if Path(word).is_absolute():
        absolute = Path(word).resolve()
        word = str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else absolute.name
    return f"'{word}'" if " " in word else word
