"""Search for the place where a graph starts to compute something else, layer by layer, against a correct graph.

`first_divergence(reference, other, images)` runs both ONNX files with their intermediate values exposed, matches the
values, and names the first one, in the order of computation, whose difference is larger than the number formats on its
way explain. It compares values, not code: a bad scale, a cast to too small a type and exchanged outputs look the same,
and the report names the node that made the value.

The measure is the noise-to-signal ratio rms(other − reference) / rms(reference). Rounding adds up along a network, so
a limit alone would blame the last layer of a deep int8 graph. A value diverges when its ratio is above the limit of its
format *and* several times that of every input of its node: the error was made here, not handed on.

What decides (thresholds, ordering, suppression) turns noise into other detections, so it is compared by itself: both
graphs get the reference's dense scores and boxes, and must then agree.

Needs the `onnx` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper, shape_inference

from deploy.core.errors import UserError, first_line
from deploy.graph.structure import BOXES, SCORES, needed_for

LIMITS = {"fp32": 1e-3, "fp16": 0.03, "int8": 0.25}
"""Largest noise-to-signal ratio that a format explains at any depth."""
STORED = "initializer"
"""In place of an operator: a weight that the file holds."""
JUMP = 3.0
"""A node that multiplies the worst ratio of its inputs by more than this made the error itself."""
_WEIGHT_LIMIT = {"fp32": 1e-6, "fp16": 2e-3, "int8": 0.05}  # constants are rounded once
_AT_ONCE = 24  # values held in memory together
_COPYING = ("QuantizeLinear", "DequantizeLinear", "Cast")  # their results stand for the value that went in
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)

Format = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Divergence:
    """The first value that differs too much."""

    tensor: str
    """Its name in the graph under test."""
    node: str
    op: str
    ratio: float
    """Noise-to-signal; infinity when it is not finite or has another shape."""
    limit: float
    input_ratio: float
    """The worst ratio of the node's inputs that were compared."""
    introduced: bool
    """True: the error was made by this node. False: it grew gradually over the graph, and passed the limit here."""
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types: infinity becomes None."""
        return {key: None if value == float("inf") else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        origin = "made by" if self.introduced else "accumulated up to"
        where = "stored in the file" if self.op == STORED else f"{origin} node '{self.node}' ({self.op})"
        return f"first diverging tensor: '{self.tensor}', {where}: {self.detail}"


@dataclass(frozen=True)
class Diagnosis:
    """Result of the comparison; `divergence` is None when all differences are what the formats explain."""

    format: Format
    compared: int
    """Values that have a counterpart."""
    produced: int
    """Float values that the graph under test computes."""
    divergence: Divergence | None
    worst: tuple[str, float] = ("", 0.0)
    """The value with the largest noise-to-signal ratio, and the ratio."""

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types."""
        found = None if self.divergence is None else self.divergence.to_dict()
        worst = {"tensor": self.worst[0], "ratio": self.worst[1] if np.isfinite(self.worst[1]) else None}
        return {**asdict(self), "divergence": found, "worst": worst}

    def __str__(self) -> str:
        if self.divergence is not None:
            return str(self.divergence)
        return (
            f"no tensor diverges: {self.compared} of {self.produced} values were compared, and {self.format} explains "
            f"their differences; the largest is {self.worst[1]:.2g} of the signal, at '{self.worst[0]}'"
        )


def first_divergence(reference: Path, other: Path, images: np.ndarray) -> Diagnosis:
    """Compare `other` with `reference`, two exports of one network, on uint8 images [N, 3, H, W]; one or two will do.

    Graph optimisations of ONNX Runtime are off, so that every value exists. Raises UserError for a file that cannot be
    read or run, or when hardly any value of the two has a counterpart.
    """
    good, bad = _Graph.load(Path(reference)), _Graph.load(Path(other))
    feed = {"images": images}
    continuous = _compare(good, bad, feed, _constants(good, bad), bad.format, bad.format)
    if continuous.compared < 0.3 * continuous.produced:
        raise UserError(
            f"{other}: only {continuous.compared} of its {continuous.produced} values have a counterpart in "
            f"{reference}: these are not two exports of one network"
        )
    good_tail, bad_tail = good.deciding_part(), bad.deciding_part()
    if continuous.divergence is not None or good_tail is None or bad_tail is None:
        return continuous
    dense = good.values([SCORES, BOXES], feed)
    deciding = _compare(good_tail, bad_tail, {**feed, **dense}, {}, "fp32", bad.format)
    return Diagnosis(
        bad.format,
        continuous.compared + deciding.compared,
        continuous.produced + deciding.produced,
        deciding.divergence,
        max(continuous.worst, deciding.worst, key=lambda pair: pair[1]),
    )


# ----------------------------------------------------------------------------------------------------


class _Graph:
    """A graph, its nodes in order, and the values that can be compared."""

    def __init__(self, path: Path, model: onnx.ModelProto, *, integers: bool = False) -> None:
        self.path, self.model = path, model
        graph = model.graph
        self.nodes = list(graph.node)
        self.initializers = {item.name: item for item in graph.initializer}
        self.maker = {name: node for node in self.nodes for name in node.output}
        values = (*graph.value_info, *graph.output)
        self.kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        wanted = {*_FLOATS, *(_INTEGERS if integers else ())}
        self.comparable = [name for node in self.nodes for name in node.output if self.kinds.get(name) in wanted]

    @classmethod
    def load(cls, path: Path) -> _Graph:
        """The graph of a file without the part that decides. Raises UserError."""
        try:
            model = shape_inference.infer_shapes(onnx.load(str(path)))
        except Exception as error:  # protobuf's errors have no common class
            raise UserError(f"{path}: not a readable ONNX file: {' '.join(str(error).split())[:200]}") from error
        whole = cls(path, model)
        deciding = _after(model.graph, {SCORES, BOXES})
        whole.comparable = [name for name in whole.comparable if name not in deciding]
        return whole

    def deciding_part(self) -> _Graph | None:
        """The part from dense scores and boxes, now inputs, to the outputs; None for a graph without these values."""
        if not {SCORES, BOXES} <= set(self.maker):
            return None
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.node[:]
        stop = [node for node in self.nodes if not {SCORES, BOXES}.intersection(node.output)]
        kept = onnx.GraphProto(node=stop)
        model.graph.node.extend(needed_for(kept, [value.name for value in self.model.graph.output]))
        known = {value.name: value for value in self.model.graph.value_info}
        model.graph.input.extend(known[name] for name in (SCORES, BOXES))
        return _Graph(self.path, model, integers=True)

    @property
    def format(self) -> Format:
        """The coarsest number format in the graph."""
        if any(node.op_type == "QuantizeLinear" for node in self.nodes):
            return "int8"
        halves = any(item.data_type == TensorProto.FLOAT16 for item in self.initializers.values())
        return "fp16" if halves else "fp32"

    def source(self, name: str) -> str:
        """The value that `name` stands for: what went into the Q, DQ and Cast nodes that made it."""
        while (node := self.maker.get(name)) is not None and node.op_type in _COPYING:
            name = node.input[0]
        return name

    def values(self, names: list[str], feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on `feed`; give `names`. Raises UserError when ONNX Runtime cannot."""
        tapped = onnx.ModelProto()
        tapped.CopyFrom(self.model)
        del tapped.graph.output[:]
        tapped.graph.output.extend(onnx.helper.make_tensor_value_info(name, self.kinds[name], None) for name in names)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                tapped.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            return dict(zip(names, session.run(names, dict(feed)), strict=True))
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise UserError(f"{self.path}: cannot be run value by value: {first_line(error)[:300]}") from error


def _match(good: _Graph, bad: _Graph) -> dict[str, str]:
    """Value of `bad` → value of `good`, in bad's order: by name, and by place in the sequence for the rest.

    A dequantized value is compared with the value that was quantized, a cast one with the reference's own cast or with
    the value before it. Values that were renamed, as an exporter does
    when a network has more or fewer casts, are found by aligning the two sequences of operators.
    """
    known = set(good.comparable)
    casts = {(good.source(n.input[0]), _target_type(n)): n.output[0] for n in good.nodes if n.op_type == "Cast"}
    pairs = {}
    named = 0
    for name in bad.comparable:
        maker = bad.maker[name]
        if maker.op_type in _COPYING:
            origin = bad.source(name)
            same = casts.get((origin, _target_type(maker)), origin) if maker.op_type == "Cast" else origin
            if same in known:
                pairs[name] = same
        elif name in known and good.maker[name].op_type == maker.op_type:  # a ReLU may have moved into the zero point
            pairs[name] = name
            named += 1
    if named >= 0.5 * min(len(good.comparable), len(bad.comparable)):  # one of them may do a part in another way
        return pairs

    def steps(graph: _Graph) -> list[tuple[str, str]]:
        comparable = set(graph.comparable)
        return [
            (node.op_type, name)
            for node in graph.nodes
            for name in node.output
            if name in comparable and node.op_type not in _COPYING
        ]

    left, right = steps(good), steps(bad)
    blocks = SequenceMatcher(None, [op for op, _ in left], [op for op, _ in right], autojunk=False)
    placed = {}
    for block in blocks.get_matching_blocks():
        for offset in range(block.size):
            placed[right[block.b + offset][1]] = left[block.a + offset][1]
    return {name: placed[name] for name in bad.comparable if name in placed}


def _target_type(cast: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in cast.attribute if attribute.name == "to"), 0)


def _constants(good: _Graph, bad: _Graph) -> dict[str, float]:
    """Ratios of dequantized and half-precision weights against the float ones of the same name."""
    ratios = {}
    for name, item in bad.initializers.items():
        if item.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16) and name in good.initializers:
            wanted, found = (numpy_helper.to_array(x).astype(np.float64) for x in (good.initializers[name], item))
            ratios[name] = _ratio(wanted, found)[0]
    for node in bad.nodes:
        original = node.input[0].removesuffix("_quantized") if node.input else ""
        if node.op_type != "DequantizeLinear" or node.input[0] not in bad.initializers:
            continue
        if original in good.initializers:
            integers, scale, *rest = (
                numpy_helper.to_array(bad.initializers[name]).astype(np.float64) for name in node.input
            )
            zero = rest[0] if rest else np.zeros_like(scale)
            wanted = numpy_helper.to_array(good.initializers[original]).astype(np.float64)
            axis = next((int(x.i) for x in node.attribute if x.name == "axis"), 1)
            if scale.ndim:
                shape = [-1 if d == axis else 1 for d in range(integers.ndim)]
                scale, zero = scale.reshape(shape), zero.reshape(shape)
            ratios[node.output[0]] = _ratio(wanted, (integers - zero) * scale)[0]
    return ratios


def _compare(
    good: _Graph,
    bad: _Graph,
    feed: Mapping[str, np.ndarray],
    constants: Mapping[str, float],
    explains: Format,
    number_format: Format,
) -> Diagnosis:
    """Run both, a few values at a time, and judge them by the limit of the format `explains`."""
    pairs = _match(good, bad)
    names, ratios, details = list(pairs), dict(constants), {}
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        wanted = good.values(sorted({pairs[name] for name in part}), feed)
        for name, value in bad.values(part, feed).items():
            ratios[name], details[name] = _ratio(wanted[pairs[name]], value)
    worst = max(((name, ratios[name]) for name in details), key=lambda pair: pair[1], default=("", 0.0))
    found = _first(bad, ratios, details, explains)
    return Diagnosis(number_format, len(pairs), len(bad.comparable), found, worst)


def _ratio(wanted: np.ndarray, found: np.ndarray) -> tuple[float, str]:
    """(noise-to-signal ratio, in words)."""
    if wanted.shape != found.shape:
        return float("inf"), f"its shape is {list(found.shape)}, the reference's {list(wanted.shape)}"
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.isfinite(found[finite]).all():
        return float("inf"), "it holds values that are not finite"
    if not finite.any():
        return 0.0, ""
    noise = float(np.sqrt(np.mean((found[finite] - wanted[finite]) ** 2)))
    signal = float(np.sqrt(np.mean(wanted[finite] ** 2)))
    if noise == 0:
        return 0.0, "equal"
    ratio = noise / signal if signal else float("inf")
    return ratio, f"noise is {ratio:.2g} of the signal, rms {noise:.3g} against {signal:.3g}"


def _first(bad: _Graph, ratios: dict[str, float], details: dict[str, str], number_format: Format) -> Divergence | None:
    """The first value above its limit whose error was made there; else the first above the limit."""
    gradual: Divergence | None = None
    for node in bad.nodes:
        constants = [name for name in node.input if name in ratios and name not in details]
        for name in constants:  # a wrong weight is not the fault of the node that uses it
            if ratios[name] > _WEIGHT_LIMIT[number_format]:
                detail = f"this weight is off by {ratios[name]:.2g} of its size"
                maker = bad.maker.get(name)
                return Divergence(
                    name, maker.name if maker else "", maker.op_type if maker else STORED,
                    ratios[name], _WEIGHT_LIMIT[number_format], 0.0, True, detail,
                )  # fmt: skip
        worst = max((ratios[name] for name in node.input if name in ratios), default=0.0)
        for name in (name for name in node.output if name in details):
            ratio, limit = ratios[name], LIMITS[number_format]
            if ratio <= limit:
                continue
            introduced = ratio > JUMP * max(worst, limit / 10)
            found = Divergence(name, node.name, node.op_type, ratio, limit, worst, introduced, details[name])
            if introduced:
                return found
            gradual = gradual or found
    return gradual


def _after(graph: onnx.GraphProto, tensors: set[str]) -> set[str]:
    """The values that are computed from `tensors`."""
    found: set[str] = set()
    for node in graph.node:
        if (found | tensors).intersection(node.input):
            found.update(node.output)
    return found - tensors
