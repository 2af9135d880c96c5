"""Sources through a detector, frame by frame: pictures are loaded ahead, and never more than two batches are held."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.predict.lookers import Looker
from deploy.predict.sources import Frame, Source
from deploy.runtimes.pictures import load_batches
from deploy.serve.client import ServerError

BATCH = 8


@dataclass(frozen=True)
class Seen:
    """A frame and what was found in it. problem: why it could not be looked at; then there are no pixels, and
    nothing was found.

    pixels: uint8 [h, w, 3] RGB, upright.
    """

    frame: Frame
    pixels: np.ndarray
    detections: Detections
    problem: str | None = None


def look(
    looker: Looker,
    sources: Sequence[Source],
    *,
    min_score: float | None = None,
    classes: Collection[str] | None = None,
    batch_size: int = BATCH,
) -> Iterator[Seen]:
    """Every frame of the sources in their order, as `looker` sees it.

    Args:
        min_score: detections below it are left out. None: the operating point of the model, `card.shown_score`.
        classes: names of those that are kept; None: all.
        batch_size: pictures in one call; of a live source one.

    A picture that cannot be read, or is refused, is seen with its `problem`, and the others go on; so does the next
    source after a video that breaks off.

    Raises UserError for a class that the model does not know and a batch of none, ServerError for a server that is
    gone.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if min_score is not None and not (isinstance(min_score, int | float) and 0 <= min_score <= 1):
        raise UserError(f"min_score: a number from 0 to 1, got {min_score!r}")
    names = looker.card.class_names
    if unknown := [name for name in classes or () if name not in names]:
        raise UserError(f"no class is called {unknown[0]}: the model knows {_some(names)}")
    kept = None if classes is None else [label for label, name in enumerate(names) if name in classes]
    score = looker.card.shown_score if min_score is None else min_score
    return _look(looker, sources, score, kept, batch_size)


# --- details --------------------------------------------------------------------------------------------


def _look(
    looker: Looker, sources: Sequence[Source], score: float, kept: Sequence[int] | None, batch_size: int
) -> Iterator[Seen]:
    for group, size in _groups(sources, batch_size):
        for batch in load_batches(_frames(group), lambda frame: _load(looker, frame), size):
            found = iter(looker.finish([one.prepared for one in batch if one.problem is None]))
            for one in batch:
                detections = next(found) if one.problem is None else _nothing(looker)
                chosen = detections.scores >= score
                if kept is not None:
                    chosen &= np.isin(detections.labels, kept)
                path = one.frame.path
                yield Seen(one.frame, one.pixels, replace(detections[chosen], path=path), one.problem)


@dataclass(frozen=True)
class _Loaded:
    frame: Frame
    pixels: np.ndarray
    prepared: Any = None
    problem: str | None = None


def _groups(sources: Sequence[Source], batch_size: int) -> Iterator[tuple[list[Source], int]]:
    """Sources that share batches: a live one has batches of one, for nobody waits for it to fill them."""
    group: list[Source] = []
    for source in sources:
        if not source.live:
            group.append(source)
            continue
        if group:
            yield group, batch_size
        yield [source], 1
        group = []
    if group:
        yield group, batch_size


def _frames(sources: Sequence[Source]) -> Iterator[Frame]:
    for source in sources:
        try:
            yield from source.frames()
        except UserError as error:
            yield Frame(source, _raising(error))


def _raising(error: UserError) -> Any:
    def read() -> np.ndarray:
        raise error

    return read


def _load(looker: Looker, frame: Frame) -> _Loaded:
    pixels = np.empty((0, 0, 3), np.uint8)
    try:
        pixels = frame.read()
        return _Loaded(frame, pixels, looker.prepare(frame, pixels))
    except ServerError as error:
        if error.status not in (400, 413, 415, 422):  # what is wrong with this picture alone
            raise
        return _Loaded(frame, pixels, problem=f"{frame.source.where}: {error}")
    except UserError as error:
        return _Loaded(frame, pixels, problem=str(error))


def _nothing(looker: Looker) -> Detections:
    card = looker.card
    none = np.empty(0, np.float32)
    labels = np.empty(0, np.int64)
    return Detections(none.reshape(0, 4), none, labels, tuple(card.class_names), tuple(card.category_ids))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
