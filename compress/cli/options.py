"""Options that several commands share, and checks of values that their types let pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.core.errors import UserError
from deploy.runtimes.providers import PROVIDERS

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; recipes/ has examples.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.epochs=3. Repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, bit for bit.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build everything and take one step on made-up data; keep nothing.")
]
Devices = Annotated[int | None, typer.Option("--devices", min=1, metavar="N", help="Training processes, one a device.")]
Artifacts = Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Exported .onnx files, or .engine files.")]
Providers = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME,NAME",
        help="Where ONNX Runtime runs: cpu, cuda, tensorrt. Several: on each of them.",
    ),
]
Fallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Let another provider run when the one asked for cannot.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of ONNX Runtime on the CPU.")]
TrtCache = Annotated[
    Path | None,
    typer.Option(
        "--trt-cache",
        metavar="DIR",
        help="TensorRT provider: folder of its engines. Default: ~/.cache/compress/onnxruntime.",
    ),
]
EpContext = Annotated[
    bool, typer.Option("--ep-context", help="TensorRT provider: keep the compiled model, and open it when it is there.")
]
CudaGraph = Annotated[bool, typer.Option("--cuda-graph", help="Engines: launch all work of a batch with one call.")]
JsonOut = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results there.")]


def refuse(options: dict[str, Any], why: str) -> None:
    """Options that would do nothing are mistakes. options: name → value, None or False where it was not given."""
    for option, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"{option}: {why}")


def provider_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"--provider: unknown provider '{name[:60]}': choose from {', '.join(PROVIDERS)}")
        if names.count(name) > 1:
            raise UserError(f"--provider: {name} is given twice")
    return names


def batch_sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and len(size) < 5 and int(size) >= 1 for size in sizes):
        raise UserError(f"--batch: '{text[:60]}' is not a list of batch sizes, for example 1,8")
    return [int(size) for size in sizes]


def images_in(folder: Path) -> list[Path]:
    from deploy.core.image import image_files

    return image_files(folder, "--images: ")


def need_folder(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{option}: {folder}: no such folder")


def need_json_place(file: Path | None, option: str = "--json") -> None:
    """Find out before the long work that the results can be written."""
    if file is None:
        return
    from deploy.core.files import need_place

    if not file.absolute().parent.exists():
        raise UserError(f"{option}: {file}: its folder does not exist")
    need_place(file)


def need_finite(number: float, option: str) -> None:
    if not math.isfinite(number):  # infinity and NaN pass typer's bounds
        raise UserError(f"{option}: needs a finite number, got {number}")
