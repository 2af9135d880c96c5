"""The card beside an engine, and the refusals that follow from it.

`student.fp16.engine` has `student.fp16.engine.json`. An engine is a black box for one library, one version and one
kind of GPU; the card says what is in it. `open_engine` reads both and refuses what does not fit, in one line with the
command that mends it.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
from pathlib import Path
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy.core import cuda_driver
from deploy.core.card import ModelCard, network_precision
from deploy.core.environment import version_numbers
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, ONNX_SUFFIX, sha256_of, write_text
from deploy.core.precisions import PRECISIONS, PrecisionName
from deploy.core.storage import is_file

MAJORITY = 0.5
"""An engine is called fp16 or int8 when at least this share of its convolutions and matrix products with weights is."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineOptions(_Model):
    """Options of an engine build."""

    batches: tuple[int, int, int] = (1, 8, 32)
    """Smallest batch, the one it is tuned for, largest batch."""
    workspace_gb: float | None = Field(default=None, gt=0, le=1e4, allow_inf_nan=False)
    """Most device memory a layer may use for scratch, in 1e9 bytes; None: TensorRT's own limit, all there is."""
    optimization_level: int = Field(default=3, ge=0, le=5)
    """0 builds fastest, 5 searches longest for the fastest engine."""
    version_compatible: bool = False
    """Runs with later TensorRT versions of the same major version as well; brings its lean runtime along."""
    hardware_compatible: Literal["ampere+", "same"] | None = None
    """Runs on every GPU from Ampere on, or on every GPU of the same compute capability."""
    refit: Literal["all", "individual"] | None = None
    """Weights can be replaced later: all of them, or each that the network names, marked one by one."""
    strip: bool = False
    """The file holds no weights; `compress refit` puts them in. Needs `refit`."""

    @model_validator(mode="after")
    def _consistent(self) -> EngineOptions:
        if not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]:
            raise ValueError(f"batches must be 1 <= smallest <= best <= largest, got {list(self.batches)}")
        if self.strip and self.refit != "all":
            raise ValueError("an engine without weights must be refittable: strip needs refit 'all'")
        return self

    def arguments(self) -> list[str]:
        """The options of `compress build` that differ from the defaults, and the batches."""
        words = ["--batch", ",".join(map(str, dict.fromkeys(self.batches)))]
        if self.workspace_gb is not None:
            words += ["--workspace-gb", f"{self.workspace_gb:g}"]
        if self.optimization_level != 3:
            words += ["--builder-optimization-level", str(self.optimization_level)]
        if self.version_compatible:
            words += ["--version-compatible"]
        if self.hardware_compatible is not None:
            words += ["--hardware-compatible", self.hardware_compatible]
        if self.strip:
            words += ["--strip"]
        elif self.refit is not None:
            words += ["--refit", self.refit]
        return words


class Machine(_Model):
    """Machine where an engine was built, or is to run. None: there is none, or it cannot be read."""

    library: str
    """`TensorRT` or `TensorRT-RTX`."""
    version: str
    gpu: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    """The newest CUDA that the driver runs."""
    platform: str = Field(default_factory=lambda: f"{platform.system()} {platform.machine()}")


class Layers(_Model):
    """Number of layers, and the share of each number format among them; shares add up to 1."""

    count: int
    share: dict[str, float]


class TensorSpec(_Model):
    """An input or output. −1 in `shape` is the batch."""

    name: str
    dtype: str
    shape: list[int]


class Profile(_Model):
    """Shapes of one input: smallest, the one tuned for, largest."""

    input: str
    min: list[int]
    opt: list[int]
    max: list[int]


class TimingCacheUse(_Model):
    """`key` names everything that the timings hold for. `state`: "new", "reused", or "not accepted: …"."""

    key: str
    state: str


class EngineCard(_Model):
    schema_version: Literal[1] = 1
    engine: str
    """File name of the engine."""
    engine_sha256: str
    engine_bytes: int
    onnx: str
    """File name of the model it was built from."""
    onnx_sha256: str
    structure_sha256: str
    """Hash of the graph without its floating-point weights (`OnnxFacts.structure_sha256`); a refit needs the same."""
    precision: PrecisionName | None
    """What the file claims, from its name or from the model card; None: no claim."""
    machine: Machine
    options: EngineOptions
    profiles: list[Profile]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    network: Layers
    """Convolutions and matrix products with weights, as typed in the network that TensorRT was given. In a strongly
    typed network TensorRT must keep to it."""
    layers: Layers | None
    """Layers of the built engine after fusion, from the engine inspector."""
    layers_missing: str = ""
    """Why `layers` is None."""
    refittable_weights: list[str] | None = None
    """The weights that were marked for refit "individual"."""
    weights_sha256: dict[str, str] = {}
    """Name → first 16 digits of the SHA-256 of each floating-point weight, for a refittable engine: a refit must not
    meet a change in a weight that it cannot replace."""
    refitted_from: str = ""
    """SHA-256 of the engine this one was refitted from."""
    timing_cache: TimingCacheUse | None = None
    build_seconds: float
    model: ModelCard
    created: str
    """UTC, ISO 8601."""


def card_path(engine: Path) -> Path:
    """`student.fp16.engine` → `student.fp16.engine.json`."""
    return Path(f"{engine}.json")


def write_engine_card(engine: Path, card: EngineCard) -> None:
    write_text(card_path(engine), card.model_dump_json(indent=2) + "\n")


def read_engine_card(engine: Path) -> EngineCard:
    """The card beside `engine`. Raises UserError; does not look at the engine itself."""
    path = card_path(engine)
    if not is_file(path):
        raise UserError(
            f"{engine}: no card {path.name} beside it: copy both files, or build it: `compress build MODEL.onnx`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("schema_version") != 1:
            found = content.get("schema_version")
            raise UserError(f"{path}: engine card of schema {found}, this program reads 1: build the engine again")
        return EngineCard.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "card"
        raise UserError(f"{path}: bad engine card: {key}: {first['msg']}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: bad engine card: not JSON: {error}") from error


def open_engine(path: Path, here: Machine) -> tuple[bytes, EngineCard]:
    """The engine's bytes and its card, for use on the machine `here`.

    Raises UserError when a file is missing, the two do not belong together, the engine is not what it is called, or it
    was built for another machine.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    card = read_engine_card(path)
    if sha256_of(path) != card.engine_sha256:
        raise UserError(f"{path}: not the engine that its card describes (SHA-256 differs): {rebuild(card)}")
    for claim in dict.fromkeys((claimed_precision(path.name), card.precision)):
        if problem := contradiction(claim, card.network, card.layers):
            raise UserError(f"{path}: {problem}: {rebuild(card)}")
    if differences := machine_differences(card, here):
        raise UserError(f"{path}: built for another machine: {'; '.join(differences)}: {rebuild(card)}")
    return path.read_bytes(), card


def claimed_precision(name: str, model: ModelCard | None = None) -> PrecisionName | None:
    """Precision that a file claims: from its name (`student.int8.engine`), else from its model card."""
    if found := re.findall(rf"(?:^|[._-])({'|'.join(PRECISIONS)})(?=$|[._-])", name.lower()):
        return cast(PrecisionName, found[-1])
    if model is None or not model.precision:
        return None
    if model.quantization is not None:
        return "int8"
    if network_precision(model.precision) == "bf16":
        return "bf16"
    return "fp16" if any("fp16" in formats for formats in model.precision.values()) else "fp32"


def contradiction(claim: PrecisionName | None, network: Layers, layers: Layers | None) -> str | None:
    """Why something called `claim` is not that; None when it is, or when nothing is claimed.

    fp16 and int8 need the majority of convolutions and matrix products in the network, and, when the inspector could
    look, a layer of that format in the engine. mixed, and what else is of several formats, needs two of them. fp32
    allows no other.
    """
    shares = {name: share for name, share in network.share.items() if share > 0}
    is_what = ", ".join(f"{share:.0%} {name}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    if claim is None or not shares:
        return None
    if PRECISIONS[claim].several_formats:
        return None if len(shares) > 1 else f"called {claim}, but its convolutions and matrix products are {is_what}"
    if claim == "fp32":
        return (
            None if set(shares) == {"fp32"} else f"called fp32, but its convolutions and matrix products are {is_what}"
        )
    if shares.get(claim, 0) < MAJORITY:
        return f"called {claim}, but its convolutions and matrix products are {is_what}"
    if layers is not None and layers.share and layers.share.get(claim, 0) == 0:
        built = ", ".join(f"{share:.0%} {name}" for name, share in layers.share.items())
        return f"called {claim}, but the engine's layers are {built}"
    return None


def remedy(claim: PrecisionName | None, model: ModelCard) -> str:
    """Remedy for an ONNX file that is not the `claim` it makes (`contradiction`)."""
    quantization = model.quantization
    if claim is not None and PRECISIONS[claim].computed is not None:
        return f"it is the {PRECISIONS[claim].source} file for another runtime: build from that one"
    if claim == "int8" and quantization is not None and quantization.guided_map_drop is not None:
        kept = len(quantization.float_layers)
        return (
            f"the search within the mAP budget kept {kept} of {kept + quantization.layers} layers in float: raise "
            "--max-map-drop, or use --precision fp16"
        )
    return f"export it again with --precision {claim}, or name it for what it is"


def machine_differences(card: EngineCard, here: Machine) -> list[str]:
    """Reasons that keep the engine of `card` from running on `here`, one phrase each; empty: it should run.

    A newer driver is no obstacle. A version-compatible engine runs with the same and later versions of its major
    version, a hardware-compatible one on the GPUs it names. A card without a GPU is of an engine that is compiled for
    the GPU when it is loaded (TensorRT-RTX).
    """
    built, options, found = card.machine, card.options, []
    if built.library != here.library:
        found.append(f"built with {built.library}, here is {here.library}")
    elif built.version != here.version and not (
        options.version_compatible
        and version_numbers(built.version) <= version_numbers(here.version)
        and _same_major(built, here)
    ):
        found.append(f"built with {built.library} {built.version}, here is {here.version}")
    if built.platform != here.platform:
        found.append(f"built on {built.platform}, this is {here.platform}")
    if built.gpu is None:
        return found
    if here.gpu is None or here.compute_capability is None:
        return [*found, f"built on {built.gpu}, no GPU here"]
    if options.hardware_compatible == "ampere+":
        if version_numbers(here.compute_capability) < (8, 0):
            found.append(f"built for Ampere and later, {here.gpu} has compute capability {here.compute_capability}")
    elif built.compute_capability != here.compute_capability:
        found.append(
            f"built on {built.gpu} (compute capability {built.compute_capability}), "
            f"here is {here.gpu} ({here.compute_capability})"
        )
    elif options.hardware_compatible is None and built.gpu != here.gpu:
        found.append(f"built on {built.gpu}, here is {here.gpu}")
    if built.cuda and here.cuda and version_numbers(here.cuda)[:1] < version_numbers(built.cuda)[:1]:
        found.append(f"built with a driver for CUDA {built.cuda}, this one runs up to {here.cuda}")
    return found


def rebuild(card: EngineCard) -> str:
    """Remedy for an engine that does not fit: the command that builds it again."""
    default = card.onnx.removesuffix(ONNX_SUFFIX) + ENGINE_SUFFIX
    out = [] if card.engine == default else ["--out", card.engine]
    return f"rebuild it with `{shlex.join(['compress', 'build', card.onnx, *out, *card.options.arguments()])}`"


def this_machine(library: str, version: str, device: int = 0) -> Machine:
    """Describe this machine with a TensorRT library that is loaded here."""
    gpu = cuda_driver.gpu(device)
    if gpu is None:
        return Machine(library=library, version=version)
    return Machine(
        library=library,
        version=version,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        cuda=gpu.cuda,
    )


# ----------------------------------------------------------------------------------------------------


def _same_major(one: Machine, other: Machine) -> bool:
    return version_numbers(one.version)[:1] == version_numbers(other.version)[:1]
