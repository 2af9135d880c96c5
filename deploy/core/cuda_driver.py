"""The few calls of the CUDA driver that need no package: which GPU is there, and graphs, which PyCUDA does not have."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on using the device


class CudaError(RuntimeError):
    """A driver call failed; the message names the call and CUDA's error."""


@dataclass(frozen=True)
class Gpu:
    """One device as the driver describes it. Versions as text, for example "9.0", "13.0", "580.65.06"."""

    name: str
    compute_capability: str
    cuda: str
    """The newest CUDA that the driver runs."""
    driver: str | None


def gpu(index: int = 0) -> Gpu | None:
    """The device, or None without a driver or without a device of that number. Respects CUDA_VISIBLE_DEVICES."""
    library = _library()
    if library is None or library.cuInit(0) != 0:
        return None
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0 or index >= count.value:
        return None
    name, numbers = ctypes.create_string_buffer(256), []
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDeviceGetName", name, len(name), device)
    _call("cuDriverGetVersion", ctypes.byref(version))
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{numbers[0]}.{numbers[1]}",
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        driver=_driver_version(),
    )


class Graph:
    """Work of one stream, captured once and launched again with a single call."""

    def __init__(self, stream: int) -> None:
        """stream: its CUstream handle. Everything put on it between `begin` and `end` is recorded, not run."""
        self._stream = ctypes.c_void_p(stream)
        self._executable = ctypes.c_void_p()

    def begin(self) -> None:
        _call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)

    def end(self) -> None:
        graph = ctypes.c_void_p()
        _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            _call("cuGraphDestroy", graph)

    def launch(self) -> None:
        _call("cuGraphLaunch", self._executable, self._stream)


# ----------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or str(code).encode()).decode()}")


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:  # Jetson has no such file
        return None
    found = re.search(r"Kernel Module\D*?(?:for \S+)?\s+(\d+\.[\d.]+)", text)
    return found[1] if found else None
