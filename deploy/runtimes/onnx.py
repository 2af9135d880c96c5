"""A deployable ONNX file in ONNX Runtime: CPU, CUDA or the TensorRT provider."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from deploy.core import cuda_driver
from deploy.core.card import OUTPUTS, Form, ModelCard, card_from_session, need_plain, network_precision, scanned_card
from deploy.core.environment import integer_dot_product, usable_cores
from deploy.core.errors import UserError, first_line
from deploy.core.files import sha256_of
from deploy.runtimes.base import DetectionBatch, check_images, in_form
from deploy.runtimes.providers import ONNX_RUNTIME

_TYPES = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}


@dataclass(frozen=True)
class TensorRTProvider:
    """Settings of ONNX Runtime's TensorRT provider, which builds an engine when a file is opened, unless it finds it.

    cache: engines and timings are kept below it, in a folder for each `machine_key`. ep_context: also keep the whole
    optimised model there, as `<name>-<sha>-<max_batch>_ctx.onnx`, and open that one when it is there: the fastest
    start. Its engine is built once for batches of 1 to `max_batch`; an engine without it for the batches that come.
    """

    cache: Path = Path.home() / ".cache" / "compress" / "onnxruntime"
    ep_context: bool = False
    max_batch: int = 32
    workspace_gb: float | None = None


class OnnxRunner:
    """Runs `path` on `providers`, in order of preference: `cpu`, `cuda`, `tensorrt`.

    ONNX Runtime quietly continues on the CPU when a provider does not come up; here that is a UserError,
    unless `allow_fallback`. `active_providers` says what the session really has. `threads`: CPU threads
    inside an operator, None for ONNX Runtime's choice (all cores). device: the GPU's number.

    On a GPU, input and outputs are bound to its memory, so that the steps of a call can be taken apart.
    """

    def __init__(
        self,
        path: Path,
        providers: Sequence[str] = ("cpu",),
        *,
        allow_fallback: bool = False,
        threads: int | None = None,
        device: int = 0,
        tensorrt: TensorRTProvider | None = None,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        file, settings = path, dict[str, str]()
        if "tensorrt" in providers and ONNX_RUNTIME["tensorrt"] in onnxruntime.get_available_providers():
            file, settings = _tensorrt_settings(path, tensorrt or TensorRTProvider(), device)
        self._session = _open(file, providers, threads, device, settings)
        names = {value: key for key, value in ONNX_RUNTIME.items()}
        self.active_providers = tuple(names.get(name, name) for name in self._session.get_providers())
        missing = [name for name in providers if name not in self.active_providers]
        if missing and not allow_fallback:
            running = self.active_providers[0]
            raise UserError(
                f"{path}: provider '{missing[0]}' does not come up here, {running} would run it: "
                "install its libraries, choose another provider, or allow the fallback"
            )
        if file == path:
            self.card = card_from_session(self._session, str(path))
        else:
            self.card = scanned_card(path)
        if network_precision(self.card.precision) == "bf16":
            raise UserError(
                f"{path}: ONNX Runtime would compute it in float32, not bfloat16: --provider openvino runs it"
            )
        if self.active_providers[0] == "cpu" and saturates(self.card):
            print(
                f"note: {path}: this processor adds products of 8-bit weights in 16 bits, and loses what does not fit "
                "there, detections too: make the file with --reduce-range, and validate it here",
                file=sys.stderr,
            )
        self.path = path
        self.threads = threads
        heads = self.card.form.heads
        self._names = list(OUTPUTS) if heads is None else heads.names
        inputs = [(value.name, value.type) for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        if inputs != [("images", _TYPES[self.card.form.images])] or outputs != self._names:
            raise UserError(f"{path}: not a deployable file: it takes {inputs} and gives {outputs}")
        self._device = device
        bound = self.active_providers[0] != "cpu" and self.card.form == Form()
        self._binding = self._session.io_binding() if bound else None
        self._uploaded: np.ndarray | None = None
        self._fetched: DetectionBatch | None = None

    @property
    def backend(self) -> str:
        return f"onnxruntime {self.active_providers[0]}"

    @property
    def on_cpu(self) -> bool:
        return self.active_providers[0] == "cpu"

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        check_images(images, self.card)
        return in_form(self.card, self._run, images)

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        return self._session.run(self._names, {"images": images})

    def upload(self, images: np.ndarray) -> None:
        """See `deploy.runtimes.base.StagedRunner`. On the CPU there is nothing to move."""
        check_images(images, self.card)
        self._uploaded = images
        if self._binding is not None:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(images), "cuda", self._device)
            self._binding.bind_ortvalue_input("images", value)
            for name in OUTPUTS:
                self._binding.bind_output(name, "cuda", self._device)
            self._binding.synchronize_inputs()

    def compute(self) -> None:
        if self._uploaded is None:
            raise RuntimeError("compute() before upload()")
        if self._binding is None:
            self._fetched = in_form(self.card, self._run, self._uploaded)
            return
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def compute_ms(self) -> None:
        """None: ONNX Runtime does not give its stream away, so only the host's clock sees it."""
        return None

    def fetch(self) -> DetectionBatch:
        if self._binding is not None:
            return DetectionBatch(*self._binding.copy_outputs_to_cpu())
        if self._fetched is None:
            raise RuntimeError("fetch() before compute()")
        return self._fetched


def machine_key(device: int = 0) -> str:
    """Name of a folder for what an engine depends on beside its file: ONNX Runtime, TensorRT and the GPU.

    TensorRT's version is that of its Python package; `unknown` without one, where ONNX Runtime may still find the
    library.
    """
    from deploy.tensorrt.network import library, load_tensorrt

    try:
        tensorrt = library(load_tensorrt())
    except UserError:
        tensorrt = ("TensorRT", "unknown")
    gpu = cuda_driver.gpu(device)
    on = ("no GPU",) if gpu is None else (gpu.name, gpu.compute_capability)
    parts = ("onnxruntime", onnxruntime.__version__, *tensorrt, *on)
    return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)


def saturates(card: ModelCard) -> bool:
    """An int8 file whose weights use all bits, on a processor that has no integer dot product."""
    made = card.quantization
    return made is not None and made.target == "cpu" and made.weight_bits == 8 and not integer_dot_product()


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Quiet, with `threads` on the CPU (None: one a core).

    ONNX Runtime's idle threads spin, which shortens the way to the next operator. Where they fill all CPUs of the
    process they take time from the thread they wait for (10 % on two CPUs), so there they sleep.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if threads is None or threads >= usable_cores():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


# ----------------------------------------------------------------------------------------------------


def _tensorrt_settings(path: Path, wanted: TensorRTProvider, device: int) -> tuple[Path, dict[str, str]]:
    """The file to open, and the options of the TensorRT provider. Number formats follow the card: TensorRT 10 uses
    fp16 and int8 kernels only where they are allowed."""
    card = scanned_card(path)
    need_plain(card, path, "engines are built")
    formats = "+".join(card.precision.values())
    folder = wanted.cache.absolute() / machine_key(device)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": str("fp16" in formats),
        "trt_int8_enable": str("int8" in formats),
    }
    if wanted.workspace_gb is not None:
        settings["trt_max_workspace_size"] = str(int(wanted.workspace_gb * 1e9))
    if not wanted.ep_context:
        return path, settings
    context = folder / f"{path.stem}-{sha256_of(path)[:16]}-{wanted.max_batch}_ctx.onnx"
    if context.is_file():
        return context, settings
    smallest, largest = (
        f"images:{batch}x3x{card.input_size[0]}x{card.input_size[1]}" for batch in (1, wanted.max_batch)
    )
    engines = folder / context.stem  # empty: ONNX Runtime writes no context for an engine that it finds
    engines.mkdir(exist_ok=True)
    return path, {
        **settings,
        "trt_engine_cache_path": engines.name,  # below the context: it refuses one whose engine has an absolute path
        "trt_dump_ep_context_model": "True",
        "trt_ep_context_file_path": str(context),
        "trt_profile_min_shapes": smallest,
        "trt_profile_opt_shapes": largest,
        "trt_profile_max_shapes": largest,
    }


def _open(
    path: Path, providers: Sequence[str], threads: int | None, device: int, tensorrt: dict[str, str]
) -> onnxruntime.InferenceSession:
    if not providers:
        raise UserError(f"{path}: no provider given: choose from {', '.join(ONNX_RUNTIME)}")
    for name in providers:
        if name not in ONNX_RUNTIME:
            raise UserError(f"unknown provider '{name}': choose from {', '.join(ONNX_RUNTIME)}")
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    available = onnxruntime.get_available_providers()
    on_gpu = {"device_id": str(device)}
    settings: dict[str, dict[str, str]] = {"cpu": {}, "cuda": on_gpu, "tensorrt": {**on_gpu, **tensorrt}}
    wanted = [(ONNX_RUNTIME[name], settings[name]) for name in providers if ONNX_RUNTIME[name] in available]
    options = session_options(threads)
    onnxruntime.set_default_logger_severity(4)  # a provider that fails to load is reported by us, in one line
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return onnxruntime.InferenceSession(str(path), options, providers=wanted or [(ONNX_RUNTIME["cpu"], {})])
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UserError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error
    finally:
        onnxruntime.set_default_logger_severity(2)
