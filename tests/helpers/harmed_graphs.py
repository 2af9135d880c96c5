"""Exported graphs with a known fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

Harm = Callable[[onnx.ModelProto], str]
"""Damages a graph; returns the name of the value that is wrong first."""


def harmed(source: Path, out: Path, harm: Harm) -> tuple[Path, str]:
    model = onnx.load(str(source))
    name = harm(model)
    onnx.save(model, str(out))
    return out, name


def node_of(model: onnx.ModelProto, op: str, index: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][index]


def set_initializer(model: onnx.ModelProto, name: str, factor: float) -> None:
    item = next(item for item in model.graph.initializer if item.name == name)
    value = numpy_helper.to_array(item)
    item.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), name))


def bad_cast(model: onnx.ModelProto) -> str:
    """The first activation goes through int8 and back."""
    relu = node_of(model, "Relu")
    value, position = relu.output[0], list(model.graph.node).index(relu)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == value:
                node.input[index] = "bad_float"
    model.graph.node.insert(position + 1, helper.make_node("Cast", [value], ["bad_int"], "to_int", to=TensorProto.INT8))
    model.graph.node.insert(
        position + 2, helper.make_node("Cast", ["bad_int"], ["bad_float"], "to_float", to=TensorProto.FLOAT)
    )
    return "bad_float"


def wrong_weight(model: onnx.ModelProto) -> str:
    weight = node_of(model, "Conv").input[1]
    set_initializer(model, weight, -1.0)
    return weight


def swapped_values(model: onnx.ModelProto) -> str:
    """The decoder adds the distances that it should subtract: x2, y2 and x1, y1 change places."""
    minus = next(node for node in model.graph.node if "dense_boxes" in node.output)
    first, third = minus.input[0], minus.input[2]
    minus.input[0], minus.input[2] = third, first
    return "dense_boxes"


def swapped_outputs(model: onnx.ModelProto) -> str:
    """Suppression ranks by the wrong sign."""
    top = node_of(model, "TopK", -1)
    smallest = next(attribute for attribute in top.attribute if attribute.name == "largest")
    smallest.i = 0
    return top.output[0]


def log_of_negative(model: onnx.ModelProto) -> str:
    """The boxes' left edges become NaN, or minus infinity at 0."""
    return through(model, 0, [("Neg", {}), ("Log", {})])


def overflowing_cast(model: onnx.ModelProto) -> str:
    """The boxes' right edges, x, become infinite in float16, which ends at exp(11.1)."""
    to_half, to_float = {"to": TensorProto.FLOAT16}, {"to": TensorProto.FLOAT}
    return through(model, 2, [("Exp", {}), ("Cast", to_half), ("Cast", to_float), ("Log", {})])


def through(model: onnx.ModelProto, coordinate: int, steps: list[tuple[str, dict[str, int]]]) -> str:
    """Send a coordinate of the dense boxes through more nodes."""
    stack = next(node for node in model.graph.node if "dense_boxes" in node.output)
    position, value = list(model.graph.node).index(stack), stack.input[coordinate]
    for number, (op, attributes) in enumerate(steps):
        node = helper.make_node(op, [value], [f"harm_{number}"], f"node_harm_{number}", **attributes)
        model.graph.node.insert(position + number, node)
        value = f"harm_{number}"
    stack.input[coordinate] = value
    return "dense_boxes"
