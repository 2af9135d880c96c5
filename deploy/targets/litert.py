"""LiteRT, once TensorFlow Lite: Android, microcontrollers, Edge TPUs. By onnx2tf, with a card beside the file.

onnx2tf fixes the versions of all that it needs, NumPy and onnx among them, so it has an environment of its own and is
called as a command. It wants shapes that are constants, and fetches pictures from the network unless it finds some.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from deploy.core.card import Form, network_precision, scanned_card, write_card_beside
from deploy.core.errors import UserError
from deploy.targets.converter import convert

CONVERTER = "onnx2tf"
INSTALL = f"pipx install {CONVERTER}"
_PICTURES = "calibration_image_sample_data_20x128x128x3_float32.npy"
"""The name under which onnx2tf looks for pictures before it asks the network. It compares its own steps on them."""


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    card = scanned_card(source)
    _refuse_others(network_precision(card.precision), source)
    command = shutil.which(CONVERTER)
    if command is None:
        raise UserError(f"{CONVERTER} is not on PATH; it needs an environment of its own: {INSTALL}")
    from deploy.graph.form import reform

    with tempfile.TemporaryDirectory() as folder:
        form = Form(batch=1)
        card = reform(source, Path(folder) / "model.onnx", form)
        np.save(Path(folder) / _PICTURES, np.random.default_rng(0).random((20, 128, 128, 3), np.float32))
        words = [command, "-i", "model.onnx", "-o", "made", "-osd", "-n"]
        written = Path(folder) / "made" / "model_float32.tflite"
        convert(source, words, CONVERTER, Path(folder), written)
        shutil.move(written, place)
    write_card_beside(card, place)
    return f"{place.stat().st_size / 1e6:.1f} MB, with its card {place.name}.json; one image at a time"


def _refuse_others(precision: str, source: Path) -> None:
    if precision != "fp32":
        raise UserError(
            f"{source}: is {precision}, and {CONVERTER} makes a file of it that finds nothing (seen with 1.29): give "
            "the fp32 file"
        )
