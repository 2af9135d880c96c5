"""A float ONNX file → a calibrated int8 ONNX file with a true card, checked before it gets its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from deploy.core.boxes import iou
from deploy.core.card import METADATA_KEY, Quantization, need_plain, parse_card
from deploy.core.environment import integer_dot_product
from deploy.core.errors import UserError
from deploy.core.files import atomic_path
from deploy.graph.precision import precisions, set_card
from deploy.graph.rows import twins
from deploy.graph.session import cpu_session
from deploy.graph.structure import BOXES, SCORES, structure_of
from deploy.quantize.calibrate import CalibrationImages, Method, activation_ranges, canvases
from deploy.quantize.grids import Grids, grids_of, trained_tensors
from deploy.quantize.qdq import Target, check_format, quantize
from deploy.runtimes.onnx import OnnxRunner

TRAINED = "trained"  # method of a file whose activation grids were learned


@dataclass(frozen=True)
class QuantizeReport:
    """A quantized file. The errors are against the float file on the calibration images, see `output_error`."""

    path: Path
    size_bytes: int
    target: Target
    layers: int
    float_layers: tuple[str, ...]
    images: int
    score_error: float
    box_error: float


class Quantizer:
    """A float file with the ranges of its activations: makes int8 graphs of it that differ in their float layers.

    Raises UserError when the file cannot be read or quantized, or an image cannot be read.
    """

    def __init__(
        self,
        source: Path,
        images: CalibrationImages,
        target: Target,
        *,
        method: Method = "minmax",
        reduce_range: bool | None = None,
    ) -> None:
        """reduce_range: keep weights of `cpu` files to 7 bits; None: where this machine's instructions need it."""
        self.source, self.images, self.target, self.method = Path(source), images, target, method
        self.reduce_range = target == "cpu" and (not integer_dot_product() if reduce_range is None else reduce_range)
        self.model = _load(self.source)
        self.card = parse_card(_metadata(self.model), str(source))
        need_plain(self.card, source, "int8 files are made")
        self.structure = structure_of(self.model.graph, str(source))
        self.canvases = canvases(images.files, self.card)
        self.ranges = activation_ranges(self.model, self.canvases, method)

    def graph(self, keep_float: Collection[str] | None = None, *, trained: Grids | None = None) -> onnx.ModelProto:
        """The int8 graph with the layers named in `keep_float` in float; None: the output layers.

        trained: its activations' scales and zero points, its target, weight bits and float layers hold instead of this
        quantizer's. Raises UserError when it belongs to another detector.
        """
        keep_float = self.structure.output_names if keep_float is None else keep_float
        target, reduce_range, method, grids = self.target, self.reduce_range, str(self.method), None
        if trained is not None:
            target, reduce_range, method = trained.target, trained.weight_bits == 7, TRAINED
            keep_float = trained.float_layers
            plain = quantize(self.model, self.ranges, target, keep_float=keep_float, reduce_range=reduce_range)
            grids = trained_tensors(grids_of(plain, self.structure), trained.activations, str(self.source))
        model = quantize(self.model, self.ranges, target, keep_float=keep_float, reduce_range=reduce_range, grids=grids)
        check_format(model, target)
        kept = [layer.name for layer in self.structure.layers if layer.name in keep_float]
        quantization = Quantization(
            target=target,
            weight_bits=7 if reduce_range else 8,
            layers=len(self.structure.layers) - len(kept),
            float_layers=kept,
            method=method,
            images_sha256=self.images.sha256,
            image_hashes=[digest[:16] for digest in self.images.hashes],
        )
        set_card(model, self.card.model_copy(update={"precision": precisions(model), "quantization": quantization}))
        return model

    def grids(self, keep_float: Collection[str] | None = None) -> Grids:
        """Return the grids that training starts from: those of the activations of `graph(keep_float)`."""
        keep_float = self.structure.output_names if keep_float is None else keep_float
        return Grids(
            target=self.target,
            weight_bits=7 if self.reduce_range else 8,
            float_layers=tuple(layer.name for layer in self.structure.layers if layer.name in keep_float),
            activations=tuple(grids_of(self.graph(keep_float), self.structure).values()),
        )

    def save(
        self,
        path: Path,
        keep_float: Collection[str] | None = None,
        *,
        trained: Grids | None = None,
        guided_map_drop: float | None = None,
        max_batch: int = 8,
    ) -> QuantizeReport:
        """Write the int8 file. Before it gets its name it runs in ONNX Runtime (CPU) at batch 1, 2 and `max_batch`.

        Raises RuntimeError when a detection is not finite or depends on the batch that its image is in.
        """
        model = self.graph(keep_float, trained=trained)
        card = parse_card(_metadata(model), str(path))
        assert card.quantization is not None
        quantization = card.quantization.model_copy(update={"guided_map_drop": guided_map_drop})
        set_card(model, card.model_copy(update={"quantization": quantization}))
        onnx.checker.check_model(model)
        with atomic_path(Path(path)) as temporary:
            onnx.save(model, str(temporary))
            _check_batches(temporary, self.canvases, max_batch)
        images, chosen = self.canvases[:8], self.structure.chooses
        error = output_error(dense_outputs(self.model, images), dense_outputs(model, images), chosen=chosen)
        return QuantizeReport(
            path=Path(path),
            size_bytes=Path(path).stat().st_size,
            target=self.target if trained is None else trained.target,
            layers=quantization.layers,
            float_layers=tuple(quantization.float_layers),
            images=len(self.images.files),
            score_error=error[0],
            box_error=error[1],
        )


def dense_outputs(model: onnx.ModelProto, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, A, K] and boxes [N, A, 4] at every location of uint8 [N, 3, H, W]. Raises UserError for a graph that
    was not exported by this project."""
    produced = {name for node in model.graph.node for name in node.output}
    if not {SCORES, BOXES} <= produced:
        raise UserError(f"the graph has no values {SCORES} and {BOXES}; export it again")
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    tapped.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (SCORES, BOXES)
    )
    session = cpu_session(tapped.SerializeToString())
    parts = [session.run([SCORES, BOXES], {"images": image[None]}) for image in images]
    scores, boxes = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return scores, boxes


def output_error(
    reference: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], *, chosen: bool = False
) -> tuple[float, float]:
    """Measure how far dense outputs are apart where it matters: (score error, box error), both 0 for equal outputs.

    Score error: Σ |Δ score| / Σ score. Box error: mean of 1 − IoU over the locations, weighted by the reference's best
    score there. Locations where the reference sees nothing hardly count. chosen: rows are no places, and each is
    compared with the nearest.
    """
    if chosen:
        other = _nearest(reference, other)
    scores, boxes = reference
    score_error = np.abs(other[0] - scores).sum() / max(float(scores.sum()), 1e-12)
    weight = scores.max(-1)
    overlap = iou(boxes, other[1], empty=1.0)
    return float(score_error), float((weight * (1 - overlap)).sum() / max(float(weight.sum()), 1e-12))


# ----------------------------------------------------------------------------------------------------


def _nearest(
    reference: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `other` in the order of `reference`, image by image; a tenth of score weighs as much as 16 pixels."""
    images = zip(zip(*other, strict=True), zip(*reference, strict=True), strict=True)
    orders = [twins(found, wanted, (0.1, 16.0)) for found, wanted in images]
    scores, boxes = (np.stack([part[order] for part, order in zip(value, orders, strict=True)]) for value in other)
    return scores, boxes


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's errors have no common class
        raise UserError(f"{path}: not a readable ONNX file: {' '.join(str(error).split())}") from error


def _metadata(model: onnx.ModelProto) -> str | None:
    found: Mapping[str, str] = {item.key: item.value for item in model.metadata_props}
    return found.get(METADATA_KEY)


def _check_batches(path: Path, images: np.ndarray, max_batch: int) -> None:
    """Integer arithmetic does not depend on the batch; what stays in float may round differently."""
    runner = OnnxRunner(path)
    single = [runner(image[None]) for image in images[:max_batch]]
    for batch in sorted({1, 2, max_batch}):
        chosen = np.arange(batch) % len(single)
        found = runner(images[chosen])
        if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
            raise RuntimeError(f"{path.name}: batch {batch}: detections that are not finite")
        for row, index in enumerate(chosen):
            if not np.allclose(found.scores[row, :10], single[index].scores[0, :10], atol=0.02):
                raise RuntimeError(f"{path.name}: batch {batch}: other scores than at batch 1")
