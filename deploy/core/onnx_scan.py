"""Facts of an ONNX file, read from its bytes alone: no `onnx` package, no session, no weights in memory.

`scan_onnx(path)` walks the protobuf wire format and finds, in milliseconds, what would otherwise end in an obscure
message or in none: TensorRT's parser calls a text file, an empty file and opset 99 a success.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deploy.core.errors import UserError
from deploy.core.storage import is_file


@dataclass(frozen=True)
class Operator:
    """One kind of node. `first` is the name of the first such node, possibly empty."""

    op_type: str
    domain: str
    count: int
    first: str


@dataclass(frozen=True)
class OnnxFacts:
    """The head of a model. `external` are the side files that hold weights, as the model names them."""

    ir_version: int
    opset: int
    """Version of the standard domain; 0 when the model does not import it."""
    metadata: dict[str, str]
    operators: list[Operator]
    external: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    """Floating-point initializers: name → first 16 digits of the SHA-256 of the tensor as it is stored."""
    structure_sha256: str = ""
    """Hash of everything else that computes: nodes with their attributes and connections, integer constants, shapes of
    the floating-point ones. Two trainings of one architecture have the same."""


def scan_onnx(path: Path) -> OnnxFacts:
    """The facts of the file at `path`.

    Raises UserError for no file, one that is cut off or is not ONNX, and weights in side files that are missing or
    too short.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    if not path.stat().st_size:
        raise UserError(f"{path}: empty file, not an ONNX model")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            scan = _Scan(data, path.parent)
            scan.model()
        except _CutOffError as error:
            if error.start == 0:
                raise UserError(f"{path}: not an ONNX model") from None
            raise UserError(
                f"{path}: truncated: {len(data)} bytes, but what begins at byte {error.start} goes on to byte "
                f"{error.stop}: copy or export it again"
            ) from None
        except (_NotProtobufError, UnicodeDecodeError):
            raise UserError(f"{path}: not an ONNX model, or damaged: export it again") from None
        if not (scan.graphs and scan.ir_version and scan.opsets):
            raise UserError(f"{path}: not an ONNX model")
        _check_external(path, scan.external)
        weights = {name: scan.digest(span, entries) for name, (span, entries) in scan.weights.items()}
    operators = [Operator(op, domain, count, first) for (op, domain), (count, first) in scan.operators.items()]
    local = {(name, domain) for name, domain in scan.functions}
    return OnnxFacts(
        ir_version=scan.ir_version,
        opset=scan.opsets.get("", 0),
        metadata=scan.metadata,
        operators=[operator for operator in operators if (operator.op_type, operator.domain) not in local],
        external=sorted(scan.external),
        weights=weights,
        structure_sha256=scan.structure.hexdigest(),
    )


# ----------------------------------------------------------------------------------------------------
# Field numbers below are those of onnx.proto (ONNX IR specification).

_FLOATS = frozenset({1, 10, 11, 16})  # TensorProto.DataType: FLOAT, FLOAT16, DOUBLE, BFLOAT16


class _CutOffError(Exception):
    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop


class _NotProtobufError(Exception):
    pass


class _Scan:
    """One pass over a ModelProto. A span is (first byte, byte after the last)."""

    def __init__(self, data: mmap.mmap, folder: Path) -> None:
        self.data = data
        self.folder = folder
        self.ir_version = 0
        self.graphs = 0
        self.opsets: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        self.operators: dict[tuple[str, str], tuple[int, str]] = {}
        self.functions: list[tuple[str, str]] = []
        self.external: dict[str, int] = {}
        self.weights: dict[str, tuple[tuple[int, int], dict[str, str]]] = {}
        self.structure = hashlib.sha256()

    def model(self) -> None:
        for number, value in self.fields(0, len(self.data)):
            if number == 1 and isinstance(value, int):
                self.ir_version = value
            elif isinstance(value, int):
                continue
            elif number == 7:
                self.graph(value)
            elif number == 8:
                self.opset(value)
            elif number == 14:
                key, text = self.pair(value)
                self.metadata[key] = text
            elif number == 25:
                self.function(value)

    def graph(self, span: tuple[int, int]) -> None:
        self.graphs += 1
        for number, value in self.fields(*span):
            if isinstance(value, int):
                continue
            if number == 1:
                self.structure.update(self.data[slice(*value)])
                self.node(value)
            elif number == 5:
                self.structure.update(self.shape(value))
                self.tensor(value)

    def shape(self, span: tuple[int, int]) -> bytes:
        """Share of a tensor in the structure: all of it, or of a floating-point one type, name and dimensions."""
        fields = list(self.fields(*span))
        if not any(number == 2 and value in _FLOATS for number, value in fields):
            return self.data[slice(*span)]
        return b"".join(
            repr((number, value if isinstance(value, int) else self.data[slice(*value)])).encode()
            for number, value in fields
            if number in (1, 2, 8)
        )

    def node(self, span: tuple[int, int]) -> None:
        op_type = domain = name = ""
        for number, value in self.fields(*span):
            if isinstance(value, int):
                continue
            if number == 3:
                name = self.text(value)
            elif number == 4:
                op_type = self.text(value)
            elif number == 7:
                domain = self.text(value)
            elif number == 5:
                self.attribute(value)
        domain = "" if domain == "ai.onnx" else domain
        count, first = self.operators.get((op_type, domain), (0, name))
        self.operators[op_type, domain] = (count + 1, first)

    def attribute(self, span: tuple[int, int]) -> None:
        for number, value in self.fields(*span):
            if isinstance(value, int):
                continue
            if number in (6, 11):  # subgraphs of If, Loop and Scan
                self.graph(value)
            elif number == 5:
                self.tensor(value)

    def tensor(self, span: tuple[int, int]) -> None:
        entries: dict[str, str] = {}
        name, kind = "", 0
        for number, value in self.fields(*span):
            if number == 2 and isinstance(value, int):
                kind = value
            elif isinstance(value, int):
                continue
            elif number == 8:
                name = self.text(value)
            elif number == 13:
                key, text = self.pair(value)
                entries[key] = text
        if "location" in entries:
            end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
            self.external[entries["location"]] = max(end, self.external.get(entries["location"], 0))
        if name and kind in _FLOATS:
            self.weights[name] = (span, entries)

    def opset(self, span: tuple[int, int]) -> None:
        domain, version = "", 0
        for number, value in self.fields(*span):
            if number == 1 and not isinstance(value, int):
                domain = self.text(value)
            elif number == 2 and isinstance(value, int):
                version = value
        self.opsets["" if domain == "ai.onnx" else domain] = version

    def function(self, span: tuple[int, int]) -> None:
        name = domain = ""
        for number, value in self.fields(*span):
            if isinstance(value, int):
                continue
            if number == 1:
                name = self.text(value)
            elif number == 7:
                self.structure.update(self.data[slice(*value)])
                self.node(value)
            elif number == 10:
                domain = self.text(value)
        self.functions.append((name, domain))

    def pair(self, span: tuple[int, int]) -> tuple[str, str]:
        values = {number: self.text(value) for number, value in self.fields(*span) if not isinstance(value, int)}
        return values.get(1, ""), values.get(2, "")

    def digest(self, span: tuple[int, int], external: dict[str, str]) -> str:
        digest = hashlib.sha256(self.data[slice(*span)])
        if "location" in external:
            with open(self.folder / external["location"], "rb") as file:
                file.seek(int(external.get("offset") or 0))
                digest.update(file.read(int(external["length"])) if external.get("length") else file.read())
        return digest.hexdigest()[:16]

    def text(self, span: tuple[int, int]) -> str:
        return self.data[slice(*span)].decode("utf-8")

    def fields(self, position: int, stop: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
        """Number and value of each field: an int for numbers, a span for everything with a length."""
        while position < stop:
            start = position
            key, position = self.varint(position, stop, start)
            number, kind = key >> 3, key & 7
            if number == 0:
                raise _NotProtobufError
            if kind == 0:
                value, position = self.varint(position, stop, start)
                yield number, value
                continue
            if kind == 2:
                length, position = self.varint(position, stop, start)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise _NotProtobufError
            if position + length > stop:
                raise _CutOffError(start, position + length)
            yield number, (position, position + length)
            position += length

    def varint(self, position: int, stop: int, start: int) -> tuple[int, int]:
        value = shift = 0
        while position < stop:
            byte = self.data[position]
            value |= (byte & 0x7F) << shift
            position += 1
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise _NotProtobufError
        raise _CutOffError(start, position + 1)


def _check_external(path: Path, external: dict[str, int]) -> None:
    for location, end in sorted(external.items()):
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise UserError(f"{path}: its weights lie outside of its folder, in {location}: save it as one file")
        side = path.parent / location
        if not is_file(side):
            raise UserError(f"{path}: its weights are in {location}, which is not beside it: copy both files")
        size = side.stat().st_size
        if size < end:
            raise UserError(f"{path}: its weights in {location} are truncated: {size} bytes of {end}: copy it again")
