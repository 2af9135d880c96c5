"""LiteRT, once TensorFlow Lite: Android and small Arm boards. By onnx2tf, with a card beside the file.

onnx2tf fixes the versions of all that it needs, NumPy and onnx among them, so it has an environment of its own and is
called as a command. It wants shapes that are constants, and fetches pictures from the network unless it finds some.
Python decides which one pip finds: 1.29, which needs TensorFlow and minutes, below 3.12; else 2.6, which needs neither,
but stores a weight once for each use.

Of the QuantizeLinear nodes of our int8 files 1.29 makes a file that finds nothing, and 2.6 one that LiteRT cannot load.
LiteRT's own quantizer takes the float file: weights in int8 with a scale a channel; the activations of a convolution
are quantized while it is computed, with the range they have then, so no calibration takes part.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import numpy as np

from deploy.core.card import scanned_card, write_card_beside
from deploy.core.errors import UserError
from deploy.core.files import work_folder
from deploy.core.import_path import import_extra
from deploy.runtimes.litert import FORM
from deploy.targets.converter import convert

CONVERTER = "onnx2tf"
INSTALL = f"pipx install {CONVERTER}"
QUANTIZED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_PICTURES = "calibration_image_sample_data_20x128x128x3_float32.npy"
"""The name under which onnx2tf looks for pictures before it asks the network. It compares its own steps on them."""


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    card = scanned_card(source)
    quantized = card.quantization is not None
    command = shutil.which(CONVERTER)
    if command is None:
        raise UserError(f"{CONVERTER} is not on PATH; it needs an environment of its own: {INSTALL}")
    if quantized:
        import_extra("ai_edge_quantizer", "litert", "ai-edge-quantizer")  # before the conversion, which takes minutes
        from deploy.targets.own_int8 import float_beside, quantized_card

        source = float_beside(source, card, "LiteRT")
        card = quantized_card(source, "litert", "dynamic")
    from deploy.graph.form import reform

    with work_folder(place) as folder:
        reform(source, folder / "model.onnx", FORM)
        np.save(folder / _PICTURES, np.random.default_rng(0).random((20, 128, 128, 3), np.float32))
        words = [command, "-i", "model.onnx", "-o", "made", "-osd", "-n"]
        written = folder / "made" / "model_float32.tflite"
        convert(source, words, CONVERTER, folder, written)
        _share_weights(written)
        if quantized:
            _quantize(written, place)
        else:
            os.replace(written, place)
    write_card_beside(card.model_copy(update={"form": FORM}), place)
    return f"{place.stat().st_size / 1e6:.1f} MB, with its card {place.name}.json; one image at a time"


# --- details --------------------------------------------------------------------------------------------


def _share_weights(file: Path) -> None:
    """Store weights that are equal once: a head that five levels share has one of each, not five."""
    flatbuffers = import_extra("flatbuffers", "litert")
    schema = import_extra("ai_edge_litert.schema_py_generated", "litert", "ai-edge-litert")
    model = schema.ModelT.InitFromPackedBuf(bytearray(file.read_bytes()), 0)
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    first: dict[bytes, int] = {}
    for tensor in tensors:
        held = model.buffers[tensor.buffer].data
        if held is not None and len(held):
            tensor.buffer = first.setdefault(bytes(held), tensor.buffer)
    used = {tensor.buffer for tensor in tensors} | {entry.buffer for entry in model.metadata or []}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None
    builder = flatbuffers.Builder(file.stat().st_size)
    builder.Finish(model.Pack(builder), b"TFL3")
    file.write_bytes(builder.Output())


def _quantize(source: Path, place: Path) -> None:
    """Write the .tflite file at `source` with its convolutions and matrix products in int8."""
    module = import_extra("ai_edge_quantizer.quantizer", "litert", "ai-edge-quantizer")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it shows its progress
        quantizer = module.Quantizer(str(source))
        for kind in QUANTIZED:
            quantizer.add_dynamic_config(regex=".*", operation_name=kind, num_bits=8)
        place.write_bytes(quantizer.quantize().quantized_model)
