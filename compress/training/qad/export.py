"""The int8 file of a student that was trained on its grids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from compress.config.deploy import Deploy, Int8
from compress.detectors.base import Detector
from compress.export.deployable import Deployable
from compress.export.onnx import export_checkpoint
from compress.training.qad.fake_quant import FakeQuantized, load_quantizable
from deploy.core.card import ModelCard, card_from_file
from deploy.core.errors import UserError
from deploy.core.storage import fetch
from deploy.graph.export import ExportMismatchError
from deploy.quantize.calibrate import CalibrationImages
from deploy.quantize.file import Quantizer, QuantizeReport, dense_outputs, output_error
from deploy.quantize.grids import Grids

TOLERANCE = 0.05
"""Of `output_error` between the file and the network that was trained: kernels add in another order, so that now and
then a value falls on the other side of a rounding edge. Where rounding as a whole does more than twice that (output
layers in int8), half of what it does is allowed."""


def calibrated_grids(
    checkpoint: Path,
    settings: Deploy,
    images: CalibrationImages,
    *,
    input_size: tuple[int, int],
    resize_short_long: tuple[int, int],
    keep_float: Sequence[str] | None = None,
) -> Grids:
    """The grids of the checkpoint's int8 file after calibration; `keep_float`: see `Quantizer.graph`.

    Raises UserError for a checkpoint or images that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        export_checkpoint(
            checkpoint, file, settings, input_size=input_size, images=images.files, resize_short_long=resize_short_long
        )
        return _quantizer(file, images, settings.int8).grids(keep_float)


def quantize_trained(
    checkpoint: Path, source: Path, out: Path, settings: Deploy, images: CalibrationImages
) -> QuantizeReport:
    """Write the int8 file of `source`, the float file of a checkpoint, on the grids beside the checkpoint.

    Before the file gets its name, its scores and boxes on `images` are compared with those of the network that was
    trained. Raises UserError for files that cannot be used, ExportMismatchError when the comparison fails.
    """
    grids = load_grids(grids_file(checkpoint))
    quantizer = _quantizer(source, images, settings.int8)
    card = card_from_file(source)
    detector, _ = load_quantizable(checkpoint)
    samples = quantizer.canvases[:8]
    found = dense_outputs(quantizer.graph(trained=grids), samples)
    error, rounding = (
        output_error(_dense(model, card, samples), found) for model in (FakeQuantized(detector, grids).eval(), detector)
    )
    if any(e > TOLERANCE and e > 0.5 * r for e, r in zip(error, rounding, strict=True)):
        raise ExportMismatchError(
            f"{out.name}: off the trained network by {error[0]:.2g} of the score and {error[1]:.2g} of the boxes "
            f"(allowed {TOLERANCE:g}, or half of what rounding does: {rounding[0]:.2g}, {rounding[1]:.2g}); not "
            "written"
        )
    return quantizer.save(out, trained=grids, max_batch=settings.max_batch)


def grids_file(checkpoint: Path) -> Path:
    """`student.qad.safetensors` → `student.qad.json`."""
    return checkpoint.with_suffix(".json")


def load_grids(path: Path) -> Grids:
    """Read `student.qad.json`. Raises UserError."""
    try:
        return Grids.model_validate_json(fetch(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it is written beside the checkpoint by a run with int8.qad") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: not the grids of a run with int8.qad ({type(error).__name__})") from error


# --- details --------------------------------------------------------------------------------------------


def _dense(detector: Detector, card: ModelCard, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and boxes at every location, as `dense_outputs` gives them."""
    module = Deployable.from_card(detector, card)
    with torch.inference_mode():
        pairs = [module.dense(torch.from_numpy(image[None])) for image in images]
    scores, boxes = (np.concatenate([pair[i].numpy() for pair in pairs]) for i in range(2))
    return scores, boxes


def _quantizer(file: Path, images: CalibrationImages, settings: Int8) -> Quantizer:
    return Quantizer(file, images, settings.target, method=settings.method, reduce_range=settings.reduce_range)
