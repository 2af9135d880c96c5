"""A deployable ONNX file in ONNX Runtime: CPU, CUDA or the TensorRT provider."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from deploy.card import card_from_session
from deploy.errors import UserError
from deploy.runtimes.base import Detections, check_images

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OUTPUTS = ["boxes", "scores", "labels", "count"]


class OnnxRunner:
    """Runs `path` on `providers`, in order of preference: `cpu`, `cuda`, `tensorrt`.

    ONNX Runtime quietly continues on the CPU when a provider does not come up; here that is a UserError,
    unless `allow_fallback`. `active_providers` says what the session really has. `threads`: CPU threads
    inside an operator, None for ONNX Runtime's choice (all cores).
    """

    def __init__(
        self,
        path: Path,
        providers: Sequence[str] = ("cpu",),
        *,
        allow_fallback: bool = False,
        threads: int | None = None,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self._session = _open(path, providers, threads)
        names = {value: key for key, value in PROVIDERS.items()}
        self.active_providers = tuple(names.get(name, name) for name in self._session.get_providers())
        missing = [name for name in providers if name not in self.active_providers]
        if missing and not allow_fallback:
            running = self.active_providers[0]
            raise UserError(
                f"{path}: provider '{missing[0]}' does not come up here, {running} would run it: "
                "install its libraries, choose another provider, or allow the fallback"
            )
        self.card = card_from_session(self._session, str(path))
        self.path = path
        self.threads = threads
        inputs = [(value.name, value.type) for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        if inputs != [("images", "tensor(uint8)")] or outputs != _OUTPUTS:
            raise UserError(f"{path}: not a deployable file: it takes {inputs} and gives {outputs}")

    @property
    def backend(self) -> str:
        return f"onnxruntime {self.active_providers[0]}"

    def __call__(self, images: np.ndarray) -> Detections:
        check_images(images, self.card)
        return Detections(*self._session.run(_OUTPUTS, {"images": images}))


# ----------------------------------------------------------------------------------------------------


def _open(path: Path, providers: Sequence[str], threads: int | None) -> onnxruntime.InferenceSession:
    if not providers:
        raise UserError(f"{path}: no provider given: choose from {', '.join(PROVIDERS)}")
    for name in providers:
        if name not in PROVIDERS:
            raise UserError(f"unknown provider '{name}': choose from {', '.join(PROVIDERS)}")
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    available = onnxruntime.get_available_providers()
    wanted = [PROVIDERS[name] for name in providers if PROVIDERS[name] in available]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    onnxruntime.set_default_logger_severity(4)  # a provider that fails to load is reported by us, in one line
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return onnxruntime.InferenceSession(str(path), options, providers=wanted or ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UserError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error
    finally:
        onnxruntime.set_default_logger_severity(2)
