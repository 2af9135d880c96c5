"""The runtimes that `compress export --for` knows, and how a file for each is made.

A new one is a module with a function and a row here. Where files of it can be run on a desktop, they have a row in
`deploy.runtimes.open` as well, so that they are validated and measured like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX
from deploy.targets.refusal import Refusal, of_command, of_package


@dataclass(frozen=True)
class Target:
    """Row of the table.

    make: (exported .onnx file, place) writes what the runtime takes to the place, and returns a few words about it for
    people. It imports what it needs itself. Raises UserError, one line: a package that is missing, a file that the
    runtime cannot take and what to give it instead.
    ending: in place of the exported file's `.onnx`.
    runs: there is a row in `deploy.runtimes.open`, by which the file is tried before it gets its name. What does not
    run here must be written whole or not at all by `make` itself.
    folder: the place is a folder, of any name. `make` refuses one that it did not write.
    own_int8: its int8 file is made of the fp32 one, which `make` looks for beside the exported int8 file.
    refusals: what it gets no file of.
    keep_runtime: takes what the target ships of its runtime from a folder of the user's (--web-runtime) into the cache.
    None: it ships nothing.
    """

    make: Callable[[Path, Path], str]
    ending: str
    runs: bool = True
    folder: bool = False
    own_int8: bool = False
    refusals: tuple[Refusal, ...] = ()
    keep_runtime: Callable[[Path], None] | None = None


def _made_by(module: str) -> Callable[[Path, Path], str]:
    """`make` of a module of this package, which is imported when it is called: most need what help does not."""

    def make(source: Path, place: Path) -> str:
        made: str = import_module(f"deploy.targets.{module}").make(source, place)
        return made

    return make


def _keep_web_runtime(folder: Path) -> None:
    from deploy.targets.web_runtime import keep_runtime

    keep_runtime(folder)


_BF16 = Refusal(
    precision="bf16",
    why="only OpenVINO computes in it",
    instead="give the fp32 file, whose numbers it has",
)
_HALF_IN_NCNN = Refusal(
    precision="fp16",
    why="ONNX Runtime turns the network alone into float32",
    instead="give the fp32 file; ncnn chooses float16 itself",
)
_HALF_IN_LITERT = Refusal(
    precision="fp16",
    converter="onnx2tf",
    seen="2.6.9",
    why="makes a file of it as large as that of the fp32 one, which computes in float32",
    instead="give the fp32 file; delegates choose float16 themselves",
    version=of_command("onnx2tf"),
)
_INT8_IN_NCNN = Refusal(
    precision="int8",
    converter="pnnx",
    seen="20261020",
    why="leaves its QuantizeLinear nodes as they are, which ncnn cannot load",
    instead="give the fp32 file, and quantize that with ncnn2table and ncnn2int8, which are not in its Python package",
    version=of_package("pnnx"),
)
TARGETS: dict[str, Target] = {
    "litert": Target(_made_by("litert"), ".tflite", own_int8=True, refusals=(_BF16, _HALF_IN_LITERT)),
    "mnn": Target(_made_by("mnn"), ".mnn", own_int8=True, refusals=(_BF16,)),
    "ncnn": Target(_made_by("ncnn"), ".ncnn.param", refusals=(_BF16, _HALF_IN_NCNN, _INT8_IN_NCNN)),
    "openvino": Target(_made_by("openvino"), ".xml"),
    "tract": Target(_made_by("tract"), ".tract.onnx", refusals=(_BF16,)),
    "tvm": Target(_made_by("tvm"), ".tvm.onnx", refusals=(_BF16,)),
    "web": Target(_made_by("web"), ".web", runs=False, folder=True, refusals=(_BF16,), keep_runtime=_keep_web_runtime),
}
"""Name in --for → how its file is made."""
REFUSED: dict[str, str] = {
    "coreml": "coremltools 9 reads programs of PyTorch and TensorFlow, and no ONNX file",
}
"""Name in --for → why there is no file for it."""
DECODERS = Path(__file__).parent / "decoders"
"""Folder of `deploy.core.heads` in C++ (`decode.hpp`) and JavaScript (`decode.mjs`)."""


def check_refusals(target: str, source: Path, network: str) -> None:
    """Raise UserError where a target gets no file of an exported one of this precision (`refusal.network_of`)."""
    for refusal in TARGETS[target].refusals:
        refusal.check(source, network)


def place_for(source: Path, target: str, out: Path | None = None) -> Path:
    """Where the file of a target goes. Raises UserError for an `out` of another ending."""
    ending = TARGETS[target].ending
    if out is None:
        return source.with_name(source.name.removesuffix(ONNX_SUFFIX) + ending)
    if not TARGETS[target].folder and not out.name.endswith(ending):
        raise UserError(f"--out: {out} does not end in {ending}")
    return out
