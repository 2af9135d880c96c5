"""Fixed augmentations: every picture has K views, so that what a teacher says of one can be kept.

View v of a picture is drawn from (seed, picture, v), and epoch e shows view e modulo K of every picture: after K epochs
training goes round. The order of the pictures is drawn anew in each epoch, as without views.

What the network sees of a view must not depend on the other pictures of a batch, which determine its padding. So wide
and tall pictures never share a batch, and each of the two kinds has one canvas, the smallest that holds them all.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from compress.data.batch import smallest_canvas
from compress.data.concat import TrainingImages

Size = tuple[int, int]


@dataclass(frozen=True)
class Views:
    """count: K. seed: of the augmentations, not of the order of the pictures."""

    count: int
    seed: int


@dataclass(frozen=True)
class Canvases:
    """(height, width) of all batches of wide and of all batches of tall pictures, in pixels; None: there are none."""

    wide: Size | None
    tall: Size | None

    def of(self, original: Size) -> Size:
        """The canvas of a picture; original: (height, width) of its file."""
        found = self.tall if original[0] > original[1] else self.wide
        assert found is not None, "the dataset has such a picture"
        return found

    def counts(self, dataset: TrainingImages) -> dict[Size, int]:
        """How many pictures of `dataset` lie on each canvas."""
        tall = int((dataset.aspect_ratios < 1).sum())
        counts: Counter[Size] = Counter()
        for canvas, count in ((self.tall, tall), (self.wide, len(dataset) - tall)):
            if canvas is not None:
                counts[canvas] += count
        return counts

    @classmethod
    def for_all(cls, dataset: TrainingImages) -> Canvases:
        """The smallest canvases that hold every view of every picture of `dataset`."""
        sizes = dataset.network_sizes()
        kinds = [
            [size for size, tall in zip(sizes, dataset.aspect_ratios < 1, strict=True) if tall == kind]
            for kind in (0, 1)
        ]
        wide, tall = (smallest_canvas(kind) if kind else None for kind in kinds)
        return cls(wide, tall)


def epoch_of_views(
    tall: np.ndarray, epoch: int, *, batch_size: int, seed: int, views: Views
) -> list[list[tuple[int, int]]]:
    """The batches `(index, sample_seed)` of an epoch, as many as without views.

    Wide and tall pictures are cut into batches apart. Where their remainders would have made one more together, it is
    filled with pictures of one kind: that of the longer remainder the more often, and some of them come twice in this
    epoch, the second time in their next view.

    Args:
        tall: bool [n], for every picture. seed: of the order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(tall))
    groups = [order[~tall[order]], order[tall[order]]]
    whole = [len(group) // batch_size * batch_size for group in groups]
    rows = [group[:n].reshape(-1, batch_size) for group, n in zip(groups, whole, strict=True)]
    left = np.array([len(group) - n for group, n in zip(groups, whole, strict=True)])
    if left.sum() >= batch_size:
        kind = random.choice(2, p=left / left.sum())
        rows.append(np.resize(np.roll(groups[kind], left[kind]), (1, batch_size)))  # the remainder, then from the front
    together = np.concatenate(rows)
    seen: Counter[int] = Counter()
    batches = []
    for row in together[random.permutation(len(together))].tolist():
        batch = []
        for index in row:
            batch.append((index, int(_seeds(views, (epoch + seen[index]) % views.count, len(tall))[index])))
            seen[index] += 1
        batches.append(batch)
    return batches


def different(views: int, outcomes: float) -> float:
    """How many of so many views differ, on average, where an augmentation has so many outcomes, all as likely."""
    return views if math.isinf(outcomes) else outcomes * (1 - (1 - 1 / outcomes) ** views)


def picture_key(image: Tensor, canvas: Size) -> str:
    """64 hexadecimal digits for what a network sees: the pixels of a view, uint8 [3, h, w], and its canvas. Whatever
    made other pixels of it (another file, seed, augmentation or version of a library) gives another key."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    digest = hashlib.sha256(f"{pixels.shape} {canvas}".encode())
    digest.update(pixels.data)
    return digest.hexdigest()


# --- details --------------------------------------------------------------------------------------------


@cache
def _seeds(views: Views, view: int, count: int) -> np.ndarray:
    """Seed of this view of every picture; that of a picture does not depend on how many there are."""
    return np.random.default_rng([views.seed, 0, view]).integers(2**63, size=count)
