"""Other forms of an exported file, for runtimes that cannot take it as it is: a fixed batch, int32 labels, float input.

    reform(Path("student.onnx"), Path("student.static.onnx"), Form(batch=1, labels="int32", images="float32"))

The graph computes the same: before the file gets its name, its answers are compared with those of the file that it was
made from, to the bit, each node computed as it stands; what a runtime fuses may round otherwise. The card says the
form, and the runners of this package take it into account.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploy.core.card import OUTPUTS, Form, ModelCard, need_plain, scanned_card
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, need_other, work_folder
from deploy.graph.precision import set_card
from deploy.graph.session import cpu_session
from deploy.graph.structure import BOXES, SCORES, WEIGHTED

_ROUNDING = ["ConvMulFusion", "ConvAddFusion", "ConvBNFusion"]
"""Steps of ONNX Runtime that change weights, and so the last bit of what comes out."""
_COMPARED = 4
"""Pictures of noise that the two files are compared on, at least: every place of every level takes part."""


def reform(source: Path, out: Path, form: Form) -> ModelCard:
    """Write the exported file at `source` in another form to `out`. Returns its card.

    Raises UserError as `formed` does, and where `out` is `source`: nothing is written then.
    """
    need_other(out, source)
    model, card = formed(source, form)
    del model.graph.output[len(OUTPUTS) :]
    write_graph(model, card, out)
    return card


def formed(source: Path, form: Form) -> tuple[onnx.ModelProto, ModelCard]:
    """The graph of the exported file at `source` in another form, and its card. Behind its outputs there are `SCORES`
    and `BOXES`, where it has them.

    Raises UserError for a file that is no exported one, or has a form already, or whose graph is not understood, and
    where the answers differ.
    """
    source = Path(source)
    card = scanned_card(source)
    need_plain(card, source, "another form is made")
    plain = onnx.load(str(source))
    extend = [name for name in (SCORES, BOXES) if any(name in node.output for node in plain.graph.node)]
    plain.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extend)
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    if form.images == "float32":
        _take_floats(model.graph, source)
    if form.labels == "int32":
        _give_int32(model.graph)
    if form.batch is not None:
        model = _fixed(model, form.batch, source)
        if not _computes_half(model):
            halves = {part: "fp32" for part, kind in card.precision.items() if "fp16" in kind}
            card = card.model_copy(update={"precision": {**card.precision, **halves}, "half": None})
    _compare(plain, model, card.input_size, form, source)
    return model, card.model_copy(update={"form": form})


def write_graph(model: onnx.ModelProto, card: ModelCard, out: Path) -> None:
    """Write the model with this card to `out`, once it is valid and ONNX Runtime loads it."""
    set_card(model, card)
    onnx.checker.check_model(model)
    with atomic_path(Path(out)) as temporary:
        onnx.save(model, str(temporary))
        cpu_session(str(temporary))


# --- details --------------------------------------------------------------------------------------------


def _take_floats(graph: onnx.GraphProto, where: Path) -> None:
    """The input becomes float32, and the cast to it falls away."""
    graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    (name,) = (value.name for value in graph.input)
    users = [node for node in graph.node if name in node.input]
    if not users or any(node.op_type not in ("Cast", "Shape") for node in users):
        found = ", ".join(sorted({node.op_type for node in users}))
        raise UserError(f"{where}: its images go into {found}, not into a cast; export it again with compress export")
    for cast in users:
        if cast.op_type != "Cast" or next(a.i for a in cast.attribute if a.name == "to") != TensorProto.FLOAT:
            continue
        for node in graph.node:
            for index, value in enumerate(node.input):
                if value == cast.output[0]:
                    node.input[index] = name
        graph.node.remove(cast)


def _give_int32(graph: onnx.GraphProto) -> None:
    """A cast behind the labels."""
    wide = "labels_int64"
    for node in graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if value == "labels":
                    values[index] = wide
    graph.node.append(helper.make_node("Cast", [wide], ["labels"], name="labels_as_int32", to=TensorProto.INT32))
    (labels,) = (value for value in graph.output if value.name == "labels")
    labels.type.tensor_type.elem_type = TensorProto.INT32


def _fixed(model: onnx.ModelProto, batch: int, where: Path) -> onnx.ModelProto:
    """The batch is a constant, and so is every shape that was computed from it (ONNX Runtime folds them)."""
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.HasField("shape") and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_value = batch
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with work_folder() as folder:
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=_ROUNDING
        )
        folded = onnx.load(options.optimized_model_filepath)
    del folded.graph.value_info[:]
    computed = sorted({node.op_type for node in folded.graph.node} & {"Shape", "Size"})
    foreign = sorted({node.domain for node in folded.graph.node} - {"", "ai.onnx"})
    if computed or foreign:
        raise UserError(f"{where}: its shapes cannot be fixed: {', '.join([*computed, *foreign])} remain in the graph")
    del folded.opset_import[:]
    folded.opset_import.extend(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return folded


def _computes_half(model: onnx.ModelProto) -> bool:
    """Whether a layer takes float16. ONNX Runtime has no such layers on most CPUs, and writes a cast before each where
    it fixes shapes: what is left of a float16 file is weights that are stored so."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    return any(node.input[0] in halves for node in graph.node if node.op_type in WEIGHTED)


def _compare(plain: Any, formed: Any, size: tuple[int, int], form: Form, where: Path) -> None:
    """Raise UserError unless both give the same on pictures of noise, to the bit."""
    batch = form.batch or 2
    noise = np.random.default_rng(0).integers(0, 256, (max(1, _COMPARED // batch), batch, 3, *size), np.uint8)
    sessions = [cpu_session(model.SerializeToString(), as_written=True) for model in (plain, formed)]
    names = [value.name for value in plain.graph.output]
    for images in noise:
        given = images.astype(form.images)
        wanted, found = (
            session.run(names, {"images": value}) for session, value in zip(sessions, (images, given), strict=True)
        )
        for name, a, b in zip(names, wanted, found, strict=True):
            if a.shape != b.shape or not np.array_equal(a, b):
                raise UserError(f"{where}: {name} of the file in another form is not the same; nothing was written")
