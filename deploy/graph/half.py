"""A network in float16 where its numbers fit, and in float32 where they do not.

An export comes here with its network in float64, which no detector uses otherwise: a mark for "float16, if possible".
It survives the exporter, and weights that the exporter folds together are folded with all their digits. `halve`
measures the marked part in float32 (`deploy.graph.ranges`) and types it: float16, with the nodes whose numbers do not
fit as islands of float32 between casts. Strongly typed runtimes, TensorRT's among them, compute in the types that are
written.

A number *fits* while it stays a factor of two inside the range of float16, because other pictures have other ranges:

- A value whose largest magnitude is above 32,752 does not fit, nor a node that may add up so much inside.
- A value that never exceeds 1.2e-4 does not fit, nor one of that size that something is divided by: what is
  left of its digits there is few. Unless it does not matter: it is only added to values that are large.
- A weight does not fit either when rounding takes more than 2⁻¹⁰ of it, twice what it takes of ordinary numbers.

`rounded` makes a float32 graph that rounds after every operator, as a GPU does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from deploy.core.card import HalfPrecision
from deploy.core.errors import UserError
from deploy.graph.ranges import Magnitudes, constants_of, measure
from deploy.graph.structure import structure_of

MARK = TensorProto.DOUBLE
MARGIN = 2.0
LARGEST = float(np.finfo(np.float16).max) / MARGIN
SMALLEST = float(np.finfo(np.float16).smallest_normal) * MARGIN
ADDED = float(np.finfo(np.float16).smallest_normal) * 2.0**11
"""A sum that reaches this has no digit for a term that float16 flushes to zero."""
ROUNDING = 2.0**-10
_TYPES: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
_SHAPES = ("Shape", "Size")
_NAMES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
_TERMS = {"Add": (0, 1), "Sub": (0, 1), "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,)}
"""Operator → the inputs that it adds to others."""


def halve(marked: onnx.ModelProto, images: np.ndarray) -> tuple[onnx.ModelProto, HalfPrecision]:
    """The file of a marked graph, and what was measured on uint8 images [N, 3, H, W] of its size, N ≥ 1.

    Raises UserError for a graph with control flow in the marked part.
    """
    kinds = _kinds(marked)
    values = [name for node in marked.graph.node for name in node.output if kinds.get(name) == MARK]
    nodes = [node for node in marked.graph.node if _marked(node, kinds)]
    for node in nodes:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise UserError(f"fp16: {node.op_type} '{node.name}' chooses between graphs, which cannot be halved")
    found = measure(typed(marked, {node.name for node in nodes}), values, images, above=LARGEST)
    reasons = too_wide(marked.graph, nodes, kinds, found)
    half = typed(marked, reasons)
    names = _layer_names(marked.graph)
    kept = {names.get(node.name, node.name): reasons[node.name] for node in nodes if node.name in reasons}
    casts = {node.name for node in nodes if node.op_type == "Cast"}
    left = [
        found.largest[name] for name, kind in _kinds(half).items() if kind == TensorProto.FLOAT16 and name in values
    ]
    return half, HalfPrecision(
        images=len(images),
        largest=max(left, default=0.0),
        float32={name: why for name, why in kept.items() if name not in casts},
    )


def rounded(half: onnx.ModelProto) -> onnx.ModelProto:
    """`half` as a float32 graph that rounds every value of type float16, so that ONNX Runtime's CPU provider, which
    leaves the rounding out, gives the infinities and the noise of a processor that computes in float16."""
    kinds = _kinds(half)
    model = onnx.ModelProto()
    model.CopyFrom(half)
    graph = model.graph
    del graph.node[:], graph.value_info[:]
    for item in graph.initializer:
        if item.data_type == TensorProto.FLOAT16:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float32), item.name))
    for original in half.graph.node:
        node = _copy(original)
        _retype(node, TensorProto.FLOAT16, TensorProto.FLOAT)
        steps = [node]
        for index, name in enumerate(original.output):
            if kinds.get(name) == TensorProto.FLOAT16:
                exact, short = f"{name}_exact", f"{name}_rounded"
                node.output[index] = exact
                steps.append(helper.make_node("Cast", [exact], [short], short, to=TensorProto.FLOAT16))
                steps.append(helper.make_node("Cast", [short], [name], f"{name}_widened", to=TensorProto.FLOAT))
        graph.node.extend(steps)
    return model


def too_wide(
    graph: onnx.GraphProto, nodes: Collection[onnx.NodeProto], kinds: Mapping[str, int], found: Magnitudes
) -> dict[str, str]:
    """Name of each marked node that has to compute in float32 → why.

    These are the nodes that give or take a number that does not fit, and those that share a weight with one of them:
    a weight has one type.
    """
    constants = {name: value for name, value in constants_of(graph).items() if kinds.get(name) == MARK}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    values = _wide_values(users, constants, found)
    reasons: dict[str, str] = {}
    for node in nodes:
        for name in (*node.output, *node.input):
            if name in values:
                reasons.setdefault(node.name, f"{'its result' if name in node.output else name} {values[name]}")
        inside = found.inside.get(node.name, 0.0)
        if inside > LARGEST:
            reasons.setdefault(node.name, f"adds up {inside:.2g} inside")
    weights = {name for name, value in constants.items() if value.ndim > 1}
    for name in weights:
        together = users.get(name, [])
        if any(node.name in reasons for node in together):
            for node in together:
                reasons.setdefault(node.name, f"shares {name}")
    return reasons


def typed(marked: onnx.ModelProto, wide: Collection[str]) -> onnx.ModelProto:
    """The marked graph in float16, with the nodes named in `wide` in float32 and casts between them."""
    kinds = _kinds(marked)
    model = onnx.ModelProto()
    model.CopyFrom(marked)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    constants = {item.name: item for item in marked.graph.initializer if item.data_type == MARK}
    model.graph.initializer.extend(item for item in marked.graph.initializer if item.name not in constants)
    made: dict[str, int] = {}  # type of each marked value
    there: dict[tuple[str, int], str] = {}  # (value, type) → its name in this type

    def in_type(name: str, kind: int) -> str:
        if (name, kind) in there:
            return there[name, kind]
        first = name not in made
        result = name if first else f"{name}_{_NAMES[kind]}"
        if name in constants:
            array = _as_type(numpy_helper.to_array(constants[name]), kind)
            model.graph.initializer.append(numpy_helper.from_array(array, result))
            made.setdefault(name, kind)
        else:
            model.graph.node.append(helper.make_node("Cast", [name], [result], result, to=kind))
        there[name, kind] = result
        return result

    for original in marked.graph.node:
        node = _copy(original)
        if _marked(original, kinds):
            kind = TensorProto.FLOAT if node.name in wide else TensorProto.FLOAT16
            _retype(node, MARK, kind)
            for index, name in enumerate(node.input):
                if kinds.get(name) == MARK:
                    node.input[index] = in_type(name, kind)
            for name in node.output:
                if kinds.get(name) == MARK:
                    made[name] = kind
                    there[name, kind] = name
        model.graph.node.append(node)
    return model


# ----------------------------------------------------------------------------------------------------


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Type of every value."""
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.output, *graph.input)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {item.name: item.data_type for item in graph.initializer}


def _marked(node: onnx.NodeProto, kinds: Mapping[str, int]) -> bool:
    """A node that computes in the marked type; a Cast out of it takes any, and so does what looks at the shape."""
    if any(kinds.get(name) == MARK for name in node.output):
        return True
    return node.op_type not in ("Cast", *_SHAPES) and any(kinds.get(name) == MARK for name in node.input)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _retype(node: onnx.NodeProto, old: int, new: int) -> None:
    """Put type `new` in place of `old` in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == old:
            attribute.i = new
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == old:
            attribute.t.CopyFrom(numpy_helper.from_array(_as_type(numpy_helper.to_array(attribute.t), new)))


def _as_type(array: np.ndarray, kind: int) -> np.ndarray:
    """Rounded to a type; finite numbers beyond its end become its last one."""
    last = float(np.finfo(_TYPES[kind]).max)
    finite = np.where(np.isfinite(array), np.clip(array, -last, last), array)
    return np.asarray(finite, dtype=_TYPES[kind])


def _wide_values(
    users: Mapping[str, list[onnx.NodeProto]], constants: Mapping[str, np.ndarray], found: Magnitudes
) -> dict[str, str]:
    """The values and constants that do not fit → why."""
    largest = dict(found.largest)
    for name, value in constants.items():
        largest[name] = float(np.abs(value[np.isfinite(value)]).max(initial=0.0))
    wide = {}
    for name, top in largest.items():
        if top > LARGEST:
            wide[name] = f"reaches {top:.2g}"
        elif found.smallest.get(name, np.inf) < SMALLEST:
            wide[name] = f"is as small as {found.smallest[name]:.2g} where it divides"
        elif 0 < top < SMALLEST and not _harmless(name, users, largest, constants):
            wide[name] = f"never exceeds {top:.2g}"
        elif name in constants and top >= SMALLEST:
            value = constants[name][np.isfinite(constants[name])]
            lost = np.abs(value - value.astype(np.float16)).sum() / max(np.abs(value).sum(), 1e-300)
            if lost > ROUNDING:
                wide[name] = f"loses {lost:.1%} by rounding"
    return wide


def _harmless(
    name: str,
    users: Mapping[str, list[onnx.NodeProto]],
    largest: Mapping[str, float],
    constants: Mapping[str, np.ndarray],
) -> bool:
    """A small value that is only added to large ones, at once or after steps that leave it small."""
    if name in constants and not constants[name].ndim:
        return False  # a guard, as in x / (norm + 1e-6)
    for node in users.get(name, []):
        if node.op_type in _SHAPES:
            continue
        terms = _TERMS.get(node.op_type, ())
        top = max(largest.get(result, np.inf) for result in node.output)  # infinity: it leaves the marked part
        added = all(place in terms for place, value in enumerate(node.input) if value == name) and top >= ADDED
        small = top < SMALLEST and all(_harmless(result, users, largest, constants) for result in node.output)
        if not added and not small:
            return False
    return name in users


def _layer_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Node → the name of its layer."""
    return {node: layer.name for layer in structure_of(graph).layers for node in layer.nodes}
