"""Choice of the implementation that an operator runs: Triton, CUDA C++, or PyTorch.

`auto` takes Triton for tensors on a CUDA device, CUDA C++ where Triton is not installed and the operator has a
C++ version that can be compiled, and PyTorch everywhere else; that the C++ kernels cannot be had is told once, as a
warning. The choice is made when an operator is called and kept for its backward pass, so leaving `use` between the
two changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "cuda", "torch"]
Chosen = Literal["triton", "cuda", "torch"]


def set_backend(backend: Backend) -> None:
    """Sets the backend of the whole process (every thread), until the next call.

    Raises:
        ValueError: no such backend, or `triton` where Triton is not installed.
    """
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' asked for, but the package triton is not installed")
    _backend = backend


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """`set_backend` for the length of a with-block."""
    before = _backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def chosen(tensor: Tensor, *, has_cuda: bool = False) -> Chosen:
    """Return the implementation that runs for this tensor.

    Args:
        tensor: the operator's main input; only its device matters.
        has_cuda: the operator has a CUDA C++ version. One that has none takes PyTorch under `cuda`.

    The CUDA C++ kernels are compiled by the first call that comes to them.

    Raises:
        ValueError: a CUDA backend is asked for, but the tensor is not on a CUDA device; or `cuda` is asked for and the
            kernels cannot be compiled here. With TRITON_INTERPRET=1 in the environment `triton` runs CPU tensors in
            Triton's interpreter instead.
    """
    if _backend == "torch":
        return "torch"
    if _backend == "auto":
        if not tensor.is_cuda:
            return "torch"
        if HAS_TRITON:
            return "triton"
        return "cuda" if has_cuda and _extension_for_auto() else "torch"
    if not tensor.is_cuda and not (_backend == "triton" and interpreted()):
        raise ValueError(
            f"backend {_backend!r} needs CUDA tensors, got one on {tensor.device}; choose auto or torch"
            + (" (or set TRITON_INTERPRET=1 to interpret)" if _backend == "triton" else "")
        )
    if _backend == "cuda" and not has_cuda:
        return "torch"
    if _backend == "cuda" and (problem := _extension_problem()):
        raise ValueError(f"{problem}\nbackend 'torch' does without them")
    return _backend


def interpreted() -> bool:
    """Triton's interpreter is switched on (for tests: it is slow)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _extension_for_auto() -> bool:
    """The CUDA C++ kernels can be had; says once what is missing."""
    global _warned
    problem = _extension_problem()
    if problem and not _warned:
        _warned = True
        warnings.warn(f"{problem}\nPyTorch computes in place of the kernels, which is slower", stacklevel=4)
    return problem is None


def _extension_problem() -> str | None:
    """Why the CUDA C++ kernels cannot be had. The answer is kept in a plain global, which torch.compile can read."""
    global _problem
    if _problem is None:
        from kernels.csrc import build as cuda

        _problem = cuda.problem() or ""
    return _problem or None


HAS_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None
_backend: Backend = "auto"
_problem: str | None = None  # "" once the extension is loaded
_warned = False
