"""ONNX file → TensorRT network. The op set is checked first; an error is one line with node, operator, reason, hint.

The network is strongly typed: TensorRT 11 knows nothing else, TensorRT 10 is told so. Number formats are those of the
ONNX graph, which is why one path serves both.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.onnx_scan import OnnxFacts, Operator, scan_onnx
from deploy.tensorrt.card import Layers

OPSETS = (9, 25)
"""Oldest and newest opset that TensorRT's parser reads (NVIDIA's opset guide for TensorRT 11). The parser itself says
nothing about a newer one. `compress export` writes 20."""
_RTX_WITHOUT = {"NMS": "NonMaxSuppression"}
"""Layers that TensorRT-RTX parses and cannot build, and the operators they come from."""
_HINTS = (
    (r"Plugin not found|no importer", "write it with ordinary operators, or leave this part out of the graph"),
    (r"was not registered|INVALID_GRAPH", "the graph is damaged: export it again"),
    (r"opset", f"export it again with an opset from {OPSETS[0]} to {OPSETS[1]}"),
    (r"ParseFrom|Failed to parse", "the file is damaged: copy or export it again"),
    (r"[Uu][Ii][Nn][Tt]8|zero.?[Pp]oint|[Ss]hift|INT8 quantization", "quantize for TensorRT: --target tensorrt"),
    (r"UNSUPPORTED_NODE_DYNAMIC|dynamic", "only the batch may be dynamic"),
)


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and everything that must live as long as it does."""

    trt: Any
    builder: Any
    network: Any
    parser: Any
    facts: OnnxFacts


class Log:
    """Messages of TensorRT, kept instead of printed. One a process: TensorRT keeps the first logger it is given."""

    def __init__(self, trt: Any) -> None:
        self.messages: list[tuple[str, str]] = []
        messages = self.messages

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                    messages.append((severity.name, message))

        self.logger = Logger()

    def clear(self) -> None:
        self.messages.clear()

    def errors(self) -> list[str]:
        """Error messages, each in one line, without TensorRT's source positions."""
        return [_shorter(message) for severity, message in self.messages if severity != "WARNING"]

    def warnings(self) -> list[str]:
        return [_shorter(message) for severity, message in self.messages if severity == "WARNING"]


def load_tensorrt() -> Any:
    """NVIDIA's `tensorrt` module. Raises UserError when it is not installed or does not load."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorrt":
            raise UserError(f"tensorrt does not load: {error}: pip install 'compress-detectors[trt]'") from error
        raise UserError("tensorrt is not installed: pip install 'compress-detectors[trt]'") from error
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"tensorrt does not load: {reason}: pip install --force-reinstall tensorrt") from error
    return tensorrt


@functools.cache
def log() -> Log:
    """The process's TensorRT log."""
    return Log(load_tensorrt())


def library(trt: Any) -> tuple[str, str]:
    """Name and version of the library behind the bindings: TensorRT, or TensorRT-RTX where that is loaded instead.

    The bindings only know their own version; the loaded file says which library answers them.
    """
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return "TensorRT", trt.__version__
    rtx = re.search(r"/libtensorrt_rtx\.so\.([\d.]+)", loaded)
    if rtx and not re.search(r"/libnvinfer\.so", loaded):
        return "TensorRT-RTX", rtx[1].strip(".")
    return "TensorRT", trt.__version__


def parse_network(path: Path) -> ParsedNetwork:
    """Parse the file at `path` after checking what can be checked without TensorRT, and its operators.

    Raises UserError, one line, for a file that is broken or that this TensorRT cannot build.
    """
    path = Path(path)
    facts = scan_onnx(path)
    if not OPSETS[0] <= facts.opset <= OPSETS[1]:
        raise UserError(
            f"{path}: opset {facts.opset}: TensorRT reads {OPSETS[0]} to {OPSETS[1]}: export it again "
            "(`compress export` writes 20)"
        )
    trt = load_tensorrt()
    log().clear()
    builder = trt.Builder(log().logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log().logger)
    check_operators(path, facts.operators, parser.supports_operator, " ".join(library(trt)))
    if not parser.parse_from_file(str(path)):
        problems = [_parser_problem(parser.get_error(index)) for index in range(parser.num_errors)]
        problems = problems or log().errors() or ["it gives no reason"]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: TensorRT cannot read it: {problems[0]}{more}")
    if library(trt)[0] == "TensorRT-RTX":
        for layer in layers_of(network):
            if layer.type.name in _RTX_WITHOUT:
                raise UserError(
                    f"{path}: node '{layer.name}' ({_RTX_WITHOUT[layer.type.name]}): TensorRT-RTX reads this operator "
                    "but has no implementation of it: export with `compress export`, which suppresses without it"
                )
    return ParsedNetwork(trt, builder, network, parser, facts)


def load_engine(trt: Any, engine: bytes, *, version_compatible: bool) -> Any:
    """The engine on this machine's GPU, or None with the reason in `log()`.

    A version-compatible engine brings its own runtime, which is code: TensorRT runs it only when told to. Give it
    engines whose hash was compared with their card.
    """
    log().clear()
    runtime = trt.Runtime(log().logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime.deserialize_cuda_engine(engine)


def check_operators(path: Path, operators: list[Operator], supported: Any, where: str) -> None:
    """Raise UserError naming every operator for which `supported(op_type)` is false."""
    missing = [operator for operator in operators if not supported(operator.op_type)]
    if not missing:
        return
    named = ", ".join(
        f"{operator.domain + '.' if operator.domain else ''}{operator.op_type} ({operator.count} "
        f"node{'s' * (operator.count > 1)}, first '{operator.first}')"
        for operator in missing
    )
    hint = "write it with ordinary operators, or leave this part out of the graph"
    if any(operator.domain == "com.microsoft" or "Integer" in operator.op_type for operator in missing):
        hint = "this graph was made for ONNX Runtime: export it with --target tensorrt"
    raise UserError(f"{path}: {where} has no importer for {named}: {hint}")


def layers_of(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def compute_layers(trt: Any, network: Any) -> Layers:
    """Number formats of the convolutions and of the matrix products with weights, which are nearly all of the work.

    int8: input and weights come out of a DequantizeLinear, directly or through layers that only move data. Otherwise
    the format of the input. Matrix products of two activations do not count: those of the suppression are always fp32.
    """
    layers = list(layers_of(network))
    maker = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    weighted = {"CONSTANT", "DEQUANTIZE"}

    def source(tensor: Any) -> Any:
        layer = maker.get(tensor.name)
        while layer is not None and layer.type.name in ("SHUFFLE", "SLICE", "IDENTITY", "PADDING") and layer.num_inputs:
            layer = maker.get(layer.get_input(0).name)
        return layer

    def has_weights(layer: Any) -> bool:
        if layer.type.name in ("CONVOLUTION", "DECONVOLUTION"):
            return True
        return layer.type.name == "MATRIX_MULTIPLY" and any(
            (made := source(layer.get_input(i))) is not None
            and made.type.name in weighted
            and (made.type.name == "CONSTANT" or _type(maker, made.get_input(0)) == "CONSTANT")
            for i in range(2)
        )

    formats: Counter[str] = Counter()
    for layer in layers:
        if has_weights(layer):
            ends = [source(layer.get_input(i)) for i in range(min(layer.num_inputs, 2))]
            quantized = all(made is not None and made.type.name == "DEQUANTIZE" for made in ends)
            formats["int8" if quantized else format_name(layer.get_input(0).dtype.name)] += 1
    total = sum(formats.values())
    return Layers(count=total, share={name: count / total for name, count in formats.most_common()})


def format_name(text: str) -> str:
    """TensorRT's name of a number format, in any of its spellings, as we write it: `FLOAT` → `fp32`."""
    spellings = (
        ("bf16", r"bf(loat)?16"),
        ("fp16", r"half|fp16|float16"),
        ("fp8", r"fp8|float8|e4m3"),
        ("fp4", r"fp4|float4"),
        ("int8", r"\bint8|kINT8"),
        ("uint8", r"uint8"),
        ("int32", r"int32"),
        ("int64", r"int64"),
        ("bool", r"bool"),
        ("fp32", r"float|fp32"),
    )
    return next((name for name, pattern in spellings if re.search(pattern, text, re.IGNORECASE)), text.lower())


# ----------------------------------------------------------------------------------------------------


def _type(maker: dict[str, Any], tensor: Any) -> str:
    layer = maker.get(tensor.name)
    return "" if layer is None else layer.type.name


def _parser_problem(error: Any) -> str:
    reason = _shorter(error.desc())
    node = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    code = error.code().name
    described = f"{reason} {code} {error.func()}"
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, described)), "")
    place = f"node '{node}' ({operator}): " if node or operator else ""
    return f"{place}{reason} [{code}]{f': {hint}' if hint else ''}"


def _shorter(message: str) -> str:
    """One line, without the source positions that TensorRT puts around a message."""
    message = " ".join(message.split())
    message = re.sub(r"\s*\(?In \S+ at /_?src/[^\s)]+", "", message)
    message = re.sub(r"^\[?\S+\.(?:cpp|h)(?:::\w+)*(?:::\d+|:\d+)\]?:? ?", "", message)
    message = re.sub(r"\.?\)?$", "", message) if message.count("(") < message.count(")") else message.rstrip(". ")
    return message if len(message) < 400 else message[:400].rstrip() + " …"
