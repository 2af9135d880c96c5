"""Options that several commands share, and checks of values that their types let pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.exits import STDOUT, only_results_on_stdout, results_file
from deploy.core.errors import UserError
from deploy.core.storage import fetch, is_folder, url_of
from deploy.runtimes.providers import PROVIDERS

if TYPE_CHECKING:
    from deploy.core.on_ray import Cluster

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; recipes/ has examples.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.epochs=3. Repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, bit for bit.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build everything and take one step on made-up data; keep nothing.")
]
WithoutData = Annotated[
    bool, typer.Option("--without-data", help="With --dry-run: also where the recipe's images are not there.")
]
Devices = Annotated[int | None, typer.Option("--devices", min=1, metavar="N", help="Training processes, one a device.")]
Artifacts = Annotated[
    list[Path], typer.Argument(metavar="ARTIFACT...", help="Exported files: .onnx, .engine, and those of export --for.")
]
Providers = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME,NAME",
        help="Where .onnx files run: cpu, cuda, tensorrt; openvino, openvino-gpu, openvino-npu. Several: on each.",
    ),
]
JsonOut = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results there; -: to stdout, and nothing else."),
]

TURNED_OFF = {"--reduce-range": "--full-range"}
"""Switches that are on, off or not given → their names when they are off."""


@dataclass(frozen=True)
class ThresholdFlags:
    """Options of what an exported file returns."""

    score_threshold: Annotated[float | None, typer.Option(min=0, max=1)] = None
    nms_threshold: Annotated[float | None, typer.Option(min=0, max=1)] = None
    max_detections: Annotated[int | None, typer.Option(min=1)] = None
    candidates: Annotated[int | None, typer.Option(min=1)] = None
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch to check.")] = None


@dataclass(frozen=True)
class QuantizeFlags:
    """Options of quantization."""

    target: Annotated[
        Literal["cpu", "tensorrt"] | None,
        typer.Option("--target", help="Whose format. Default: the recipe's, or cpu."),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="DIR|JSON", help="Images that the ranges come from. Default: for training."
        ),
    ] = None
    calibration_images: Annotated[int | None, typer.Option(min=1, help="How many of them. Default: 128.")] = None
    calibration_method: Annotated[
        Literal["minmax", "percentile", "entropy"] | None, typer.Option(help="Default: minmax.")
    ] = None
    reduce_range: Annotated[
        bool | None,
        typer.Option(
            "--reduce-range/--full-range",
            help="cpu files: weights of 7 bits, for processors without VNNI, or of 8. Default: what this one needs.",
        ),
    ] = None
    max_map_drop: Annotated[
        float | None,
        typer.Option("--max-map-drop", min=0, help="Keep layers in float until the loss is within these points."),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="JSON", help="Labels of --images to decide on. Default: for training."),
    ] = None


@dataclass(frozen=True)
class EngineFlags:
    """Options of engine builds."""

    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="N,N,N", help="Smallest, best and largest batch. Default: 1,8,32."),
    ] = None
    workspace_gb: Annotated[
        float | None, typer.Option("--workspace-gb", help="Most scratch memory. Default: all there is.")
    ] = None
    builder_optimization_level: Annotated[
        int | None,
        typer.Option("--builder-optimization-level", min=0, max=5, help="5 searches longest. Default: 3."),
    ] = None
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also for later TensorRT of the same major version.")
    ] = False
    hardware_compatible: Annotated[
        Literal["ampere+", "same"] | None,
        typer.Option("--hardware-compatible", help="Also for later GPUs, or all of this compute capability."),
    ] = None
    refit: Annotated[
        Literal["all", "individual"] | None,
        typer.Option("--refit", help="Weights can be replaced later, all or each that has a name."),
    ] = None
    strip: Annotated[bool, typer.Option("--strip", help="Without weights, which compress refit puts in.")] = False
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="DIR", help="Default: ~/.cache/compress/timing."),
    ] = None


@dataclass(frozen=True)
class RunnerFlags:
    """Options of opening the files that a command runs."""

    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Let another provider run when the one asked for cannot.")
    ] = False
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the runtime, on the CPU; tract and TVM take one.")
    ] = None
    trt_cache: Annotated[
        Path | None,
        typer.Option(
            "--trt-cache",
            metavar="DIR",
            help="TensorRT provider: folder of its engines. Default: ~/.cache/compress/onnxruntime.",
        ),
    ] = None
    ep_context: Annotated[
        bool,
        typer.Option("--ep-context", help="TensorRT provider: keep the compiled model, and open it when it is there."),
    ] = False
    openvino_streams: Annotated[
        int | None,
        typer.Option("--openvino-streams", min=1, help="OpenVINO: images at the same time. Default: 1, the fastest."),
    ] = None
    openvino_cache: Annotated[
        Path | None,
        typer.Option("--openvino-cache", metavar="DIR", help="OpenVINO: keep compiled networks there. Default: none."),
    ] = None
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Engines: launch all work of a batch with one call.")
    ] = False

    def arguments(self, files: Sequence[Path], providers: Sequence[str], *, max_batch: int) -> dict[str, Any]:
        """Arguments of `deploy.runtimes.open.open_runner`. Raises UserError for an option that would do nothing."""
        from deploy.runtimes.open import runner_options

        options = runner_options(
            files,
            providers,
            trt_cache=self.trt_cache,
            ep_context=self.ep_context,
            openvino_streams=self.openvino_streams,
            openvino_cache=self.openvino_cache,
            cuda_graph=self.cuda_graph,
            max_batch=max_batch,
        )
        return {"allow_fallback": self.allow_fallback, "threads": self.threads, **options}


@dataclass(frozen=True)
class ClusterFlags:
    """Options of where the work is done."""

    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="local: here. ray: in processes of a Ray cluster.")
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of the cluster, or auto. Default: RAY_ADDRESS, or a Ray of this machine."),
    ] = None
    num_cpus: Annotated[float | None, typer.Option("--num-cpus", min=0, help="For each process. Default: 1.")] = None
    num_gpus: Annotated[
        float | None, typer.Option("--num-gpus", min=0, help="For each, e.g. 0.5. Default: 1, without GPUs 0.")
    ] = None

    def cluster(self) -> Cluster | None:
        """None: no cluster. Raises UserError for an option that would do nothing."""
        given = {name: value for name, value in values_of(self).items() if name != "--engine"}
        if self.engine == "local":
            refuse(given, "is about a Ray cluster; add --engine ray")
            return None
        from deploy.core.on_ray import Cluster, need_ray

        if self.num_cpus == 0 and not self.num_gpus:
            raise UserError("--num-cpus: a process needs a share of a processor or of a GPU; give one of them above 0")
        given = {name.removeprefix("--").replace("-", "_"): value for name, value in given.items()}
        cluster = Cluster(**{name: value for name, value in given.items() if value is not None})
        need_ray(cluster)
        return cluster


@dataclass(frozen=True)
class ActorFlags(ClusterFlags):
    """The same for work that is divided among actors."""

    actors: Annotated[
        int | None, typer.Option("--actors", min=1, help="Processes on the cluster. Default: all that have room.")
    ] = None


def values_of(flags: Any) -> dict[str, Any]:
    """Option → value, of a group of options; None where it was not given."""
    values = {
        f"--{field.name.replace('_', '-')}": (getattr(flags, field.name), field.default) for field in fields(flags)
    }
    return {option: None if value is default is False else value for option, (value, default) in values.items()}


def refuse(options: dict[str, Any], why: str) -> None:
    """Options that would do nothing are mistakes. options: name → value, None where it was not given."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{TURNED_OFF.get(option, option) if value is False else option}: {why}")


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
    from deploy.core.image_folder import image_files

    return image_files(folder, "--images: ")


def need_file(file: Path) -> None:
    if not (here := fetch(file)).is_file():
        raise UserError(f"{file}: is a folder; name the file in it" if here.is_dir() else f"{file}: no such file")


def need_folder(folder: Path, option: str) -> None:
    if not is_folder(folder):
        raise UserError(f"{option}: {folder}: no such folder")


def write_results(file: Path | None, results: Any) -> None:
    """Write results as JSON where they were asked for. Values that JSON has no form for are errors."""
    if file is None:
        return
    from deploy.core.files import write_json

    with results_file(file) as place:
        write_json(place, results)


def need_json_place(file: Path | None, option: str = "--json") -> None:
    """Find out before the long work that the results can be written; from here on stdout may be for them alone."""
    if file is None:
        return
    if file == STDOUT and option == "--json":
        only_results_on_stdout()
        return
    from deploy.core.files import need_place

    if url_of(file) is None and not file.absolute().parent.exists():
        raise UserError(f"{option}: {file}: its folder does not exist")
    need_place(file)


def need_finite(number: float, option: str) -> None:
    if not math.isfinite(number):  # infinity and NaN pass typer's bounds
        raise UserError(f"{option}: needs a finite number, got {number}")
