"""Parts of a detector's graph that can be quantized: its layers, and where the network ends and deciding begins.

A *layer* is a trained weight with all nodes that use it: a head that is shared by five pyramid levels is one layer
with five nodes. The *output layers* are those that no other layer follows (class scores and box distances): they stay
in float unless asked for. What comes after them (sigmoid, integral over the distance distribution, decoding,
suppression) is never quantized.

A detector with queries chooses places by their scores in the middle of the network (TopK). Integers there choose
others, and the layers behind refine positions step by step. So the layers that decide the choice, all that work on
what was chosen, and those whose results are read at chosen places alone, stay in float as output layers do. So do
layers that no image reaches, such as those of learned queries: a calibration sees one value of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from deploy.core.errors import UserError

SCORES, BOXES = "dense_scores", "dense_boxes"  # values inside an exported graph: every location, before suppression
WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A weight and the nodes that use it. `name` is the weight's parameter name without its wrappers."""

    name: str
    weight: str
    nodes: tuple[str, ...]
    output: bool
    """Nothing with a weight comes after it, or a choice does, or it works on what was chosen, or on no image."""


@dataclass(frozen=True)
class Structure:
    """The layers of a graph in the order in which it computes them."""

    layers: tuple[Layer, ...]
    body: frozenset[str]
    """Names of the nodes up to the output layers, those included."""
    ends: tuple[str, ...]
    """Tensors that the output layers give."""
    chooses: bool
    """Rows of scores and boxes are what the network chose by their scores, not places."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """The layers that stay in float by default."""
        return tuple(layer.name for layer in self.layers if layer.output)


def structure_of(graph: onnx.GraphProto, where: str = "graph") -> Structure:
    """Find the layers, those that are quantized already too. Raises UserError for a graph without a weight."""
    weights = {item.name: item.name for item in graph.initializer if len(item.dims) >= 2}
    weights |= {  # a quantized weight under the name that it had
        node.output[0]: node.input[0].removesuffix("_quantized")
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    weighted = {
        node.name: weights[node.input[1]]
        for node in graph.node
        if node.op_type in WEIGHTED and node.input[1] in weights
    }
    if not weighted:
        raise UserError(f"{where}: there is no convolution or matrix product with a weight in it")
    if len({node.name for node in graph.node}) != len(graph.node):
        raise UserError(f"{where}: its nodes have no names, or not unique ones; export it with compress export")
    last, deciding = _followed(graph, set(weighted)), _deciding(graph, set(weighted))
    followed = last - deciding
    ends = [node for node in graph.node if node.name in weighted and node.name not in last]
    users: dict[str, list[str]] = {}
    for node in graph.node:  # ONNX requires topological order
        if node.name in weighted:
            users.setdefault(weighted[node.name], []).append(node.name)
    prefix = _common_prefix(users)
    layers = tuple(
        Layer(
            name=weight.removeprefix(prefix).removesuffix(".weight"),
            weight=weight,
            nodes=tuple(nodes),
            output=not any(node in followed for node in nodes),
        )
        for weight, nodes in users.items()
    )
    outputs = tuple(node.output[0] for node in ends)
    body = frozenset(node.name for node in needed_for(graph, outputs))
    return Structure(layers, body, outputs, chooses=bool(deciding))


def needed_for(graph: onnx.GraphProto, tensors: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that compute `tensors`, in order."""
    wanted, kept = set(tensors), []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(name for name in node.input if name)
            kept.append(node)
    return kept[::-1]


def part_of(layer: str) -> str:
    """The part of the detector that a layer belongs to: `head.cls_convs.0.conv` → `head`."""
    return layer.partition(".")[0]


# ----------------------------------------------------------------------------------------------------


def _followed(graph: onnx.GraphProto, weighted: set[str]) -> set[str]:
    """Names of the nodes whose results reach a weighted node."""
    reaching: set[str] = set()  # tensors
    names: set[str] = set()
    for node in reversed(graph.node):
        if reaching.intersection(node.output):
            names.add(node.name)
        if node.name in weighted or node.name in names:
            reaching.update(name for name in node.input if name)
    return names


_SAME_INDEX = ("Unsqueeze", "Expand", "Reshape", "Cast", "Identity")


def _deciding(graph: onnx.GraphProto, weighted: set[str]) -> set[str]:
    """Names of the weighted nodes that give what a choice before the scores is made by, or made from, without another
    one between; and of those behind it."""
    before = {node.name for node in needed_for(graph, (SCORES, BOXES))}
    choices = [node for node in graph.node if node.op_type == "TopK" and node.name in before]
    wanted = {name for node in choices for name in node.input}
    chosen = {name for node in choices for name in node.output}
    places = {node.output[1] for node in choices}
    found: set[str] = set()
    for node in graph.node:
        if node.op_type in _SAME_INDEX and node.input[0] in places:
            places.update(node.output)
        if node.op_type == "GatherElements" and node.input[1] in places:
            wanted.add(node.input[0])
        if chosen.intersection(node.input):
            chosen.update(node.output)
            found.add(node.name)
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            found.add(node.name)
            if node.name not in weighted:
                wanted.update(node.input)
    if not choices:
        return set()
    return (found | _read_where_chosen(graph, weighted, chosen) | _without_image(graph)) & weighted


def _read_where_chosen(graph: onnx.GraphProto, weighted: set[str], chosen: set[str]) -> set[str]:
    """Names of the weighted nodes whose results are read at places that `chosen` tensors say, and nowhere else."""
    read: set[str] = set()
    elsewhere = {output.name for output in graph.output}
    names: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type == "Shape":
            continue
        alone = bool(read.intersection(node.output)) and not elsewhere.intersection(node.output)
        if alone:
            names.add(node.name)
        for index, name in enumerate(node.input):
            picked = node.op_type in ("Gather", "GatherND") and index == 0 and node.input[1] in chosen
            (read if picked or (alone and node.name not in weighted) else elsewhere).add(name)
    return names


def _without_image(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes whose results depend on no pixel, at most on the number of images."""
    reached = {item.name for item in graph.input}
    names: set[str] = set()
    for node in graph.node:
        if node.op_type != "Shape" and reached.intersection(node.input):
            reached.update(node.output)
        else:
            names.add(node.name)
    return names


def _common_prefix(weights: Iterable[str]) -> str:
    """Common beginning of all parameter names, up to a dot: the wrappers around the detector. A constant that is no
    parameter has no dot in its name."""
    paths = [weight.split(".")[:-2] for weight in weights if "." in weight]  # a layer keeps at least its own name
    prefix: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        prefix.append(steps[0])
    return "".join(f"{step}." for step in prefix)
