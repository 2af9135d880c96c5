"""Number formats that an ONNX graph really computes in. The card's `precision` comes from here, never from a wish; one
that its runtime chooses, bfloat16, is written by `compute_in`."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, shape_inference

from deploy.core.card import METADATA_KEY, PROCESSING, ModelCard, scanned_card
from deploy.core.files import atomic_path
from deploy.graph.structure import Structure, part_of, structure_of

_CONVERTING = ("Cast", "QuantizeLinear", "DequantizeLinear")
_NAMES = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def precisions(model: onnx.ModelProto) -> dict[str, str]:
    """Part of the detector → `fp32`, `fp16`, `int8`, or several joined by `+`, as its layers compute.

    A layer is int8 when both its weight and its input come out of a DequantizeLinear; what else it takes is float. The
    parts are the first steps of the weights' parameter names; everything outside the network is one part,
    `pre- and post-processing`. Raises UserError for a graph without weights.
    """
    graph = shape_inference.infer_shapes(model).graph
    structure = structure_of(graph)
    maker = {name: node for node in graph.node for name in node.output}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    kinds |= {item.name: item.data_type for item in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    found: dict[str, set[str]] = {}
    for layer in structure.layers:
        for name in layer.nodes:
            data, weight = (maker.get(value) for value in nodes[name].input[:2])
            int8 = all(source is not None and source.op_type == "DequantizeLinear" for source in (data, weight))
            kind = "int8" if int8 else _NAMES[kinds[nodes[name].input[1]]]
            found.setdefault(part_of(layer.name), set()).add(kind)
    results = [name for node in _processing(graph, structure) for name in node.output]
    outside = {_NAMES[kinds[name]] for name in results if kinds.get(name) in _NAMES}
    return {part: "+".join(sorted(kind)) for part, kind in {**found, PROCESSING: outside}.items()}


def set_card(model: onnx.ModelProto, card: ModelCard) -> None:
    """Replace the card of `model`."""
    onnx.helper.set_model_props(model, {METADATA_KEY: card.model_dump_json()})


def compute_in(number_format: str, source: Path, out: Path) -> None:
    """Write the file at `source` with a card that has every part computed in another format. The graph is the same: a
    runtime that cannot compute so refuses the file."""
    model = onnx.load(str(source))
    card = scanned_card(source)
    set_card(model, card.model_copy(update={"precision": dict.fromkeys(card.precision, number_format)}))
    with atomic_path(out) as temporary:
        onnx.save(model, str(temporary))


# ----------------------------------------------------------------------------------------------------


def _processing(graph: onnx.GraphProto, structure: Structure) -> list[onnx.NodeProto]:
    """Nodes before the first layer and after the last, without the casts between (and the factors of the output
    layers, which are parameters of the network)."""
    weighted = {node for layer in structure.layers for node in layer.nodes}
    parameters = {item.name for item in graph.initializer if "." in item.name}
    after: set[str] = set()  # tensors that come out of a layer or later
    found = []
    for node in graph.node:
        behind = node.name in weighted or bool(after.intersection(node.input))
        if behind:
            after.update(node.output)
        inside = node.name in structure.body if behind else False
        factor = behind and bool(parameters.intersection(node.input))
        if node.name not in weighted and not inside and not factor and node.op_type not in _CONVERTING:
            found.append(node)
    return found
