"""The network alone: an exported file cut at its output layers, for runtimes that cannot compute what comes behind.

    cut_heads(Path("student.onnx"), Path("student.heads.onnx"))

It takes one image, float32 [1, 3, H, W] of 0 to 255, has constant shapes, and gives class logits and box sides of each
level, `deploy.core.card.Heads` says which. How they are coded is found by decoding: what `deploy.core.heads` makes of
them must be what the whole graph computes, or the file is refused.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploy.core.card import OUTPUTS, Form, Heads, ModelCard, need_plain, network_precision, scanned_card
from deploy.core.errors import UserError
from deploy.core.files import need_other
from deploy.core.heads import dense, select
from deploy.graph.form import formed, write_graph
from deploy.graph.session import cpu_session
from deploy.graph.structure import BOXES, SCORES, needed_for, structure_of

_SCORE, _BOX_PX = 1e-5, 1e-3
"""How far what is decoded may be from what the graph computes: other orders of adding, in float32."""
_LEAST = 0.01
"""Lower scores are counted as this: a root, as FCOS takes, widens what runtimes round away near 0."""
_PLACES: tuple[dict[str, Any], ...] = tuple(
    {"offset": offset, "fitted": fitted} for offset in (0.0, 0.5) for fitted in (False, True)
)
"""Where the places of a level may be."""


def cut_heads(source: Path, out: Path) -> ModelCard:
    """Write the network of the exported file at `source` to `out`. Returns its card, whose `form.heads` says what the
    outputs are.

    Raises UserError for a file that is no exported one, has a form already or a network in half precision, of a
    detector with queries or anchors, or with boxes that are coded in a way that is not known: nothing is written then.
    """
    source = Path(source)
    need_other(out, source)
    card = scanned_card(source)
    if "16" in (precision := network_precision(card.precision)):
        raise UserError(f"{source}: is {precision}; its network alone would compute in fp32: give the fp32 file")
    need_plain(card, source, "a network is cut")
    plain = onnx.load(str(source)).graph
    structure = structure_of(plain, str(source))
    if structure.chooses or not {SCORES, BOXES} <= {name for node in plain.node for name in node.output}:
        why = "its network chooses among its own queries" if structure.chooses else "no dense scores and boxes in it"
        raise UserError(f"{source}: cannot be cut at its output layers: {why}; gfl and fcos students can be")
    whole, card = formed(source, Form(batch=1, images="float32"))
    ends = [_followed(whole.graph, end) for end in structure.ends]
    images = _noise(card)
    session = cpu_session(_with_outputs(whole, [*ends, SCORES, BOXES]), as_written=True)
    values = [dict(zip([*ends, SCORES, BOXES], session.run(None, {"images": image}), strict=True)) for image in images]
    levels = _levels(whole.graph, {end: values[0][end].shape for end in ends}, card, source)
    order = [name for level in levels for name in level]
    heads = _decoded_alike(levels, order, values, card, source)
    card = card.model_copy(update={"form": card.form.model_copy(update={"heads": heads})})
    _selected_alike(whole, values[0][SCORES].shape, card, source)
    write_graph(_cut(whole, dict(zip(order, heads.names, strict=True))), card, out)
    return card


# --- details --------------------------------------------------------------------------------------------


def _noise(card: ModelCard) -> np.ndarray:
    """Two pictures of single pixels and of squares, float32 [2, 1, 3, H, W]."""
    rng, (height, width) = np.random.default_rng(0), card.input_size
    fine = rng.integers(0, 256, (1, 3, height, width))
    coarse = rng.integers(0, 256, (1, 3, -(-height // 16), -(-width // 16))).repeat(16, 2).repeat(16, 3)
    return np.stack([fine, coarse[:, :, :height, :width]]).astype(np.float32)


def _followed(graph: onnx.GraphProto, end: str) -> str:
    """The tensor behind an output layer that still belongs to the network: scaled by a factor of its level, rectified,
    in float32."""
    single = {item.name for item in graph.initializer if int(np.prod(item.dims)) == 1}
    while True:
        users = [node for node in graph.node if end in node.input]
        if len(users) != 1:
            return end
        (user,) = users
        scaled = user.op_type == "Mul" and any(name in single for name in user.input)
        if not scaled and user.op_type not in ("Relu", "Cast"):
            return end
        end = user.output[0]


def _levels(
    graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]], card: ModelCard, where: Path
) -> list[tuple[str, ...]]:
    """Class logits, box sides and, in FCOS, centerness of each level, finest first.

    shapes: of the ends, in the order of the graph, which has all class logits of FCOS before its centerness. Raises
    UserError.
    """
    classes = len(card.class_names)
    for_scores, for_boxes = (
        {name for node in needed_for(graph, [result]) for name in node.output} for result in (SCORES, BOXES)
    )
    box = [name for name in shapes if name in for_boxes and name not in for_scores]
    score = [name for name in shapes if name in for_scores and name not in for_boxes]
    kinds = [[name for name in score if shapes[name][1] == classes], box]
    if len(score) == 2 * len(box):
        kinds.append([name for name in score if shapes[name][1] == 1][-len(box) :])
        kinds[0] = kinds[0][: len(box)]
    for kind in kinds:
        kind.sort(key=lambda name: -np.prod(shapes[name][2:]))  # stable: levels of one size stay in their order
    alike = [Counter(shapes[name][2:] for name in kind) for kind in kinds]
    if not box or sum(map(len, kinds)) != len(shapes) or any(sizes != alike[0] for sizes in alike):
        channels = sorted({shape[1] for shape in shapes.values()})
        raise UserError(
            f"{where}: cannot be cut at its output layers, of {channels} channels for {classes} classes: a place has "
            "several boxes there, or they are not understood; gfl and fcos students can be"
        )
    return list(zip(*kinds, strict=True))


def _strides(sizes: list[tuple[int, ...]], canvas: tuple[int, int], where: Path) -> list[int]:
    """The stride of each level, which doubles, or is four times as much, and so on; a last place may be cut off."""
    stride, found = 1, list[int]()
    for size in sizes:
        fitting = (s for s in (stride << n for n in range(12)) if tuple(-(-side // s) for side in canvas) == size)
        stride = next((s for s in fitting if s not in found), 0)
        if not stride:
            raise UserError(f"{where}: its levels have sizes {sizes}, which fit no strides on a canvas of {canvas}")
        found.append(stride)
    return found


def _decoded_alike(
    levels: list[tuple[str, ...]], order: list[str], values: list[dict[str, Any]], card: ModelCard, where: Path
) -> Heads:
    """How the outputs are coded: by which their decoding is what the graph computes. Raises UserError."""
    shapes = [values[0][level[1]].shape for level in levels]
    strides = _strides([shape[2:] for shape in shapes], card.input_size, where)
    bins, rest = divmod(shapes[0][1], 4)
    worst = (np.inf, np.inf)
    for places in _PLACES if bins and not rest else ():
        heads = Heads(strides=strides, bins=bins, centerness=len(levels[0]) == 3, **places)
        apart = [_apart(dense([found[name] for name in order], heads, card.input_size), found) for found in values]
        worst = min(worst, (max(score for score, _ in apart), max(box for _, box in apart)), key=lambda pair: pair[1])
        if all(score <= _SCORE and box <= _BOX_PX for score, box in apart):
            return heads
    raise UserError(
        f"{where}: cannot be cut at its output layers: decoded as those of gfl and fcos are, they give scores "
        f"{worst[0]:.2g} and boxes {worst[1]:.2g} px away from its own"
    )


def _apart(decoded: tuple[np.ndarray, np.ndarray], found: dict[str, Any]) -> tuple[float, float]:
    scores, boxes = decoded
    apart = np.maximum(scores, _LEAST) - np.maximum(found[SCORES][0], _LEAST)
    return float(np.abs(apart).max()), float(np.abs(boxes - found[BOXES][0]).max())


def _selected_alike(whole: onnx.ModelProto, shape: tuple[int, ...], card: ModelCard, where: Path) -> None:
    """Raise UserError unless the graph chooses detections as `select` does, of random scores and boxes."""
    rng, (height, width) = np.random.default_rng(0), card.input_size
    scores = (rng.random(shape) ** 4).astype(np.float32)
    corners = rng.random((shape[1], 2)) * (width, height)
    boxes = np.concatenate([corners, corners + rng.random((shape[1], 2)) * (width / 2, height / 2)], 1)
    boxes = np.clip(boxes, 0, [width, height] * 2).astype(np.float32)
    before = needed_for(whole.graph, [SCORES, BOXES])
    rest = onnx.ModelProto()
    rest.CopyFrom(whole)
    del rest.graph.node[:], rest.graph.input[:], rest.graph.output[len(OUTPUTS) :]
    names = {node.name for node in before}
    rest.graph.node.extend(node for node in whole.graph.node if node.name not in names)
    for name, given in ((SCORES, shape), (BOXES, (1, *boxes.shape))):
        rest.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, given))
    session = cpu_session(rest.SerializeToString(), as_written=True)
    wanted = session.run(list(OUTPUTS), {SCORES: scores, BOXES: boxes[None]})
    if not all(np.array_equal(a, b) for a, b in zip(wanted, select(scores[0], boxes, card), strict=True)):
        raise UserError(f"{where}: it chooses detections in a way of its own, so that its network alone is of no use")


def _with_outputs(model: onnx.ModelProto, names: list[str]) -> bytes:
    """The model with these values as its outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return changed.SerializeToString()


def _cut(whole: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """The part of the graph that computes the tensors `names`, by the names that they are to have."""
    cut = onnx.ModelProto()
    cut.CopyFrom(whole)
    graph = cut.graph
    nodes = needed_for(whole.graph, names)
    used = {name for node in nodes for name in node.input}
    del graph.node[:], graph.output[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(item for item in whole.graph.initializer if item.name in used)
    for node in graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = names.get(name, name)
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    inferred = onnx.shape_inference.infer_shapes(_named(cut, list(names.values())))
    graph.output.extend(inferred.graph.output)
    return cut


def _named(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    return onnx.load_from_string(_with_outputs(model, names))
