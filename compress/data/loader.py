"""Loaders whose order is arithmetic: a batch is a pure function of (dataset, seed, epoch, step).

So a run continues bit-exactly after it was killed, with any number of workers, and ranks together see the
batches that one rank alone would see.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from compress.data.batch import Batch, Target, collate
from compress.data.coco import CocoDetection
from compress.data.concat import TrainingImages
from compress.data.views import Canvases, Views, epoch_of_views, picture_key
from deploy.core.errors import LocalUserError, UserError


def train_loader(
    dataset: TrainingImages,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    group_aspect: bool = True,
    views: Views | None = None,
    keys: bool = False,
) -> DataLoader[Batch]:
    """An endless loader: iterating runs on from one epoch into the next. `len` is the steps of one epoch.

    `loader.batch_sampler.set_position(epoch, step)` says where the next `iter(loader)` begins.

    Args:
        batch_size: images of one step over all ranks; each rank gets `batch_size / world_size` of them.
        group_aspect: put wide and tall images into different batches, so that less padding is computed on.
        views: give every image so many fixed augmentations, see `compress.data.views`; groups wide and tall ones.
        keys: with views, tell each target what its network image is (`Target.key`).

    Raises:
        UserError: `batch_size` does not divide by `world_size`, or exceeds the number of images.
    """
    sampler = TrainSampler(
        dataset.aspect_ratios,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        group_aspect=group_aspect,
        views=views,
    )
    canvas = None if views is None else Canvases.for_all(dataset)
    return _Loader(_Guarded(dataset), batch_sampler=sampler, **_options(workers, canvas, keys=keys))


def eval_loader(
    dataset: CocoDetection,
    *,
    batch_size: int,
    workers: int,
    canvas: tuple[int, int] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """Every image once, wide ones first.

    Rank r takes every `world_size`-th image.

    batch_size: of this rank; the last batch may be smaller.
    canvas: (height, width) of all batches, as an exported file has one; None: the smallest for each batch.
    """
    tall = dataset.aspect_ratios < 1
    order = np.argsort(tall, kind="stable")[rank::world_size].tolist()
    return _Loader(_Guarded(dataset), batch_size=batch_size, sampler=order, **_options(workers, canvas))


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of `(index, sample_seed)` for one rank.

    Each epoch is a new permutation. With `group_aspect` it is cut into batches of wide and of tall images,
    the two remainders are joined, and the batches are shuffled. An epoch has
    `len(aspect_ratios) // batch_size` steps; what is left over is left out, another part in every epoch.
    With `views` see `compress.data.views`.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | np.ndarray,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        group_aspect: bool = True,
        views: Views | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"train.batch_size: {batch_size} is not a multiple of the {world_size} devices that share a batch; "
                f"set it to {max(1, batch_size // world_size) * world_size}"
            )
        self._tall = np.asarray(aspect_ratios) < 1
        if batch_size > len(self._tall):
            raise UserError(f"train.batch_size: {batch_size} is more than the {len(self._tall)} training images")
        self._batch_size, self._seed, self._group, self._views = batch_size, seed, group_aspect, views
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._start = (0, 0)

    def __len__(self) -> int:
        """Steps in one epoch."""
        return len(self._tall) // self._batch_size

    def set_position(self, epoch: int, step: int) -> None:
        """The next iteration begins with batch `step` (0-based, may exceed the epoch) of epoch `epoch`."""
        if epoch < 0 or step < 0:
            raise ValueError(f"position must not be negative, got epoch {epoch}, step {step}")
        self._start = (epoch + step // len(self), step % len(self))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self._start
        while True:
            batches = self.epoch(epoch)
            for batch in batches[step:]:
                yield batch[self._slice]
            epoch, step = epoch + 1, 0

    def epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The global batches of one epoch, before they are shared out among ranks."""
        if self._views is not None:
            return epoch_of_views(self._tall, epoch, batch_size=self._batch_size, seed=self._seed, views=self._views)
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._tall))
        seeds = random.integers(2**63, size=len(order))
        groups = [order[~self._tall[order]], order[self._tall[order]]] if self._group else [order]
        size = self._batch_size
        whole = [len(group) // size * size for group in groups]
        rest = np.concatenate([group[n:] for group, n in zip(groups, whole, strict=True)])
        rows = np.concatenate([group[:n] for group, n in zip(groups, whole, strict=True)] + [rest])
        rows = rows[: len(self) * size].reshape(-1, size)
        rows = rows[random.permutation(len(rows))]
        return [[(index, int(seeds[index])) for index in row] for row in rows.tolist()]


# --- details --------------------------------------------------------------------------------------------


class _Guarded(Dataset[Any]):
    """Hands a user's mistake through as a value: raised in a worker it would arrive as a long traceback."""

    def __init__(self, dataset: TrainingImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Any]) -> list[tuple[Tensor, Target]] | UserError:
        try:
            return [self.dataset[key] for key in keys]
        except UserError as error:
            return error


class _Loader(DataLoader[Batch]):
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for item in super().__iter__():
            if isinstance(item, UserError):
                # A new one: an exception raised from a variable of this frame keeps the frame, and so the
                # workers, alive until garbage collection, which then waits five seconds for them.
                raise LocalUserError(str(item))
            yield item


def _collate(
    samples: list[tuple[Tensor, Target]] | UserError, canvas: tuple[int, int] | Canvases | None, keys: bool
) -> Batch | UserError:
    if isinstance(samples, UserError):
        return samples
    if isinstance(canvas, Canvases):
        canvas = canvas.of(samples[0][1].original_size)  # all are wide, or all tall
        if keys:
            samples = [(image, replace(target, key=picture_key(image, canvas))) for image, target in samples]
    return collate(samples, canvas)


def _begin_worker(_: int) -> None:
    """In a loader process: when the training ends while a picture is handed over, that is no error to tell of."""
    sys.excepthook = _tell_unless_the_training_ended


def _tell_unless_the_training_ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, ConnectionError | EOFError | KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def _options(workers: int, canvas: tuple[int, int] | Canvases | None = None, *, keys: bool = False) -> dict[str, Any]:
    return dict(
        num_workers=workers,
        collate_fn=partial(_collate, canvas=canvas, keys=keys),
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        # Starting an iteration draws a worker seed; from its own generator, the global state stays as it was.
        generator=torch.Generator().manual_seed(0),
    )
