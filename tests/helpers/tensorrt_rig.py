"""What TensorRT can do on this machine, for tests that need it. Every reason is printed with the skipped test."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pytest

from deploy.core import cuda_driver
from deploy.core.errors import UserError

T = TypeVar("T")

# What may not be possible here, and TensorRT's words then; anything else is a failure. tests/trt_rig/README.md has the
# list.
HERE_NOT = {
    "version_compatible": "needs TensorRT's lean runtime",
    "refit": "needs a GPU and its driver",
    "strip": "needs a GPU and its driver",
}


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


def if_possible(build: Callable[[], T], options: Mapping[str, Any]) -> T:
    """What `build` returns, or a skip with TensorRT's own words when this machine cannot do it with these options."""
    try:
        return build()
    except UserError as error:
        reasons = [reason for option, reason in HERE_NOT.items() if options.get(option)]
        if cuda_driver.gpu() is None and any(reason in str(error) for reason in reasons):
            pytest.skip(str(error))
        raise
