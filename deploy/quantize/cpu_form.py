"""Changes to the graph of an int8 file for the CPU that bring speed in ONNX Runtime and leave its results.

*Suppression by the operator*: an exported graph compares every candidate with every other, a million pairs of a
thousand candidates, which a GPU does at once. On a CPU the operator NonMaxSuppression is faster: it compares what is
above the threshold with what of its class was kept. It computes the same overlaps from the same numbers, so the
detections are the same, bit for bit. (Where the graph's fixed number of rounds would leave a duplicate, see
`compress.export.nms`, the operator leaves none.)

*Upsampling of integers*: a nearest-neighbour Resize copies values. It works on the integers of a quantized tensor
rather than on their float values: the same numbers, a quarter of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from deploy.graph.structure import BOXES, SCORES

NO_SCORE = -1.0
"""Of candidates that are no detections; real scores are above 0."""


def for_cpu(model: onnx.ModelProto) -> None:
    """Make both changes in place, where the graph has the nodes for them."""
    _resize_integers(model.graph)
    _suppress_by_operator(model.graph)


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
    _drop_unread(graph)


def _mode(node: onnx.NodeProto) -> bytes:
    return next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"nearest")


def _suppress_by_operator(graph: onnx.GraphProto) -> None:
    """What the second TopK chooses from, the scores of the candidates and -1 for what is suppressed, comes from
    NonMaxSuppression. A graph without suppression, or with another than `compress.export.nms` makes, is left."""
    makers = {name: node for node in graph.node for name in node.output}
    chosen = [node for node in graph.node if node.op_type == "TopK"]
    gathers = [node for node in graph.node if node.op_type == "GatherElements"]
    boxes = [node.output[0] for node in gathers if node.input[0] == BOXES]
    labels = [node.input[0] for node in gathers if node.input[0] not in (BOXES, *boxes)]
    overlaps = [n for n in graph.node if n.op_type == "Greater" and _is_made_by("Div", n.input[0], makers)]
    if not (len(chosen) == 2 and len(boxes) == len(labels) == len(overlaps) == 1):
        return
    scores, kept = chosen[0].output[0], makers[chosen[1].input[0]]
    valid = next(n.output[0] for n in graph.node if n.op_type == "Greater" and n.input[0] == scores)
    while both := next((n for n in graph.node if n.op_type == "And" and valid in n.input), None):
        valid = both.output[0]

    most, threshold = _constant(graph, chosen[0].input[1]), _constant(graph, overlaps[0].input[1])
    constants = {
        "suppression_none": np.float32(NO_SCORE),
        "suppression_least": np.zeros(1, np.float32),
        "suppression_most": most.astype(np.int64).reshape(1),
        "suppression_overlap": threshold.reshape(1),
        "suppression_axis": np.ones(1, np.int64),
        "suppression_image_and_place": np.array([0, 2], np.int64),
        "suppression_first": np.int64(0),
        "suppression_step": np.int64(1),
        "suppression_column": np.array([1, -1, 1], np.int64),
    }
    nodes = [
        ("Where", [valid, scores, "suppression_none"], "valid_scores"),  # [B, N]
        ("Unsqueeze", ["valid_scores", "suppression_axis"], "valid_scores_row"),
        ("Unsqueeze", [labels[0], "suppression_axis"], "labels_row"),
        ("Shape", [SCORES], "classes"),
        ("Squeeze", ["classes"], "class_count"),
        ("Range", ["suppression_first", "class_count", "suppression_step"], "class_row"),
        ("Reshape", ["class_row", "suppression_column"], "class_column"),
        ("Equal", ["labels_row", "class_column"], "of_class"),  # [B, K, N]
        ("Where", ["of_class", "valid_scores_row", "suppression_none"], "scores_by_class"),
        (
            "NonMaxSuppression",
            [boxes[0], "scores_by_class", "suppression_most", "suppression_overlap", "suppression_least"],
            "survivors",  # [S, 3]: image, class, place
        ),
        ("Gather", ["survivors", "suppression_image_and_place"], "survivor_places"),
        ("GatherND", [scores, "survivor_places"], "survivor_scores"),
        ("Shape", [scores], "scores_shape"),
        ("Expand", ["suppression_none", "scores_shape"], "no_scores"),
        ("ScatterND", ["no_scores", "survivor_places", "survivor_scores"], kept.output[0]),
    ]
    attributes: dict[str, dict[str, Any]] = {"classes": {"start": 2, "end": 3}, "survivor_places": {"axis": 1}}
    made = [
        helper.make_node(kind, inputs, [name], f"node_{name}", **attributes.get(name, {}))
        for kind, inputs, name in nodes
    ]
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    place = list(graph.node).index(kept)
    before, after = graph.node[:place], graph.node[place + 1 :]
    del graph.node[:]
    graph.node.extend([*before, *made, *after])
    _drop_unread(graph)


def _is_made_by(kind: str, name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    return name in makers and makers[name].op_type == kind


def _constant(graph: onnx.GraphProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(item for item in graph.initializer if item.name == name))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop nodes and constants that no output depends on."""
    read = {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        if read.isdisjoint(graph.node[index].output):
            del graph.node[index]
        else:
            read.update(_read_by(graph.node[index]))
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:  # a branch or the body of a loop reads values from around it
        for inner in attribute.g.node:
            yield from _read_by(inner)
        yield from (value.name for value in attribute.g.output)
