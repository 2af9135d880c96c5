"""A deployable file in OpenVINO, on its CPU, GPU or NPU device: .onnx, or the .xml that `deploy.targets.openvino` makes
of one. No torch; `openvino` is imported when one opens.

The network is compiled once, for one image. A batch is as many requests, `streams` of them at a time: on a CPU that
takes no longer than a compiled batch, no time at all for a size that was never seen, and gives an image the same
detections whatever comes with it. A dynamic batch would cost a third of the speed.

OpenVINO's own default computes in bfloat16 or float16 where the processor can. Here a file is computed as its card
says: in float32, unless the card says `bf16`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core.card import METADATA_KEY, ModelCard, need_plain, network_precision, parse_card, scanned_card
from deploy.core.environment import usable_cores
from deploy.core.errors import UserError, first_line
from deploy.core.files import ONNX_SUFFIX
from deploy.core.import_path import import_extra
from deploy.core.storage import is_file
from deploy.runtimes.base import DetectionBatch, check_images

_OUTPUTS = {"boxes": np.float32, "scores": np.float32, "labels": np.int64, "count": np.int32}
_PLACE = re.compile(r"Exception from |Check '.*' failed at |FrontEnd API failed ")


@dataclass(frozen=True)
class OpenVINO:
    """Settings of OpenVINO beside its threads.

    streams: images that are computed at the same time. They share the threads: 1 gives an image the shortest time,
    one a thread the most images a second. cache: folder for compiled networks, which then open faster; None: none.
    """

    streams: int = 1
    cache: Path | None = None


class OpenVINORunner:
    """Runs `path` on `device`: `CPU`, `GPU` or `NPU`, and on no other.

    threads: of the CPU, for all streams together; None: one a core. Calls from several threads take turns.

    `settings` is what OpenVINO says that it runs with. Raises UserError when OpenVINO, the device or the precision of
    the card is missing here, and for a file that it cannot compile.
    """

    def __init__(
        self, path: Path, device: str = "CPU", *, threads: int | None = None, settings: OpenVINO | None = None
    ) -> None:
        path, wanted = Path(path), settings or OpenVINO()
        if not is_file(path):
            raise UserError(f"{path}: no such file")
        if path.suffix != ONNX_SUFFIX:
            is_file(path.with_suffix(".bin"))  # OpenVINO itself looks for it
        for name, number in (("threads", threads), ("streams", wanted.streams)):
            if number is not None and number < 1:
                raise UserError(f"{name} must be at least 1, got {number}")
        openvino_core()
        # The .xml holds its card itself, so that it is read first; an .onnx file is only read where there is a device.
        model = None if path.suffix == ONNX_SUFFIX else read_model(path)
        self.card = scanned_card(path) if model is None else _card(model, path)
        if self.card.form.batch not in (None, 1):
            need_plain(self.card, path, "OpenVINO computes one image at a time")
        if self.card.form.heads is not None:
            need_plain(self.card, path, "OpenVINO's detections come")
        self._path = path
        self.threads = threads
        self._device = device
        self._compiled = self._compile(model, threads or usable_cores(), wanted)
        outputs = {name: output.get_shape() for output in self._compiled.outputs for name in output.get_names()}
        if not set(_OUTPUTS) <= set(outputs):
            raise UserError(f"{path}: not a deployable file: it gives {sorted(outputs)}")
        self._shapes = {name: tuple(outputs[name])[1:] for name in _OUTPUTS}
        self._requests = [self._compiled.create_infer_request() for _ in range(wanted.streams)]
        self._lock = threading.Lock()

    @property
    def backend(self) -> str:
        return f"openvino {self._device.lower()}"

    @property
    def on_cpu(self) -> bool:
        return self._device == "CPU"

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON types, for the records of measurements."""
        known = set(self._compiled.get_property("SUPPORTED_PROPERTIES"))
        asked = ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "CACHE_DIR")
        return {name.lower(): _plain(self._compiled.get_property(name)) for name in asked if name in known}

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        found = {name: np.empty((len(images), *self._shapes[name]), dtype) for name, dtype in _OUTPUTS.items()}
        with self._lock:
            streams = len(self._requests)
            for index, image in enumerate(images):
                if index >= streams:
                    self._take(index - streams, found)
                request = self._requests[index % streams]
                request.get_input_tensor().data[0] = image
                request.start_async()
            for index in range(max(0, len(images) - streams), len(images)):
                self._take(index, found)
        return DetectionBatch(**found)

    # ------------------------------------------------------------------------------------------------

    def _take(self, index: int, found: dict[str, np.ndarray]) -> None:
        """Wait for the request of image `index`, and keep what it found."""
        request = self._requests[index % len(self._requests)]
        request.wait()
        for name, values in found.items():
            values[index] = request.get_tensor(name).data[0]

    def _compile(self, model: Any, threads: int, wanted: OpenVINO) -> Any:
        core = openvino_core()
        if self._device not in {name.partition(".")[0] for name in core.available_devices}:
            found = ", ".join(core.available_devices) or "none"
            raise UserError(f"{self._path}: OpenVINO finds no device {self._device} here; it finds {found}")
        precision = "bf16" if network_precision(self.card.precision) == "bf16" else "f32"
        if precision == "bf16" and "BF16" not in core.get_property(self._device, "OPTIMIZATION_CAPABILITIES"):
            raise UserError(f"{self._path}: is computed in bfloat16, which the {self._device} here does not have")
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY" if wanted.streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": str(wanted.streams),
        }
        if self.on_cpu:
            # Threads that are bound to cores wait for them, where another process or session is bound to the same.
            properties |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        if wanted.cache is not None:
            properties["CACHE_DIR"] = str(wanted.cache.absolute())
        model = model or read_model(self._path)
        try:
            model.reshape({"images": [1, 3, *self.card.input_size]})
            return core.compile_model(model, self._device, properties)
        except Exception as error:  # OpenVINO raises RuntimeError for whatever it is
            raise UserError(f"{self._path}: OpenVINO cannot load it: {_reason(error)}") from error


@cache
def openvino_core() -> Any:
    """OpenVINO, one a process: each would load the devices' libraries again. Raises UserError when the package is
    missing, or too old to know its own version."""
    return import_extra("openvino", "openvino").Core()


def read_model(path: Path) -> Any:
    """The network of an .onnx or .xml file. Raises UserError."""
    core = openvino_core()
    try:
        return core.read_model(str(path))
    except Exception as error:  # OpenVINO raises RuntimeError for whatever it is
        raise UserError(f"{path}: OpenVINO cannot load it: {_reason(error)}") from error


# --- details --------------------------------------------------------------------------------------------


def _card(model: Any, path: Path) -> ModelCard:
    """The card of an .xml file: ours, or the metadata that OpenVINO's own converter keeps of an ONNX file."""
    keys = (METADATA_KEY, ["framework", METADATA_KEY])
    text = next((model.get_rt_info(key).astype(str) for key in keys if model.has_rt_info(key)), None)
    return parse_card(text, str(path))


def _plain(value: Any) -> Any:
    """A property as a JSON type: OpenVINO has types of its own for some."""
    if isinstance(value, bool | int | float | str):
        return value
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)


def _reason(error: Exception) -> str:
    """What an error of OpenVINO says, in one line: its summary where it has one, without the places in its sources."""
    lines = str(error).rpartition("Summary:")[2].splitlines()
    said = [line.strip().removeprefix("-- ") for line in lines if line.strip() and not _PLACE.match(line.strip())]
    return "; ".join(said)[:400].rstrip(".") or first_line(error)
