"""A model repository for NVIDIA Triton Inference Server: backend `onnxruntime` for .onnx, `tensorrt` for an engine.

    <repository>/<name>/config.pbtxt    what the model takes and gives, batching, instances, warm-up
    <repository>/<name>/labels.txt      class names, one a line, in the order of the label numbers
    <repository>/<name>/1/model.onnx    or model.plan; a new version gets the next number

Everything comes from the card, so nothing has to be written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.core.card import ModelCard, need_plain, network_precision, scanned_card
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, ONNX_SUFFIX, atomic_path, sha256_of, write_text
from deploy.tensorrt.card import EngineCard, card_path, contradiction, read_engine_card, rebuild

Kind = Literal["KIND_AUTO", "KIND_GPU", "KIND_CPU"]
Backend = Literal["onnxruntime", "tensorrt"]


@dataclass(frozen=True)
class TritonModel:
    """A model as it stands in a repository."""

    name: str
    folder: Path
    version: int
    backend: Backend
    max_batch: int


@dataclass(frozen=True)
class _Content:
    """Facts of a file for its configuration. best: the batch that it is fastest at, None if none is known."""

    card: ModelCard
    max_batch: int
    best: int | None = None
    beside: tuple[Path, str] | None = None
    """Another file to copy, and its name in the repository."""


@dataclass(frozen=True)
class _TritonFiles:
    """Layout of the files of a suffix in a repository. kinds: where they may run, the default first."""

    backend: Backend
    file: str
    name_end: str
    kinds: tuple[Kind, ...]
    read: Callable[[Path, int], _Content]
    """(path, largest batch asked for) → what is in it. Raises UserError."""


def _read_onnx(artifact: Path, max_batch: int) -> _Content:
    card = scanned_card(artifact)
    need_plain(card, artifact, "Triton's models are made")
    if network_precision(card.precision) == "bf16":
        raise UserError(f"{artifact}: the server's ONNX Runtime does not compute in bfloat16: add the fp32 file")
    return _Content(card, max_batch)


def _read_engine(artifact: Path, max_batch: int) -> _Content:
    engine = _whole_engine(artifact)
    smallest, best, largest = engine.options.batches
    if smallest != 1:
        raise UserError(f"{artifact}: takes no batch below {smallest}, but the server sends single images too")
    return _Content(engine.model, largest, best, (card_path(artifact), "model.plan.json"))


_FILES = {
    ONNX_SUFFIX: _TritonFiles("onnxruntime", "model.onnx", "", ("KIND_AUTO", "KIND_GPU", "KIND_CPU"), _read_onnx),
    ENGINE_SUFFIX: _TritonFiles("tensorrt", "model.plan", "_trt", ("KIND_GPU",), _read_engine),
}


def write_triton_model(
    repository: Path,
    artifact: Path,
    *,
    name: str | None = None,
    max_batch: int = 32,
    max_queue_delay_us: int = 2000,
    instances: int = 1,
    kind: Kind | None = None,
) -> TritonModel:
    """Add `artifact`, a deployable .onnx or an .engine with its card, to `repository`.

    name: of the model; default: the file's, dots become underscores, with `_trt` for an engine. A model of that name
    that is there already gets a new version, unless its newest is this very file. max_batch: of an .onnx file; an
    engine knows its own. max_queue_delay_us: how long the server waits to fill a batch. kind: where it runs; default:
    KIND_GPU for an engine, KIND_AUTO (a GPU if there is one) for an .onnx file.

    Raises UserError.
    """
    repository, artifact = Path(repository), Path(artifact)
    if max_batch < 1 or instances < 1 or max_queue_delay_us < 0:
        raise UserError("max_batch and instances must be at least 1, max_queue_delay_us at least 0")
    if artifact.suffix not in _FILES:
        raise UserError(f"{artifact}: neither {' nor '.join(_FILES)}; make one with compress export")
    files = _FILES[artifact.suffix]
    if name is None:
        name = re.sub(r"[^\w-]+", "_", artifact.stem) + files.name_end
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"'{name}': a model's name is made of letters, digits, _ and -")
    content = files.read(artifact, max_batch)
    kind = kind or files.kinds[0]
    if kind not in files.kinds:
        raise UserError(f"{artifact}: an engine runs on a GPU, not {kind}")

    folder = repository / name
    config = folder / "config.pbtxt"
    if config.is_file() and f'backend: "{files.backend}"' not in config.read_text(encoding="utf-8"):
        raise UserError(f"{folder}: a model of another backend has this name: give another one")
    version = _next_version(folder, files.file, artifact)
    for source, file in [(artifact, files.file), *([content.beside] if content.beside else [])]:
        with atomic_path(folder / str(version) / file) as temporary:
            shutil.copyfile(source, temporary)
    card, largest = content.card, content.max_batch
    write_text(folder / "labels.txt", "".join(" ".join(label.splitlines()) + "\n" for label in card.class_names))
    preferred = sorted({size for size in (content.best, largest) if size is not None and size > 1})
    write_text(config, config_pbtxt(card, name, files.backend, largest, preferred, max_queue_delay_us, instances, kind))
    return TritonModel(name, folder, version, files.backend, largest)


def config_pbtxt(
    card: ModelCard,
    name: str,
    backend: str,
    max_batch: int,
    preferred: list[int],
    max_queue_delay_us: int,
    instances: int,
    kind: Kind,
) -> str:
    """The model's configuration (message `inference.ModelConfig`) in protobuf's text format.

    Shapes are without the batch. `count` is one number an image, for which Triton wants a one that is reshaped away.
    Warm-up runs a black batch of one and of `max_batch`, before the model counts as ready.
    """
    height, width = card.input_size
    outputs: tuple[tuple[str, str, list[int]], ...] = (
        ("boxes", "TYPE_FP32", [card.max_detections, 4]),
        ("scores", "TYPE_FP32", [card.max_detections]),
        ("labels", "TYPE_INT64", [card.max_detections]),
        ("count", "TYPE_INT32", []),
    )
    blocks = [f'name: {_quoted(name)}\nbackend: "{backend}"\nmax_batch_size: {max_batch}\n']
    blocks.append(f'input {{\n  name: "images"\n  data_type: TYPE_UINT8\n  dims: [ 3, {height}, {width} ]\n}}\n')
    for tensor, kind_of, dims in outputs:
        shape = f"  dims: [ {', '.join(map(str, dims))} ]\n" if dims else "  dims: [ 1 ]\n  reshape { shape: [ ] }\n"
        blocks.append(f'output {{\n  name: "{tensor}"\n  data_type: {kind_of}\n{shape}}}\n')
    if max_batch > 1:
        sizes = f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]\n" if preferred else ""
        blocks.append(f"dynamic_batching {{\n{sizes}  max_queue_delay_microseconds: {max_queue_delay_us}\n}}\n")
    blocks.append(f"instance_group {{\n  count: {instances}\n  kind: {kind}\n}}\n")
    for batch in sorted({1, max_batch}):
        blocks.append(
            f'model_warmup {{\n  name: "batch of {batch}"\n  batch_size: {batch}\n  inputs {{\n    key: "images"\n'
            f"    value {{\n      data_type: TYPE_UINT8\n      dims: [ 3, {height}, {width} ]\n      zero_data: true\n"
            "    }\n  }\n}\n"
        )
    for key, value in (
        ("class_names", json.dumps(card.class_names)),
        ("category_ids", json.dumps(card.category_ids)),
        ("card", card.model_dump_json()),
    ):
        blocks.append(f'parameters {{\n  key: "{key}"\n  value {{ string_value: {_quoted(value)} }}\n}}\n')
    return "".join(blocks)


# ----------------------------------------------------------------------------------------------------


def _whole_engine(artifact: Path) -> EngineCard:
    if not artifact.is_file():
        raise UserError(f"{artifact}: no such file")
    engine = read_engine_card(artifact)
    if sha256_of(artifact) != engine.engine_sha256:
        raise UserError(f"{artifact}: not the engine that its card describes (SHA-256 differs): {rebuild(engine)}")
    if problem := contradiction(engine.precision, engine.network, engine.layers):
        raise UserError(f"{artifact}: {problem}: {rebuild(engine)}")
    if engine.machine.library != "TensorRT":
        raise UserError(
            f"{artifact}: built with {engine.machine.library}, but the server runs TensorRT: {rebuild(engine)}"
        )
    if engine.options.strip:
        raise UserError(f"{artifact}: holds no weights: put them in with `compress refit {artifact} MODEL.onnx`")
    return engine


def _next_version(folder: Path, file: str, artifact: Path) -> int:
    there = [int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal()] if folder.is_dir() else []
    newest = max(there, default=0)
    old = folder / str(newest) / file
    return newest if old.is_file() and sha256_of(old) == sha256_of(artifact) else newest + 1


def _quoted(text: str) -> str:
    """A string of protobuf's text format: JSON's escapes are among its own."""
    return json.dumps(text, ensure_ascii=False)
