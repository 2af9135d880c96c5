"""Runners over many pictures, each of which is read once: in this process, or on a Ray cluster.

`detect_all` does it here; `detect_on` makes the same function with actors of a cluster behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.core.on_ray import Cluster, map_in_order
from deploy.core.progress import Progress
from deploy.runtimes.base import Runner
from deploy.runtimes.pictures import (
    Canvases,
    Fitted,
    canvases_of,
    check_outputs,
    finite_values,
    fit_picture,
    fit_pictures,
    load_batches,
    picture_detections,
)
from deploy.validate.collected import Collected


@dataclass
class Outcome:
    """Answers of one runner for all images, by their ids."""

    detections: Collected = field(default_factory=Collected)
    """The finite ones, in pixels of the original images."""
    spoiled: list[int] = field(default_factory=list)
    """Images where the runner also gave values that are not finite."""
    seconds: float = 0.0
    """Time spent in the runner, in all processes together."""

    def extend(self, other: Outcome) -> None:
        """Take in the answers for further images."""
        self.detections.extend(other.detections)
        self.spoiled += other.spoiled
        self.seconds += other.seconds


Detect = Callable[..., dict[str, Outcome]]
"""What takes and gives what `detect_all` does."""


def detect_all(
    runners: Mapping[str, Runner],
    files: Mapping[int, Path],
    batch_size: int,
    progress: Progress | None = None,
    *,
    sizes: Mapping[int, tuple[int, int]] | None = None,
) -> dict[str, Outcome]:
    """Run every runner over the same images (id → file), each of which is decoded once, and laid once on each kind of
    canvas that the runners take, while they run on those before it.

    sizes: (height, width) that the images must have, of those where it is known.

    Raises UserError for an image that cannot be read or is of another size, and for outputs that cannot be what they
    are called.
    """
    outcomes = {name: Outcome() for name in runners}
    known = {} if sizes is None else sizes
    cards = {_canvas_of(runner.card): runner.card for runner in runners.values()}

    def load(item: tuple[int, Path]) -> tuple[int, dict[_Canvas, Fitted]]:
        pixels = load_image(item[1])
        (height, width), wanted = pixels.shape[:2], known.get(item[0])
        if wanted is not None and (height, width) != wanted:
            raise UserError(
                f"{item[1]}: the file is {width}x{height} pixels, the annotations say {wanted[1]}x{wanted[0]}; "
                "their boxes are of another picture"
            )
        return item[0], {canvas: fit_picture(pixels, card) for canvas, card in cards.items()}

    done = 0
    for batch in load_batches(files.items(), load, batch_size):
        together = {canvas: canvases_of([fitted[canvas] for _, fitted in batch]) for canvas in cards}
        for name, runner in runners.items():
            canvases = together[_canvas_of(runner.card)]
            start = time.perf_counter()
            found = runner(canvases.images)
            outcomes[name].seconds += time.perf_counter() - start
            check_outputs(name, found, len(batch))
            finite = np.asarray(finite_values(found).all(-1))
            for i, detections in enumerate(picture_detections(found, canvases, runner.card)):
                image_id = batch[i][0]
                outcomes[name].detections.add(image_id, detections)
                if not finite[i]:
                    outcomes[name].spoiled.append(image_id)
        done += len(batch)
        if progress is not None:
            progress(done, len(files))
    return outcomes


def detect_on(cluster: Cluster, open: Callable[[], Mapping[str, Runner]]) -> Detect:
    """`detect_all` on a Ray cluster, whose nodes see all files under the same names.

    open: makes the runners, all of them under their names, in each actor; picklable.
    """

    def detect(
        runners: Iterable[str],
        files: Mapping[int, Path],
        batch_size: int,
        progress: Progress | None = None,
        *,
        sizes: Mapping[int, tuple[int, int]] | None = None,
    ) -> dict[str, Outcome]:
        known = {} if sizes is None else sizes
        outcomes = {name: Outcome() for name in runners}
        size = max(1, cluster.images // batch_size) * batch_size
        pending, pieces = iter(files.items()), []
        while part := dict(islice(pending, size)):
            pieces.append(_Piece(part, {image: known[image] for image in part if image in known}))
        done = 0
        for piece, found in zip(pieces, map_in_order(cluster, partial(_Actor, open, batch_size), pieces), strict=True):
            for name, outcome in outcomes.items():
                outcome.extend(found[name])
            done += len(piece.files)
            if progress is not None:
                progress(done, len(files))
        return outcomes

    return detect


def prepare(path: Path, card: ModelCard) -> tuple[np.ndarray, Canvases]:
    """Read one picture and lay it on the canvas of a card, as `detect_all` does: pixels uint8 [h, w, 3], and canvas."""
    pixels = load_image(path)
    return pixels, fit_pictures([pixels], card)


# --- details --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Some of the images, by id: files, and (height, width) where that is known."""

    files: Mapping[int, Path]
    sizes: Mapping[int, tuple[int, int]]


class _Actor:
    """Runners of its own, for pieces of the images."""

    def __init__(self, open: Callable[[], Mapping[str, Runner]], batch_size: int) -> None:
        self._runners, self._batch_size = open(), batch_size

    def __call__(self, piece: _Piece) -> dict[str, Outcome]:
        return detect_all(self._runners, piece.files, self._batch_size, sizes=piece.sizes)


_Canvas = tuple[tuple[int, int], tuple[int, int, int], int | None, int | None]


def _canvas_of(card: ModelCard) -> _Canvas:
    """All that `fit_canvas` looks at: cards that agree in it share their canvases."""
    return card.input_size, card.pad_color, card.short, card.long
