"""Largest and smallest magnitudes inside a graph, measured on pictures: which of its values fit into float16.

float16 ends at 65,504 and is exact to eleven bits down to 6.1e-5. ONNX Runtime's CPU provider computes float16 graphs
in float32, so there an overflow is not seen; here the float32 graph is run with a magnitude of every value as an
output. The magnitudes are taken inside the graph, picture by picture, and of large pictures for a part of the values at
a time, so that memory stays bounded.

Operators that add up many numbers may overflow on the way to a result that fits. Whether a runtime keeps the sum in
float32 is its own choice, so the sum is measured too: of magnitudes (a convolution, a matrix product, a mean) or of
squares (a norm). No order of adding, and no partial sum, is larger.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from deploy.graph.session import cpu_session
from deploy.graph.structure import needed_for

_HELD = 400e6  # bytes of values, of one picture, that are in memory together
_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1")
_SQUARES = ("ReduceL2", "ReduceSumSquare")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DIVIDES = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sqrt": 0}
"""Operator → the input whose small values decide its result."""
_Step = tuple[str, list[str], dict[str, Any]]
_Steps = list[_Step]
"""Operators in a row: name, inputs ("": the result of the one before) and attributes."""


@dataclass
class Magnitudes:
    """What was measured, over all pictures."""

    largest: dict[str, float] = field(default_factory=dict)
    """Value → its largest finite magnitude."""
    smallest: dict[str, float] = field(default_factory=dict)
    """Value that something is divided by → its smallest magnitude that is not 0; infinity without one."""
    inside: dict[str, float] = field(default_factory=dict)
    """Node → the largest sum that it may have on the way to its result."""


def constants_of(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The floating-point initializers as float64 arrays."""
    floats = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
    return {x.name: numpy_helper.to_array(x).astype(np.float64) for x in graph.initializer if x.data_type in floats}


def measure(model: onnx.ModelProto, values: Collection[str], images: np.ndarray, *, above: float) -> Magnitudes:
    """Run `model`, a float32 graph, on uint8 images [N, 3, H, W].

    values: names of float32 values that nodes give, which are measured, and with them the nodes that give or take them.
    above: a sum inside a convolution or matrix product, which takes as long as the product itself, is only measured
        where a cheap bound reaches this.
    """
    nodes = [node for node in model.graph.node if set(values).intersection([*node.input, *node.output])]
    constants = constants_of(model.graph)
    found = Magnitudes()
    for group in _groups(model, values):
        taps = _Taps(model)
        for name in group:
            taps.add("largest", name, [("Abs", [name], {})])
        for node in nodes:
            if group.intersection(node.output):
                taps.add("inside", node.name, _inside(node))
        for name in sorted(group & {node.input[_DIVIDES[node.op_type]] for node in nodes if node.op_type in _DIVIDES}):
            zero: _Step = ("Equal", [name, "tap_nothing"], {})
            taps.add("smallest", name, [zero, ("Where", ["", "tap_infinite", name], {}), ("Abs", [""], {})])
        taps.run(images, found)
    _leave_out_infinities(model, found, images)
    for node in nodes:
        bound = _bound(node, constants, found.largest)
        if bound is not None:
            found.inside[node.name] = bound
    loose = {n.output[0]: n for n in nodes if n.op_type in _PRODUCTS and found.inside[n.name] >= above}
    for group in _groups(model, loose):
        taps = _Taps(model)
        for node in (loose[name] for name in group):
            del found.inside[node.name]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            magnitudes = [taps.magnitude(name, constants) for name in node.input]
            taps.add("inside", node.name, [(node.op_type, magnitudes, attributes)])
        taps.run(images, found)
    return found


# ----------------------------------------------------------------------------------------------------


class _Taps:
    """A copy of a graph with more outputs: one magnitude each."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        del self.model.graph.output[:]
        self.wanted: list[tuple[str, str]] = []
        """(what, name) of each output."""
        self._constant("tap_flat", np.array([0, 0, -1], np.int64))
        self._constant("tap_last", np.array([-1], np.int64))
        self._constant("tap_nothing", np.array(0, np.float32))
        self._constant("tap_infinite", np.array(np.inf, np.float32))
        self._magnitudes: dict[str, str] = {}

    def add(self, what: str, name: str, steps: _Steps) -> None:
        """Measure what the last of `steps` gives; nothing without steps."""
        graph, label, value = self.model.graph, f"tap_{len(self.wanted)}", ""
        for number, (op, inputs, attributes) in enumerate(steps):
            result = f"{label}_{number}"
            given = [name or value for name in inputs] if value else inputs
            graph.node.append(helper.make_node(op, given, [result], result, **attributes))
            value = result
        if not steps:
            return
        reduction = "ReduceMin" if what == "smallest" else "ReduceMax"
        graph.node.append(helper.make_node(reduction, [value], [label], f"{label}_all", keepdims=0))
        graph.output.append(helper.make_tensor_value_info(label, TensorProto.FLOAT, []))
        self.wanted.append((what, name))

    def magnitude(self, name: str, constants: Mapping[str, np.ndarray]) -> str:
        """Name of |value|."""
        if name and name not in self._magnitudes:
            self._magnitudes[name] = f"{name}_magnitude"
            if name in constants:
                self._constant(f"{name}_magnitude", np.abs(constants[name]).astype(np.float32))
            else:
                self.model.graph.node.append(
                    helper.make_node("Abs", [name], [f"{name}_magnitude"], f"{name}_magnitude")
                )
        return self._magnitudes.get(name, "")

    def run(self, images: np.ndarray, found: Magnitudes) -> None:
        """Run as much of the graph as the outputs need, picture by picture, and add to `found`."""
        graph = self.model.graph
        nodes = needed_for(graph, [value.name for value in graph.output])
        del graph.node[:]
        graph.node.extend(nodes)
        session = cpu_session(self.model.SerializeToString())
        for index in range(len(images)):
            values = session.run(None, {"images": images[index : index + 1]})
            for (what, name), value in zip(self.wanted, values, strict=True):
                kept = getattr(found, what)
                better = min if what == "smallest" else np.fmax
                kept[name] = float(better(kept.get(name, value), value))

    def _constant(self, name: str, value: np.ndarray) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))


def _inside(node: onnx.NodeProto) -> _Steps:
    """Steps to the largest sum inside an operator that reduces; none for others."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _SUMS or node.op_type in _SQUARES:
        return [("ReduceSumSquare" if node.op_type in _SQUARES else "ReduceL1", list(node.input), attributes)]
    if node.op_type == "GlobalAveragePool":
        return [("Reshape", [node.input[0], "tap_flat"], {}), ("ReduceL1", ["", "tap_last"], {})]
    if node.op_type == "InstanceNormalization":
        return [("Reshape", [node.input[0], "tap_flat"], {}), ("ReduceSumSquare", ["", "tap_last"], {})]
    if node.op_type == "LayerNormalization":
        axis = attributes.get("axis", -1)
        return [("Flatten", [node.input[0]], {"axis": axis}), ("ReduceSumSquare", ["", "tap_last"], {})]
    if node.op_type == "Softmax":  # its largest result is exp(0) over the sum
        axes = numpy_helper.from_array(np.array([attributes.get("axis", -1)], np.int64))
        which: _Step = ("Constant", [], {"value": axes})
        return [which, ("ReduceMax", [node.output[0], ""], {}), ("Reciprocal", [""], {})]
    return []


def _bound(node: onnx.NodeProto, constants: Mapping[str, np.ndarray], largest: Mapping[str, float]) -> float | None:
    """No sum inside the node is larger; None: it has none, or it was measured."""

    def top(name: str) -> float:
        return float(np.abs(constants[name]).max(initial=0.0)) if name in constants else largest.get(name, math.inf)

    if node.op_type == "AveragePool":
        kernel = next(list(a.ints) for a in node.attribute if a.name == "kernel_shape")
        return math.prod(kernel) * top(node.input[0])
    if node.op_type == "HardSwish":
        return 6 * top(node.input[0])  # x · relu6(x + 3) before the division by 6
    if node.op_type not in _PRODUCTS:
        return None
    bias = top(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
    weight = constants.get(node.input[1])
    if weight is None or weight.ndim < 2:
        return math.inf
    each = tuple(range(1, weight.ndim)) if node.op_type == "Conv" else None  # of the others all weights together
    return float(np.abs(weight).sum(axis=each).max()) * top(node.input[0]) + bias


def _groups(model: onnx.ModelProto, values: Collection[str]) -> Iterator[set[str]]:
    """The values in the order of the graph, as many at a time as are held in memory together."""
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in shape_inference.infer_shapes(model).graph.value_info
    }
    group: set[str] = set()
    held = 0
    for name in (name for node in model.graph.node for name in node.output if name in values):
        size = 4 * math.prod(max(1, dim.dim_value) for dim in shapes.get(name, ()))
        if group and held + size > _HELD:
            yield group
            group, held = set(), 0
        group.add(name)
        held += size
    if group:
        yield group


def _leave_out_infinities(model: onnx.ModelProto, found: Magnitudes, images: np.ndarray) -> None:
    """Values that are infinite on purpose, such as a mask, count by their other elements."""
    for name in [name for name, value in found.largest.items() if not math.isfinite(value)]:
        tapped = onnx.ModelProto()
        tapped.CopyFrom(model)
        del tapped.graph.output[:]
        tapped.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        session = cpu_session(tapped.SerializeToString())
        tops = [0.0]
        for index in range(len(images)):
            value = session.run([name], {"images": images[index : index + 1]})[0]
            tops.append(float(np.abs(value[np.isfinite(value)]).max(initial=0.0)))
        found.largest[name] = max(tops)
