"""Pictures of any size through a runner: onto the canvas of its card, and its boxes back to pixels of the pictures.

Validation, benchmarks and `deploy.Model.detect` take this one path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deploy.core.canvas import fit_canvas, to_original
from deploy.core.card import ModelCard
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.runtimes.base import DetectionBatch, Runner

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Canvases:
    """A batch for a runner.

    images: uint8 [B, 3, H, W]. scales: (sx, sy), canvas pixels per picture pixel. sizes: (height, width) of each.
    """

    images: np.ndarray
    scales: list[tuple[float, float]]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class Fitted:
    """A picture on a canvas: uint8 [3, H, W], its scale, and the (height, width) of the picture."""

    canvas: np.ndarray
    scale: tuple[float, float]
    size: tuple[int, int]


def fit_picture(pixels: np.ndarray, card: ModelCard) -> Fitted:
    """A picture uint8 [h, w, 3] RGB on a canvas of the card's input size, as the card says."""
    return Fitted(*fit_canvas(pixels, card), (int(pixels.shape[0]), int(pixels.shape[1])))


def canvases_of(fitted: Sequence[Fitted]) -> Canvases:
    """A batch of pictures that were fitted to the same canvas."""
    return Canvases(np.stack([x.canvas for x in fitted]), [x.scale for x in fitted], [x.size for x in fitted])


def fit_pictures(pictures: Sequence[np.ndarray], card: ModelCard) -> Canvases:
    """Pictures uint8 [h, w, 3] RGB on canvases of the card's input size, as the card says."""
    return canvases_of([fit_picture(picture, card) for picture in pictures])


def picture_detections(found: DetectionBatch, canvases: Canvases, card: ModelCard) -> list[Detections]:
    """The detections of each picture, in its own pixels. Those that are not finite are left out."""
    finite = finite_values(found)
    names, ids = tuple(card.class_names), tuple(card.category_ids)
    detections = []
    for i, (scale, size) in enumerate(zip(canvases.scales, canvases.sizes, strict=True)):
        kept = np.flatnonzero(finite[i, : int(found.count[i])])
        boxes = to_original(found.boxes[i, kept], scale, size)
        detections.append(Detections(boxes, found.scores[i, kept], found.labels[i, kept], names, ids))
    return detections


def detect_fitted(name: str, runner: Runner, fitted: Sequence[Fitted]) -> list[Detections]:
    """The detections of pictures that were fitted to the runner's canvas, each in its own pixels. Raises UserError,
    naming the runner, for outputs that cannot be what they are called."""
    if not fitted:
        return []
    canvases = canvases_of(fitted)
    found = runner(canvases.images)
    check_outputs(name, found, len(fitted))
    return picture_detections(found, canvases, runner.card)


def finite_values(found: DetectionBatch) -> np.ndarray:
    """Tell where score and box are finite: bool [B, D], in the places beyond `count` too."""
    finite: np.ndarray = np.isfinite(found.boxes).all(-1) & np.isfinite(found.scores)
    return finite


def check_outputs(name: str, found: DetectionBatch, batch: int) -> None:
    """Raise UserError, naming the runner and the output, when an output cannot be what it is called."""
    if not isinstance(found, DetectionBatch):
        raise UserError(f"{name}: gives a value of type {type(found).__name__}, not a DetectionBatch")
    most = found.scores.shape[1] if found.scores.ndim == 2 else -1
    shapes = {"scores": (batch, most), "boxes": (batch, most, 4), "labels": (batch, most), "count": (batch,)}
    for output, shape in shapes.items():
        value = getattr(found, output)
        integer = output in ("labels", "count")
        if value.shape != shape or np.issubdtype(value.dtype, np.integer) != integer:
            raise UserError(
                f"{name}: output '{output}' is {value.dtype} {list(value.shape)}, which cannot be {output}: its "
                "outputs are damaged or exchanged; export it again"
            )
    if not ((found.count >= 0) & (found.count <= most)).all():
        raise UserError(f"{name}: output 'count' is beyond the {most} places of an image; export it again")


def load_batches(items: Iterable[Item], load: Callable[[Item], Loaded], batch_size: int) -> Iterator[list[Loaded]]:
    """`load` of every item, in batches. Two threads load ahead (Pillow releases the lock while it decodes); never more
    than two batches are in memory."""
    with ThreadPoolExecutor(2) as pool:
        waiting = iter(items)
        ahead: deque[Future[Loaded]] = deque()
        batch: list[Loaded] = []
        done = False
        try:
            while True:
                while len(ahead) < batch_size and not done:
                    for item in waiting:
                        ahead.append(pool.submit(load, item))
                        break
                    else:
                        done = True
                if not ahead:
                    break
                batch.append(ahead.popleft().result())
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
