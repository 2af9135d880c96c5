"""Compiles the CUDA C++ versions of `iou_loss` and `mc_dropout`, for machines without Triton (Jetson, Windows).

They are compiled by torch's extension loader when first used, which takes a minute and needs nvcc, a host compiler and
ninja; torch keeps the result (in TORCH_EXTENSIONS_DIR). `python -m kernels.csrc.build` does it ahead of time, also on a
machine without a GPU where TORCH_CUDA_ARCH_LIST says for which ("8.7" is Jetson Orin).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent


@functools.cache
def load() -> Any:
    """The compiled extension.

    Raises:
        RuntimeError: something that compiling needs is missing (one line), or the compiler failed (its complaints).
    """
    from torch.utils import cpp_extension

    if missing := _missing():
        raise RuntimeError(missing)
    try:
        return cpp_extension.load(
            name="detector_kernels_cuda",
            sources=[str(SOURCES / name) for name in ("bindings.cpp", "iou_loss.cu", "mc_dropout.cu")],
            extra_cuda_cflags=["-O3"],
            with_cuda=True,
        )
    except (RuntimeError, ValueError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise RuntimeError("\n".join(("the CUDA C++ kernels do not compile:", *complaints(str(error))))) from error


def problem() -> str | None:
    """Why `load` cannot give the extension, or None when it does."""
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


def complaints(output: str) -> list[str]:
    """The lines of a compiler's output that say what is wrong, at most 20; of other output the last 10."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = re.compile(r"\b(error|fatal)\s*:|\berror [A-Z]+\d+|undefined (reference|symbol)|cannot find", re.IGNORECASE)
    return [line for line in lines if wrong.search(line)][:20] or lines[-10:]


def _missing() -> str | None:
    """One line about the first thing that compiling needs and this machine does not have."""
    from torch.utils import cpp_extension

    if torch.version.hip is not None:
        return "the CUDA C++ kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if torch.version.cuda is None:
        return "the CUDA C++ kernels need a PyTorch that is built with CUDA, and this one is not"
    if not _nvcc_exists():
        return "the CUDA C++ kernels need nvcc: install the CUDA toolkit and set CUDA_HOME"
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"the CUDA C++ kernels need a C++ compiler, and {compiler} is not found: install one, or name it in CXX"
    if not cpp_extension.is_ninja_available():
        return "the CUDA C++ kernels need ninja to be compiled: pip install ninja"
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return (
            "the CUDA C++ kernels are compiled for the GPU of this machine, but PyTorch finds none: set "
            "TORCH_CUDA_ARCH_LIST (e.g. 8.7) to compile for another machine"
        )
    return None


def _nvcc_exists() -> bool:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return home is not None and (Path(home) / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")).exists()


if __name__ == "__main__":
    try:
        print(f"compiled: {load().__file__}")
    except RuntimeError as error:
        sys.exit(f"error: {error}")
