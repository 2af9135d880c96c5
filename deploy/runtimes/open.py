"""A runner for a file, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.core.errors import UserError

if TYPE_CHECKING:
    from deploy.runtimes.onnx import OnnxRunner, TensorRTProvider
    from deploy.runtimes.tensorrt import TensorRTRunner

SUFFIXES = (".onnx", ".engine")


def open_runner(
    path: Path,
    providers: Sequence[str] = ("cpu",),
    *,
    allow_fallback: bool = False,
    threads: int | None = None,
    cuda_graph: bool = False,
    tensorrt: TensorRTProvider | None = None,
) -> OnnxRunner | TensorRTRunner:
    """`.onnx` in ONNX Runtime on `providers`, `.engine` in TensorRT, which has no other place to run.

    cuda_graph: only of engines. tensorrt: settings of ONNX Runtime's TensorRT provider.
    Raises UserError for another suffix and for everything that keeps the file from running.
    """
    path = Path(path)
    if path.suffix == ".engine":
        from deploy.runtimes.tensorrt import TensorRTRunner

        return TensorRTRunner(path, cuda_graph=cuda_graph)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: neither .onnx nor .engine; make one with compress export")
    from deploy.runtimes.onnx import OnnxRunner

    return OnnxRunner(path, providers, allow_fallback=allow_fallback, threads=threads, tensorrt=tensorrt)
