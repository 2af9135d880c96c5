"""PyTorch module → deployable ONNX file, proven before it is written. The only module of `deploy` that needs
torch.

The file takes uint8 images [batch, 3, H, W] with a dynamic batch, and carries its card (`deploy.core.card`).
Before the file gets its name, it runs in ONNX Runtime on the CPU at batch 1, 2 and `max_batch` on real
images, and must agree with torch in two steps:

1. *Continuous part*: scores and boxes at every location, each within a tolerance. (For this the graph is run
once
   with its two inner values as outputs; a detector that finds nothing in the samples is compared all the
   same.)
2. *Deciding part*: torch's selection, applied to the scores and boxes that ONNX Runtime computed, must give
the
   detections that the file gives. Rounding cannot blur this comparison, because both sides start from one
   input.

A file with float16 in it is also compared as a processor computes it that rounds to float16: ONNX Runtime's CPU
provider does not, and hides what overflows (`deploy.graph.half`).
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from deploy.core.card import OUTPUTS, HalfPrecision, ModelCard
from deploy.core.errors import UserError
from deploy.core.files import atomic_path
from deploy.graph.half import halve, rounded
from deploy.graph.precision import precisions, set_card
from deploy.graph.rows import twins
from deploy.graph.session import cpu_session

_INNER = ("dense_scores", "dense_boxes")
MOST_EXCHANGED = 0.02
"""Share of the rows that a module chose by their scores which may be others in the file."""
STIRRED = 8.0
"""Tolerances that the other rows of such an image may be away: rows attend to each other, and one that was exchanged
moves all a little."""


@dataclass(frozen=True)
class ExportReport:
    """Figures of the check of an export. Differences are the largest over all locations of all sample
    images."""

    path: Path
    size_bytes: int
    opset: int
    batches: tuple[int, ...]
    images: int
    max_score_difference: float
    max_box_difference_px: float
    detections: int
    """How many final detections were compared; 0 when the detector finds nothing in the samples."""
    matched: float
    """Share of them that the file gives too."""
    seconds: float
    half: HalfPrecision | None = None
    """What was measured for float16; None: there is none in the file."""


class ExportMismatchError(RuntimeError):
    """The exported graph does not compute what the module computes. No file was written."""


def export_onnx(
    module: nn.Module,
    card: ModelCard,
    path: Path,
    *,
    samples: np.ndarray,
    reference: nn.Module | None = None,
    measured_on: np.ndarray | None = None,
    max_batch: int = 8,
    opset: int = 20,
    score_tolerance: float = 1e-3,
    box_tolerance_px: float = 0.25,
) -> ExportReport:
    """Export `module` to `path`, compare, and only then give the file its name.

    `module` has two methods: `dense(images uint8 [B,3,H,W]) -> (scores [B,A,K], boxes [B,A,4])` and
    `select(scores, boxes) -> (boxes, scores, labels, count)`; the file computes one after the other. It is
    put in eval mode. Its attribute `chooses_rows`, if it is true, says that the A rows are not places but what it
    chose by their scores: rounding may then exchange them, and rows are compared with the nearest. `samples`: real
    images uint8 [N, 3, H, W] of the card's input size, N ≥ 1, repeated up to `max_batch` when there are fewer.
    `reference`: what the file is compared with, by default `module`.
    `measured_on`: more such images, for a module that is marked for half precision: its numbers are measured on them.

    Raises UserError for wrong samples, ExportMismatchError when the file disagrees with the module. In both
    cases nothing is left at `path`, or what was there before stays.
    """
    start = time.perf_counter()
    _check_samples(samples, card)
    images = np.ascontiguousarray(samples[np.arange(max(max_batch, 2)) % len(samples)])
    module.eval()
    model, half = _convert(module, images[:2], opset), None
    if measured_on is not None:
        _check_samples(measured_on, card)
        model, half = halve(model, measured_on)
    set_card(model, card.model_copy(update={"precision": precisions(model), "half": half}))
    model.producer_name = "compress-detectors"

    batches = tuple(sorted({1, 2, max_batch}))
    inner = cpu_session(model.SerializeToString())
    as_computed = None if half is None else cpu_session(rounded(model).SerializeToString())
    reference = module if reference is None else reference.eval()
    del model.graph.output[len(OUTPUTS) :]
    onnx.checker.check_model(model)
    with atomic_path(Path(path)) as temporary:
        onnx.save(model, str(temporary))
        final = cpu_session(str(temporary))
        expected = _dense(reference, images)
        tolerances = (score_tolerance, box_tolerance_px)
        measured = _compare(reference, inner, final, images, batches, expected, tolerances)
        if as_computed is not None:
            found = as_computed.run(list(_INNER), {"images": images})
            wider = (2 * score_tolerance, 2 * box_tolerance_px)  # each step rounds, not the weights alone
            where = "rounded to float16 as on a GPU"
            scores, boxes = _differences(_in_order(reference, found, expected, wider, where), expected, wider, where)
            measured["max_score_difference"] = max(measured["max_score_difference"], scores)
            measured["max_box_difference_px"] = max(measured["max_box_difference_px"], boxes)
    return ExportReport(
        path=Path(path),
        size_bytes=Path(path).stat().st_size,
        opset=opset,
        batches=batches,
        images=min(len(samples), len(images)),
        half=half,
        seconds=time.perf_counter() - start,
        **measured,
    )


# ----------------------------------------------------------------------------------------------------


class _Probed(nn.Module):
    """The deployable outputs, then the inner values that the comparison wants to see."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        scores, boxes = self.module.dense(images)
        return (*self.module.select(scores, boxes), scores, boxes)


def _check_samples(samples: np.ndarray, card: ModelCard) -> None:
    wanted = (3, *card.input_size)
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[1:] != wanted or not len(samples):
        raise UserError(
            f"{card.name}: export needs at least one sample image, uint8 [N, {', '.join(map(str, wanted))}], "
            f"got {samples.dtype} {list(samples.shape)}"
        )


def _convert(module: nn.Module, images: np.ndarray, opset: int) -> onnx.ModelProto:
    """Trace with a batch of two, because a batch of one would be taken for a constant."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    batch = torch.export.Dim("batch", min=1)
    probed = _Probed(module).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            probed,
            (torch.from_numpy(images).to(device),),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=[*OUTPUTS, *_INNER],
            verbose=False,
        )
    assert program is not None  # it is None only when a file name is given
    model = program.model_proto
    _strip(model)
    _name_transposed(model.graph, probed)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes (Python stack traces with local paths on every node): they have no use
    here."""
    del model.graph.value_info[:]
    for owner in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del owner.metadata_props[:]
        owner.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]


def _name_transposed(graph: onnx.GraphProto, module: nn.Module) -> None:
    """Call the weights of matrix products, which the exporter stores transposed under a number, as the module does."""
    names: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            transposed = parameter.detach().T.contiguous().cpu().numpy()
            names.setdefault((transposed.shape, transposed.tobytes()), name)
    taken = {item.name for item in graph.initializer}
    renamed: dict[str, str] = {}
    for item in graph.initializer:
        key = (tuple(item.dims), onnx.numpy_helper.to_array(item).tobytes() if len(item.dims) == 2 else b"")
        name = names.get(key, "")
        if name and item.name not in names.values() and name not in taken:
            renamed[item.name] = item.name = name
            taken.add(name)
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value in renamed:
                node.input[index] = renamed[value]


@torch.no_grad()
def _dense(module: Any, images: np.ndarray) -> list[np.ndarray]:
    """Scores and boxes at every location, from torch, two images at a time."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    halves = [module.dense(torch.from_numpy(part).to(device)) for part in np.array_split(images, len(images) // 2)]
    return [torch.cat([half[i] for half in halves]).float().cpu().numpy() for i in range(2)]


@torch.no_grad()
def _compare(
    module: Any,
    inner: Any,
    final: Any,
    images: np.ndarray,
    batches: tuple[int, ...],
    expected: list[np.ndarray],
    tolerances: tuple[float, float],
) -> dict[str, Any]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    largest = (0.0, 0.0)
    total = matched = 0
    for batch in batches:
        feed = {"images": images[:batch]}
        found = inner.run(list(_INNER), feed)
        wanted = [value[:batch] for value in expected]
        where = f"batch {batch}"
        differences = _differences(_in_order(module, found, wanted, tolerances, where), wanted, tolerances, where)
        largest = (max(largest[0], differences[0]), max(largest[1], differences[1]))
        selected = module.select(*(torch.from_numpy(value).to(device) for value in found))
        pairs = _match(final.run(list(OUTPUTS), feed), [value.cpu().numpy() for value in selected])
        total, matched = total + pairs[0], matched + pairs[1]
    share = matched / total if total else 1.0
    if share < 0.99:  # equal scores may be ordered in two ways, and that is rare
        raise ExportMismatchError(f"only {matched} of {total} detections of the ONNX graph equal torch's")
    return {
        "max_score_difference": largest[0],
        "max_box_difference_px": largest[1],
        "detections": total,
        "matched": share,
    }


def _in_order(
    module: Any, found: list[np.ndarray], expected: list[np.ndarray], tolerances: tuple[float, float], where: str
) -> list[np.ndarray]:
    """`found` with the rows of each image in the order of `expected`, where the module chooses its rows.

    A row that was just good enough to be chosen may be another one here. So up to `MOST_EXCHANGED` rows of an image may
    have no twin, if neither they nor the rows in their places are among the better half, and then the others may be
    `STIRRED`; both are taken as expected.
    Raises ExportMismatchError for more, and for others.
    """
    if not getattr(module, "chooses_rows", False) or found[0].shape != expected[0].shape:
        return found
    _check_finite(found, where)
    ordered = [value.copy() for value in found]
    for image, (scores, boxes) in enumerate(zip(*found, strict=True)):
        wanted = expected[0][image], expected[1][image]
        partner = twins((scores, boxes), wanted, tolerances, within=1.0)
        stirred = np.flatnonzero(partner < 0)
        partner = twins((scores, boxes), wanted, tolerances, within=STIRRED)
        apart = np.flatnonzero(partner < 0)
        if not len(apart):  # nothing was exchanged, so nothing excuses the distance
            apart = stirred
        stirred = np.union1d(stirred, apart)
        instead = np.setdiff1d(np.arange(len(partner)), partner)
        most = max(3, int(MOST_EXCHANGED * len(partner)))
        best = max([*wanted[0][apart].max(-1), *scores[instead].max(-1)], default=0.0)
        if len(apart) > most or best > np.median(wanted[0].max(-1)):
            raise ExportMismatchError(
                f"{where}: {len(apart)} of {len(partner)} rows that the ONNX graph chose are not torch's, the best "
                f"with a score of {best:.2g} (allowed: {most}, of the lower half); a network that has hardly learned "
                "scores all places alike, and rounding chooses others: train it longer"
            )
        for value, like, kept in zip(ordered, wanted, (scores, boxes), strict=True):
            value[image] = kept[partner]
            value[image, stirred] = like[stirred]
    return ordered


def _check_finite(found: list[np.ndarray], where: str) -> None:
    for name, value in zip(_INNER, found, strict=True):
        if not np.isfinite(value).all():
            raise ExportMismatchError(f"{where}: {name} holds values that are not finite")


def _differences(
    found: list[np.ndarray], expected: list[np.ndarray], tolerances: tuple[float, float], where: str
) -> tuple[float, float]:
    """Largest difference of the scores, and of the boxes in pixels. Raises ExportMismatchError beyond `tolerances`."""
    for name, value, wanted in zip(_INNER, found, expected, strict=True):
        if value.shape != wanted.shape:
            raise ExportMismatchError(f"{where}: {name} is {value.shape}, torch's {wanted.shape}")
    _check_finite(found, where)
    scores, boxes = (float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    if scores > tolerances[0] or boxes > tolerances[1]:
        raise ExportMismatchError(
            f"{where}: the ONNX graph is off torch by {scores:.2g} in score (allowed {tolerances[0]:g}) and "
            f"{boxes:.2g} px in boxes (allowed {tolerances[1]:g})"
        )
    return scores, boxes


def _match(found: list[np.ndarray], wanted: list[np.ndarray]) -> tuple[int, int]:
    """(detections on the longer side, those that have a twin on the other), summed over the images."""
    total = matched = 0
    for image in range(len(wanted[3])):
        n, m = int(found[3][image]), int(wanted[3][image])
        total += max(n, m)
        free = np.ones(n, dtype=bool)
        for k in range(m):
            twin = (
                free
                & (found[2][image, :n] == wanted[2][image, k])
                & (np.abs(found[1][image, :n] - wanted[1][image, k]) <= 1e-5)
                & (np.abs(found[0][image, :n] - wanted[0][image, k]) <= 1e-2).all(-1)
            )
            if twin.any():
                free[int(twin.argmax())] = False
                matched += 1
    return total, matched
