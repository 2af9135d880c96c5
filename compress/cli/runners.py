"""Opening exported files for the commands that run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.core.errors import UserError

if TYPE_CHECKING:
    from deploy.runtimes.base import Runner

PROVIDERS = ("cpu", "cuda", "tensorrt")


def provider_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"--provider: unknown provider '{name[:60]}': choose from {', '.join(PROVIDERS)}")
        if names.count(name) > 1:
            raise UserError(f"--provider: {name} is given twice")
    return names


def runner_name(file: Path, provider: str, providers: Sequence[str]) -> str:
    """The path as it was given; with the provider behind it when there are several to tell apart."""
    return str(file) if len(providers) == 1 or file.suffix == ".engine" else f"{file} ({provider})"


def gpu_options(
    files: Sequence[Path],
    providers: Sequence[str],
    trt_cache: Path | None,
    ep_context: bool,
    cuda_graph: bool,
    *,
    max_batch: int,
) -> dict[str, Any]:
    """Arguments of `open_runner`. Options that would do nothing are mistakes."""
    for option, given in (("--trt-cache", trt_cache is not None), ("--ep-context", ep_context)):
        if given and ("tensorrt" not in providers or all(file.suffix == ".engine" for file in files)):
            raise UserError(
                f"{option}: is about .onnx files on the TensorRT provider; give one and --provider tensorrt"
            )
    if cuda_graph and all(file.suffix != ".engine" for file in files):
        raise UserError("--cuda-graph: is about engines, and none is given; make one with compress export --trt")
    options: dict[str, Any] = {"cuda_graph": True} if cuda_graph else {}
    if trt_cache is not None or ep_context:
        from deploy.runtimes.onnx import TensorRTProvider

        cache = trt_cache or TensorRTProvider.cache
        options["tensorrt"] = TensorRTProvider(cache, ep_context=ep_context, max_batch=max_batch)
    return options


def open_runners(
    files: Sequence[Path],
    providers: Sequence[str],
    allow_fallback: bool,
    threads: int | None,
    on_gpu: dict[str, Any],
) -> dict[str, Runner]:
    """A runner for each ONNX file on each provider, and for each engine, which TensorRT alone can run, by name."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        if file.suffix not in (".onnx", ".engine"):
            raise UserError(f"{file}: neither .onnx nor .engine; make one with compress export")
        if files.count(file) > 1:
            raise UserError(f"{file}: given twice")
    from deploy.runtimes.open import open_runner

    return {
        runner_name(file, provider, providers): open_runner(
            file, (provider,), allow_fallback=allow_fallback, threads=threads, **on_gpu
        )
        for file in files
        for provider in (providers[:1] if file.suffix == ".engine" else providers)
    }
