"""Changes to the graph of an int8 file for the CPU that bring speed in ONNX Runtime and leave its results.

*Few candidates*: suppression compares every candidate with every other, a million pairs of a thousand candidates, and
most images have a hundred or two whose score is above the threshold. Behind it only as many go on as the image of the
batch with the most has, and never fewer than can be detections. Those left out are the ones that the threshold drops,
so the detections are the same, bit for bit. A size that depends on the data is nothing for TensorRT.

*Upsampling of integers*: a nearest-neighbour Resize copies values. It works on the integers of a quantized tensor
rather than on their float values: the same numbers, a quarter of the memory.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def for_cpu(model: onnx.ModelProto) -> None:
    """Make both changes in place, where the graph has the nodes for them."""
    _resize_integers(model.graph)
    _few_candidates(model.graph)


# --- details --------------------------------------------------------------------------------------------


def _resize_integers(graph: onnx.GraphProto) -> None:
    makers = {name: node for node in graph.node for name in node.output}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        source = makers.get(node.input[0]) if node.op_type == "Resize" else None
        if source is None or source.op_type != "DequantizeLinear" or _mode(node) != b"nearest":
            continue
        integers, result = f"{node.output[0]}_integers", node.output[0]
        node.input[0], node.output[0] = source.input[0], integers
        back = helper.make_node("DequantizeLinear", [integers, *source.input[1:]], [result], f"{node.name}_dequantize")
        graph.node.insert(index + 1, back)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        if graph.node[index].op_type == "DequantizeLinear" and graph.node[index].output[0] not in read:
            del graph.node[index]


def _mode(node: onnx.NodeProto) -> bytes:
    return next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"nearest")


def _few_candidates(graph: onnx.GraphProto) -> None:
    """Slice what the first TopK gives, and the constants that are as long."""
    constants = {item.name: item for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    pairs = [node for node in graph.node if node.op_type == "TopK"]
    if len(pairs) != 2 or any(node.input[1] not in constants for node in pairs):
        return
    first, second = pairs
    choice = makers.get(second.input[0])
    threshold = next((n for n in graph.node if n.op_type == "Greater" and n.input[0] == first.output[0]), None)
    if choice is None or choice.op_type != "Where" or first.output[0] not in choice.input or threshold is None:
        return
    count, most = (int(numpy_helper.to_array(constants[node.input[1]]).item()) for node in (first, second))
    if not (second.output[1] and threshold.input[1] in constants):
        return

    place = list(graph.node).index(first) + 1
    names = {name: f"{name}_all" for name in first.output}
    first.output[:] = [names[name] for name in first.output]
    sizes = {"candidates_from": [0], "candidates_axis_0": [0], "candidates_axis_1": [1], "candidates_least": [most]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in sizes.items())
    made = [
        helper.make_node("Greater", [first.output[0], threshold.input[1]], ["candidate_passes"]),
        helper.make_node("Cast", ["candidate_passes"], ["candidate_counts"], to=onnx.TensorProto.INT64),
        helper.make_node("ReduceSum", ["candidate_counts", "candidates_axis_1"], ["candidates_each"], keepdims=1),
        helper.make_node("ReduceMax", ["candidates_each", "candidates_axis_0"], ["candidates_most"], keepdims=0),
        helper.make_node("Max", ["candidates_most", "candidates_least"], ["candidates"]),
    ]
    for name, whole in names.items():
        made.append(_slice(whole, name, 1))
    for item in list(graph.initializer):
        axes = [axis for axis, length in enumerate(item.dims) if length == count]
        if len(item.dims) == 2 and axes and item.name not in sizes:
            _replace_input(graph, item.name, f"{item.name}_some")
            rest = item.name
            for number, axis in enumerate(axes):
                part = f"{item.name}_some" if number == len(axes) - 1 else f"{item.name}_part"
                made.append(_slice(rest, part, axis))
                rest = part
    for node in made:
        node.name = f"node_{node.output[0]}"
    nodes = [*graph.node[:place], *made, *graph.node[place:]]
    del graph.node[:]
    graph.node.extend(_in_order(nodes))


def _in_order(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Every node behind those whose results it reads, otherwise as they are."""
    waiting, found = {name for node in nodes for name in node.output}, []
    while nodes:
        later = []
        for node in nodes:
            if waiting.isdisjoint(node.input):
                found.append(node)
                waiting.difference_update(node.output)
            else:
                later.append(node)
        assert len(later) < len(nodes), "a graph has no circle"
        nodes = later
    return found


def _slice(whole: str, part: str, axis: int) -> onnx.NodeProto:
    return helper.make_node("Slice", [whole, "candidates_from", "candidates", f"candidates_axis_{axis}"], [part])


def _replace_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
