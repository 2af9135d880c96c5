"""Opening of a file by a runner of its kind: the table of runtimes, by the suffix of the files that they run.

An `.onnx` file has two, and the provider says which: `deploy.runtimes.providers`.

A new runtime is a module with a runner (`deploy.runtimes.base.Runner`) and a row here. A user's own needs no row:
`open_runner(path, runner="pkg.module:MyRunner")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.core.card import ModelCard, network_precision, scanned_card
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, ONNX_SUFFIX
from deploy.core.import_path import call_own, import_object
from deploy.core.precisions import PRECISIONS
from deploy.core.storage import fetch, shown
from deploy.runtimes.base import Runner
from deploy.runtimes.providers import ALONE, OPENVINO, PROVIDERS, WEB, Provider

if TYPE_CHECKING:
    from deploy.runtimes.onnx import TensorRTProvider
    from deploy.runtimes.openvino import OpenVINO

OPENVINO_SUFFIX = ".xml"
OwnRunner = str | Callable[[Path], Runner]
"""A user's own runner: an import path, or the class itself. It is called with the path of the file."""


@dataclass(frozen=True)
class Option:
    """An argument of `open_runner` that not every file has."""

    refusal: str | None = None
    """What to say to a user who gives it where it would do nothing; None: it is taken as a default for all files."""
    providers: tuple[Provider, ...] = ()
    """The providers that it is for; none: it does not depend on one."""


@dataclass(frozen=True)
class RunnerKind:
    """Row of the table of runtimes: how the files of a suffix are run."""

    name: str
    open: Callable[..., Runner]
    """(path, providers, **options) → a runner. Imports what it needs itself."""
    has_providers: bool = False
    """Whether the file runs in several places, which `providers` names."""
    readable: bool = False
    """Whether the values inside can be read one by one, to find where two files part (`deploy.graph.diagnose`)."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """The arguments of `open_runner` that are for these files alone."""


def _open_onnx(path: Path, providers: Sequence[str], *, openvino: OpenVINO | None, **options: Any) -> Runner:
    for name in providers:
        if name not in PROVIDERS:
            raise UserError(f"unknown provider '{name}': choose from {', '.join(PROVIDERS)}")
        if name in ALONE and len(providers) > 1:
            raise UserError(f"provider '{name}': is a runtime of its own, which falls back on no other: give it alone")
    if providers and providers[0] in OPENVINO:
        from deploy.runtimes.openvino import OpenVINORunner

        return OpenVINORunner(path, OPENVINO[providers[0]], threads=options["threads"], settings=openvino)
    if providers and providers[0] == WEB:
        from deploy.runtimes.web import WebRunner

        return WebRunner(path)
    from deploy.runtimes.onnx import OnnxRunner

    return OnnxRunner(path, providers, **options)


def _open_engine(path: Path, providers: Sequence[str], **options: Any) -> Runner:
    from deploy.runtimes.tensorrt import TensorRTRunner

    return TensorRTRunner(path, **options)


def _open_openvino(path: Path, providers: Sequence[str], *, openvino: OpenVINO | None, **options: Any) -> Runner:
    from deploy.runtimes.openvino import OpenVINORunner

    device = next((OPENVINO[name] for name in providers if name in OPENVINO), "CPU")
    return OpenVINORunner(path, device, threads=options["threads"], settings=openvino)


def _open_tract(path: Path, providers: Sequence[str]) -> Runner:
    from deploy.runtimes.tract import TractRunner

    return TractRunner(path)


def _open_tvm(path: Path, providers: Sequence[str]) -> Runner:
    from deploy.runtimes.tvm import TVMRunner

    return TVMRunner(path)


def _open_mnn(path: Path, providers: Sequence[str], **options: Any) -> Runner:
    from deploy.runtimes.mnn import MNNRunner

    return MNNRunner(path, **options)


def _open_ncnn(path: Path, providers: Sequence[str], **options: Any) -> Runner:
    from deploy.runtimes.ncnn import NCNNRunner

    return NCNNRunner(path, **options)


def _open_litert(path: Path, providers: Sequence[str], **options: Any) -> Runner:
    from deploy.runtimes.litert import LiteRTRunner

    return LiteRTRunner(path, **options)


_OF_OPENVINO = Option(
    "is about files in OpenVINO; give an .xml, or an .onnx and --provider openvino",
    ("openvino", "openvino-gpu", "openvino-npu"),
)
RUNNERS: dict[str, RunnerKind] = {
    ".tract.onnx": RunnerKind("tract", _open_tract),
    ".tvm.onnx": RunnerKind("TVM", _open_tvm),
    ONNX_SUFFIX: RunnerKind(
        "ONNX Runtime, OpenVINO or ONNX Runtime Web",
        _open_onnx,
        has_providers=True,
        readable=True,
        options={
            "allow_fallback": Option(),
            "threads": Option(),
            "tensorrt": Option(
                "is about .onnx files on the TensorRT provider; give one and --provider tensorrt", ("tensorrt",)
            ),
            "openvino": _OF_OPENVINO,
        },
    ),
    OPENVINO_SUFFIX: RunnerKind(
        "OpenVINO", _open_openvino, options={"threads": Option(), "openvino": replace(_OF_OPENVINO, providers=())}
    ),
    ENGINE_SUFFIX: RunnerKind(
        "TensorRT",
        _open_engine,
        options={
            "cuda_graph": Option("is about engines, and none is given; make one with compress build"),
        },
    ),
    ".mnn": RunnerKind("MNN", _open_mnn, options={"threads": Option()}),
    ".ncnn.param": RunnerKind("ncnn", _open_ncnn, options={"threads": Option()}),
    ".tflite": RunnerKind("LiteRT", _open_litert, options={"threads": Option()}),
}
"""Ending of a name → how such a file is run; the first that fits."""

SUFFIXES = tuple(
    ending for ending in RUNNERS if not any(ending.endswith(other) for other in RUNNERS if other != ending)
)
"""Endings of all such names, without those that end in another one."""


def open_runner(
    path: Path,
    providers: Sequence[str] = ("cpu",),
    *,
    allow_fallback: bool = False,
    threads: int | None = None,
    tensorrt: TensorRTProvider | None = None,
    openvino: OpenVINO | None = None,
    cuda_graph: bool = False,
    runner: OwnRunner | None = None,
) -> Runner:
    """A runner for the file at `path`, in the runtime of its suffix: see `RUNNERS`.

    What is for the files of another suffix is not looked at, so that a command opens all its files alike.

    Args:
        providers: where ONNX Runtime runs it, in order of preference: `cpu`, `cuda`, `tensorrt`; or alone one
            of OpenVINO, `openvino`, `openvino-gpu`, `openvino-npu`, or `web`, ONNX Runtime Web in Node.
        allow_fallback: ONNX Runtime may continue on another provider when one does not come up.
        threads: of the runtime on the CPU; None: one a core. Some take one thread whatever it says.
        tensorrt: settings of ONNX Runtime's TensorRT provider.
        openvino: settings of OpenVINO.
        cuda_graph: of an engine: record the work of a batch size, and launch it with one call.
        runner: a user's own runner to open it with, whatever its suffix.

    Raises UserError for a file of another suffix, and for everything that keeps the file from running.
    """
    path = Path(path)
    fetch(path, anew=True)  # a server loads its files again
    if runner is not None:
        return _open_own(path, runner)
    kind = runner_kind(path)
    options = {
        "allow_fallback": allow_fallback,
        "threads": threads,
        "tensorrt": tensorrt,
        "openvino": openvino,
        "cuda_graph": cuda_graph,
    }
    return kind.open(path, providers, **{name: value for name, value in options.items() if name in kind.options})


def open_runners(files: Sequence[Path], providers: Sequence[str] = ("cpu",), **options: Any) -> dict[str, Runner]:
    """A runner for each file by its name; a file that several of the providers can run has one on each of them. One of
    a precision that only some of them compute in has none on the others.

    Raises UserError as `open_runner` does, and for a file that is given twice.
    """
    for file in files:
        check_artifact(file)
        if files.count(file) > 1:
            raise UserError(f"{file}: given twice")
    return {
        runner_name(file, provider, providers): open_runner(file, (provider,), **options)
        for file in files
        for provider in (_able(file, providers) if runner_kind(file).has_providers else providers[:1])
    }


def runner_name(file: Path, provider: str, providers: Sequence[str]) -> str:
    """Name of the runner of a file: its path as it was given, with the provider where there are several."""
    several = len(providers) > 1 and runner_kind(file).has_providers
    return f"{shown(file)} ({provider})" if several else shown(file)


def runner_options(
    files: Sequence[Path],
    providers: Sequence[str] = ("cpu",),
    *,
    trt_cache: Path | None = None,
    ep_context: bool = False,
    openvino_streams: int | None = None,
    openvino_cache: Path | None = None,
    cuda_graph: bool = False,
    max_batch: int = 32,
) -> dict[str, Any]:
    """Options of `open_runner` from those of the command line.

    Args:
        trt_cache: folder of the engines that the TensorRT provider builds; None: its default.
        ep_context: keep that provider's optimised model there too, built for batches up to `max_batch`.
        openvino_streams: images that OpenVINO computes at the same time; None: one.
        openvino_cache: folder of the networks that it compiled; None: it keeps none.
        cuda_graph: record the work of an engine as a CUDA graph.

    Raises UserError for an option that would do nothing with these files on these providers.
    """
    for option, argument, given in (
        ("--trt-cache", "tensorrt", trt_cache is not None),
        ("--ep-context", "tensorrt", ep_context),
        ("--openvino-streams", "openvino", openvino_streams is not None),
        ("--openvino-cache", "openvino", openvino_cache is not None),
        ("--cuda-graph", "cuda_graph", cuda_graph),
    ):
        if given:
            _check_useful(option, argument, files, providers)
    options: dict[str, Any] = {"cuda_graph": True} if cuda_graph else {}
    if trt_cache is not None or ep_context:
        from deploy.runtimes.onnx import TensorRTProvider

        cache = trt_cache or TensorRTProvider.cache
        options["tensorrt"] = TensorRTProvider(cache, ep_context=ep_context, max_batch=max_batch)
    if openvino_streams is not None or openvino_cache is not None:
        from deploy.runtimes.openvino import OpenVINO

        options["openvino"] = OpenVINO(openvino_streams or OpenVINO.streams, openvino_cache)
    return options


def check_artifact(path: Path) -> None:
    """Raise UserError unless there is a file at `path` that one of `RUNNERS` opens."""
    if not fetch(path).is_file():
        raise UserError(f"{path}: no such file")
    runner_kind(path)


def runner_kind(path: Path) -> RunnerKind:
    """The row of `RUNNERS` for the file at `path`. Raises UserError for another suffix."""
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: ends in none of {', '.join(SUFFIXES)}; make one with compress export")
    return kind


def readable_file(runner: Runner) -> Path | None:
    """The file of a runner when the values inside it can be read one by one, else None."""
    path = getattr(runner, "path", None)
    kind = _kind(path) if isinstance(path, Path) else None
    return path if kind is not None and kind.readable else None


# ----------------------------------------------------------------------------------------------------


def _kind(path: Path) -> RunnerKind | None:
    return next((kind for ending, kind in RUNNERS.items() if path.name.endswith(ending)), None)


def _able(file: Path, providers: Sequence[str]) -> Sequence[str]:
    """The providers that compute in the file's precision; all where none does, of which opening it says why."""
    if len(providers) == 1 or not set(ALONE) & set(providers):  # ONNX Runtime's are all alike in this
        return providers
    card = scanned_card(file)
    kind = PRECISIONS.get(network_precision(card.precision))
    return [name for name in providers if kind is None or not kind.providers or name in kind.providers] or providers


def _check_useful(option: str, argument: str, files: Sequence[Path], providers: Sequence[str]) -> None:
    rules = [kind.options.get(argument) for kind in map(_kind, files) if kind is not None]
    if not any(rule and (not rule.providers or set(rule.providers) & set(providers)) for rule in rules):
        refusal = next(kind.options[argument].refusal for kind in RUNNERS.values() if argument in kind.options)
        raise UserError(f"{option}: {refusal}")


def _open_own(path: Path, runner: OwnRunner) -> Runner:
    """A user's own runner, which must have what `Runner` asks for."""
    make = import_object(runner, "runner") if isinstance(runner, str) else runner
    name = runner if isinstance(runner, str) else getattr(runner, "__name__", repr(runner))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not callable(make):
        raise UserError(f"runner: {name}: is no class or function that opens a file")
    made: Runner = call_own(make, name, "runner", path)
    for attribute, kind in (("backend", str), ("card", ModelCard), ("on_cpu", bool)):
        if not isinstance(getattr(made, attribute, None), kind):
            raise UserError(f"runner: {name}: its attribute '{attribute}' must be a {kind.__name__}")
    if not callable(made):
        raise UserError(f"runner: {name}: has no __call__(images) that gives a DetectionBatch")
    return made
