"""What TensorRT can do on this machine, for tests that need it. Every reason is printed with the skipped test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TypeVar

import pytest

from deploy import cuda_driver
from deploy.errors import UserError

T = TypeVar("T")

# Of a build that is right but not possible here; anything else is a failure. tests/trt_rig/README.md has the list.
HERE_NOT = ("needs a GPU and its driver", "needs TensorRT's lean runtime")


def need_tensorrt() -> None:
    """Skip a whole module where nothing can be parsed or built."""
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("tensorrt is not installed: python tests/trt_rig/install.py", allow_module_level=True)


def not_runnable() -> str | None:
    """Why no engine runs here; None when one should."""
    if importlib.util.find_spec("tensorrt") is None:
        return "tensorrt is not installed"
    if cuda_driver.gpu() is None:
        return "no NVIDIA GPU or driver here"
    if importlib.util.find_spec("pycuda") is None:
        return "pycuda is not installed: pip install 'compress-detectors[trt]'"
    return None


needs_gpu = pytest.mark.skipif(not_runnable() is not None, reason=f"runs engines: {not_runnable()}")

needs_device = pytest.mark.skipif(cuda_driver.gpu() is None, reason="no NVIDIA GPU or driver here")


def if_possible(build: Callable[[], T]) -> T:
    """What `build` returns, or a skip with TensorRT's own words when this machine cannot do it."""
    try:
        return build()
    except UserError as error:
        if cuda_driver.gpu() is None and any(reason in str(error) for reason in HERE_NOT):
            pytest.skip(str(error))
        raise
