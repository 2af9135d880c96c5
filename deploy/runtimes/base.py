"""Contract of every runtime: NumPy images in, padded detections out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from deploy.core.card import Form, ModelCard
from deploy.core.errors import UserError
from deploy.core.heads import decode


@dataclass(frozen=True)
class DetectionBatch:
    """Final detections of a batch, zeros past `count`, descending score.

    boxes: float32 [B, D, 4] xyxy in pixels of the network input canvas. scores: float32 [B, D] in 0..1.
    labels: int64 [B, D], an index into the card's `class_names` and `category_ids`. count: int32 [B].
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    count: np.ndarray


class Runner(Protocol):
    """One loaded model on one backend. Calls are synchronous: the detections are in host memory on return."""

    @property
    def backend(self) -> str:
        """Name of what really runs it, for people: `onnxruntime cpu`, `torch`, …"""

    @property
    def card(self) -> ModelCard: ...

    @property
    def on_cpu(self) -> bool:
        """The network runs on the CPU, in host memory: there is nothing to copy to a device and back."""

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        """images: uint8 [B, 3, H, W] RGB canvases of the card's input size."""


@runtime_checkable
class StagedRunner(Runner, Protocol):
    """A runner whose call can be taken apart, so that a clock can stand between the steps.

    `runner(images)` is `upload(images)`, `compute()`, `fetch()`. Each returns when its work is done, on the device too.
    The steps belong to one thread.
    """

    def upload(self, images: np.ndarray) -> None:
        """Bring the images to where they are computed."""

    def compute(self) -> None:
        """Run the network on what was uploaded last; may be repeated."""

    def fetch(self) -> DetectionBatch:
        """The detections of the last `compute`, in host memory."""

    def compute_ms(self) -> float | None:
        """`compute()` once, timed by the device's own clock in milliseconds; None when the device has none (a CPU)."""


def check_images(images: np.ndarray, card: ModelCard) -> None:
    """Raise UserError unless `images` is a non-empty uint8 [B, 3, H, W] of the card's input size."""
    wanted = (3, *card.input_size)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        raise UserError(
            f"{card.name}: images must be uint8 [batch, {', '.join(map(str, wanted))}], "
            f"got {images.dtype} {list(images.shape)}"
        )


def need_card_of(path: Path, card: ModelCard, form: Form) -> None:
    """Raise UserError unless the card beside a file tells of the form that files of its runtime have."""
    if card.form != form:
        raise UserError(
            f"{path}: the card beside it is another file's: it tells of {card.form.in_words()}, "
            f"and this one has {form.in_words()}"
        )


def need_input(path: Path, card: ModelCard, shape: Sequence[int], wanted: Sequence[int | None]) -> None:
    """Raise UserError unless the file takes images of a shape, the one that its card tells of."""
    if list(shape) != list(wanted):
        raise UserError(
            f"{path}: takes images of {'x'.join(map(str, shape))}, and by its card of {'x'.join(map(str, wanted))}: "
            f"the card is another model's, {card.name}"
        )


def in_form(card: ModelCard, run: Callable[[np.ndarray], Sequence[np.ndarray]], images: np.ndarray) -> DetectionBatch:
    """Give images, uint8 [B, 3, H, W], to a file of a form, and bring what it gives into ours.

    run: (images of the form's type and batch) → boxes, scores, labels, count; of a file that ends with its output
    layers, what they give, which is decoded. A fixed batch that is not full ends in black images, whose detections are
    thrown away.
    """
    form = card.form
    images = images.astype(form.images, copy=False)
    batch = form.batch or len(images)
    pieces = []
    for first in range(0, len(images), batch):
        piece = images[first : first + batch]
        if len(piece) < batch:
            piece = np.concatenate([piece, np.zeros((batch - len(piece), *piece.shape[1:]), piece.dtype)])
        pieces.append(run(piece) if form.heads is None else decode(run(piece), card))
    boxes, scores, labels, count = (
        parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*pieces, strict=True)
    )
    most = len(images)
    return DetectionBatch(boxes[:most], scores[:most], labels[:most].astype(np.int64, copy=False), count[:most])
