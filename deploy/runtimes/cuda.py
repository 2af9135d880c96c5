"""Device memory, pinned host memory, one stream and its clock, through PyCUDA. No torch.

`CudaDevice` is all that `deploy.runtimes.tensorrt` knows of CUDA; a test can put another one in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from deploy.core import cuda_driver
from deploy.core.errors import UserError, first_line


class CudaDevice:
    """GPU `index`, its primary context (shared with ONNX Runtime and torch), and a stream of our own.

    Every method but `active` must be called inside `with device.active():`. Raises UserError when PyCUDA or the GPU is
    missing.
    """

    def __init__(self, index: int = 0) -> None:
        if cuda_driver.gpu(index) is None:
            raise UserError(f"no CUDA GPU {index} here: an engine needs one")
        try:
            import pycuda.driver as driver
        except ModuleNotFoundError as error:
            raise UserError("pycuda is not installed: pip install 'compress-detectors[trt]'") from error
        except (ImportError, OSError) as error:
            raise UserError(f"pycuda does not load, which needs an NVIDIA driver: {first_line(error)}") from error
        driver.init()
        self._driver = driver
        self._context = driver.Device(index).retain_primary_context()
        with self.active():
            self._stream = driver.Stream()
            self._start, self._stop = driver.Event(), driver.Event()

    @contextmanager
    def active(self) -> Iterator[None]:
        """The device's context is current in this thread."""
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    @property
    def stream(self) -> int:
        """The CUstream handle."""
        return int(self._stream.handle)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Page-locked host memory: copies from and to it run at the full speed of the bus, beside other work."""
        return self._driver.pagelocked_empty(shape, dtype)

    def allocate(self, size: int) -> Any:
        """Device memory of `size` bytes; `int()` of it is the address."""
        return self._driver.mem_alloc(size)

    def to_device(self, address: Any, host: np.ndarray) -> None:
        """Queue a copy from contiguous pinned memory."""
        self._driver.memcpy_htod_async(address, host, self._stream)

    def to_host(self, host: np.ndarray, address: Any) -> None:
        """Queue a copy into contiguous pinned memory."""
        self._driver.memcpy_dtoh_async(host, address, self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` queues, without running it; the result queues all of it with one call."""
        graph = cuda_driver.Graph(self.stream)
        graph.begin()
        work()
        graph.end()
        return graph.launch

    def time_ms(self, work: Callable[[], None]) -> float:
        """Queue `work`, wait for it, and return its time between two CUDA events."""
        self._start.record(self._stream)
        work()
        self._stop.record(self._stream)
        self._stop.synchronize()
        return float(self._stop.time_since(self._start))
