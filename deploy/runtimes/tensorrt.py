"""A TensorRT engine with its card: pinned buffers, one stream, optionally CUDA graphs. No torch.

Buffers for the largest batch are made once, so a call allocates nothing on the device. Batches larger than the engine's
profile are cut into pieces; smaller ones than its smallest are filled up with black images, whose detections are thrown
away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.card import OUTPUTS
from deploy.core.errors import UserError
from deploy.runtimes.base import DetectionBatch, check_images
from deploy.runtimes.cuda import CudaDevice
from deploy.tensorrt.card import EngineCard, Machine, open_engine, this_machine
from deploy.tensorrt.network import library, load_engine, load_tensorrt, log

_FINAL = {"boxes": np.float32, "scores": np.float32, "labels": np.int64, "count": np.int32}
_DTYPES = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "int64": np.int64, "uint8": np.uint8}


class TensorRTRunner:
    """Runs the engine at `path` on GPU `device`.

    cuda_graph: record the work of a batch size at its first call, and launch it with one call from then on, which
    spares the host's work for each kernel. A graph needs an execution context of its own, with its own scratch memory,
    because TensorRT forbids to change the shape of a recorded one; so batches are then filled up to powers of two.

    Calls from several threads take turns.

    Raises UserError when the engine and its card do not fit each other or this machine (`deploy.tensorrt.card`), or
    when TensorRT, PyCUDA or a GPU is missing.
    """

    def __init__(self, path: Path, *, cuda_graph: bool = False, device: int = 0) -> None:
        path = Path(path)
        trt = load_tensorrt()
        data, self.engine_card = open_engine(path, this_machine(*library(trt), device))
        if self.engine_card.options.strip:
            raise UserError(f"{path}: holds no weights: put them in with `compress refit {path} MODEL.onnx`")
        self.path = path
        self.card = self.engine_card.model
        self._buffers = EngineBuffers(self.engine_card, path)
        self._cuda = CudaDevice(device)
        with self._cuda.active():
            self._new_context = _load(trt, data, path, self.engine_card.options.version_compatible)
            self._start(cuda_graph)

    @property
    def backend(self) -> str:
        machine: Machine = self.engine_card.machine
        return f"{machine.library.lower()} {machine.version}{' graph' if self._graphs is not None else ''}"

    @property
    def on_cpu(self) -> bool:
        return False

    @property
    def batches(self) -> tuple[int, int]:
        """Smallest and largest batch of one launch."""
        return self._buffers.smallest, self._buffers.largest

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        with self._lock, self._cuda.active():
            pieces = []
            for first in range(0, len(images), self._buffers.largest):
                self._put(images[first : first + self._buffers.largest])
                self._queue(copies=True)
                self._cuda.synchronize()
                pieces.append(self._take())
        if len(pieces) == 1:
            return pieces[0]
        return DetectionBatch(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in OUTPUTS))

    def upload(self, images: np.ndarray) -> None:
        """Bring at most one launch of images to the device. Raises UserError for more."""
        check_images(images, self.card)
        if len(images) > self._buffers.largest:
            raise UserError(f"{self.path}: batch {len(images)}: built for at most {self._buffers.largest}")
        with self._lock, self._cuda.active():
            self._put(images)
            self._copy_in()
            self._cuda.synchronize()

    def compute(self) -> None:
        with self._lock, self._cuda.active():
            self._queue(copies=False)
            self._cuda.synchronize()

    def compute_ms(self) -> float:
        with self._lock, self._cuda.active():
            return self._cuda.time_ms(lambda: self._queue(copies=False))

    def fetch(self) -> DetectionBatch:
        with self._lock, self._cuda.active():
            self._copy_out()
            self._cuda.synchronize()
            return self._take()

    # ------------------------------------------------------------------------------------------------

    def _start(self, cuda_graph: bool) -> None:
        """Allocate for the largest batch, and make the first context, so that what fails does so now."""
        self._lock = threading.Lock()
        self._graphs: dict[tuple[int, bool], Callable[[], None]] | None = {} if cuda_graph else None
        self._count = self._launched = 0
        self._contexts: dict[int, Any] = {}  # batch → context; with 0 for all batches when there are no graphs
        self._shaped: dict[int, int] = {}  # the same key → the batch that the context was told
        self._host: dict[str, np.ndarray] = {}
        self._device: dict[str, Any] = {}
        for name, (shape, dtype) in self._buffers.shapes.items():
            self._host[name] = self._cuda.pinned(shape, dtype)
            self._device[name] = self._cuda.allocate(self._host[name].nbytes)
        self._shape(self._buffers.smallest)

    def _put(self, images: np.ndarray) -> None:
        """Into the pinned input, filled up to a batch that is launched."""
        self._count = len(images)
        wanted = self._count if self._graphs is None else 1 << (self._count - 1).bit_length()
        launched = min(max(wanted, self._buffers.smallest), self._buffers.largest)
        self._host["images"][: self._count] = images
        self._host["images"][self._count : launched] = 0
        self._shape(launched)

    def _shape(self, launched: int) -> None:
        """Choose the context for a batch and tell it the shape. The addresses never change."""
        self._launched = launched
        key = 0 if self._graphs is None else launched
        if key not in self._contexts:
            context = self._new_context()
            for name in self._buffers.shapes:
                if not context.set_tensor_address(name, int(self._device[name])):
                    raise UserError(f"{self.path}: TensorRT knows no tensor '{name}': {_last_error()}")
            self._contexts[key] = context
        self._context = self._contexts[key]
        if self._shaped.get(key) != launched:
            if not self._context.set_input_shape("images", (launched, *self._host["images"].shape[1:])):
                raise UserError(f"{self.path}: TensorRT refuses a batch of {launched}: {_last_error()}")
            self._shaped[key] = launched

    def _copy_in(self) -> None:
        self._cuda.to_device(self._device["images"], self._host["images"][: self._launched])

    def _copy_out(self) -> None:
        for name in OUTPUTS:
            self._cuda.to_host(self._host[name][: self._launched], self._device[name])

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise RuntimeError(f"{self.path}: TensorRT failed: {_last_error()}")

    def _all(self) -> None:
        self._copy_in()
        self._execute()
        self._copy_out()

    def _queue(self, *, copies: bool) -> None:
        """Put the work of the current batch on the stream, as a graph when there is one."""
        work = self._all if copies else self._execute
        if self._graphs is None:
            work()
            return
        key = (self._launched, copies)
        if key not in self._graphs:
            work()  # TensorRT does deferred work at a shape's first launch, which must not be recorded
            self._cuda.synchronize()
            self._graphs[key] = self._cuda.capture(work)
        self._graphs[key]()

    def _take(self) -> DetectionBatch:
        """Copies: the pinned memory is written again by the next call."""
        return DetectionBatch(*(self._host[name][: self._count].astype(_FINAL[name]) for name in OUTPUTS))


class EngineBuffers:
    """Buffers that an engine needs, from its card: name → (shape for the largest batch, dtype).

    Raises UserError for an engine that is not one of ours.
    """

    def __init__(self, card: EngineCard, path: Path) -> None:
        height, width = card.model.input_size
        inputs = [(spec.name, spec.dtype, spec.shape[1:]) for spec in card.inputs]
        outputs = tuple(spec.name for spec in card.outputs)
        if inputs != [("images", "uint8", [3, height, width])] or outputs != OUTPUTS or len(card.profiles) != 1:
            raise UserError(f"{path}: not an engine of a deployable file: it takes {inputs} and gives {list(outputs)}")
        self.smallest, self.largest = card.profiles[0].min[0], card.profiles[0].max[0]
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for spec in (*card.inputs, *card.outputs):
            if spec.dtype not in _DTYPES or min(spec.shape[1:], default=1) < 1:
                raise UserError(f"{path}: tensor '{spec.name}' is {spec.dtype} {spec.shape}: not a deployable file's")
            self.shapes[spec.name] = ((self.largest, *spec.shape[1:]), np.dtype(_DTYPES[spec.dtype]))


def _load(trt: Any, data: bytes, path: Path, version_compatible: bool) -> Callable[[], Any]:
    """Makes execution contexts of the engine, and keeps it alive."""
    engine = load_engine(trt, data, version_compatible=version_compatible)
    if engine is None:
        raise UserError(f"{path}: TensorRT does not load it: {_last_error()}")

    def context() -> Any:
        made = engine.create_execution_context()
        if made is None:
            raise UserError(f"{path}: not enough device memory to run it: {_last_error()}")
        return made

    return context


def _last_error() -> str:
    errors = log().errors()
    return errors[-1] if errors else "it gives no reason"
