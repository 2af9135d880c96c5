"""How sure an mAP is: the same figure on images drawn again with replacement (the bootstrap).

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993). Objects are matched once; a drawn image counts with its
objects and detections as often as it was drawn, so that COCO's mAP of a drawn set is summed up without matching again.
Two detectors on the same images are compared pair by pair: both see the same draws, and what is hard about an image
falls out of their difference.

The interval says how much other images of this kind would change the figure. It does not say how much another training
would: that takes other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from deploy.core.detection_table import DetectionTable
from deploy.core.progress import Progress
from deploy.validate.average_precision import IOUS, RECALLS, ranked
from deploy.validate.coco import DETECTIONS
from deploy.validate.ground_truth import GroundTruth

TIMES = 300
"""Drawn sets: the ends of a 95 % interval are then the 8th from below and from above."""
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure, and where LEVEL of the drawn sets have it."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """The figure cannot be told from none."""
        return self.low <= 0 <= self.high


class Matches:
    """What a detector found on labelled images, as much of it as its AP on some of them needs."""

    def __init__(self, truth: GroundTruth, table: DetectionTable, limit: int = DETECTIONS) -> None:
        """limit: detections of a class in an image that count. Rows are finite, of images and classes of `truth`."""
        found = ranked(truth, table, limit)
        self.images, self.classes = len(truth.image_ids), len(truth.category_ids)
        self._object_images, self._object_classes = truth.images[truth.counts], truth.categories[truth.counts]
        kept = found.counted.any(1)
        hit, counted = found.hit[kept], found.counted[kept]
        self._row_images, classes = found.images[kept], found.classes[kept]
        places = np.arange(self.classes + 1)
        self._starts = np.searchsorted(classes, places)
        # a crowd takes a detection at one threshold and leaves it at a stricter one: few count at some of them only
        self._usual = counted[:, 0].astype(np.int64)
        odd = counted ^ counted[:, :1]
        self._hits = [_Hits(hit[:, t], odd[:, t], counted[:, t], classes, places) for t in range(len(IOUS))]

    def ap(self, times: np.ndarray) -> np.ndarray:
        """AP of each class in percent, float64 [k], NaN without an object, with each image counting so many times.
        times: int [images]."""
        objects = np.bincount(self._object_classes, times[self._object_images], self.classes).astype(np.int64)
        needed = _hits_needed(objects)
        weights = times[self._row_images]
        seen = np.append(0, np.cumsum(weights * self._usual))
        total = np.zeros(self.classes)
        for hits in self._hits:
            total += hits.precision(weights, seen, self._starts[:-1], needed)
        total[objects == 0] = np.nan
        return total / len(IOUS) * 100

    def value(self) -> np.ndarray:
        """AP of each class in percent on all images as they are."""
        return self.ap(np.ones(self.images, np.int64))


def draws(images: int, times: int = TIMES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each image is in a set that was drawn: int64 [images], `times` of them, the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        yield np.bincount(rng.integers(images, size=images), minlength=images)


def drawn_aps(
    matches: Mapping[str, Matches], times: int = TIMES, seed: int = 0, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """AP of each class on drawn sets, float64 [times, k], of detectors on the same images, which share the draws.
    progress(done, total) is called after every draw."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in matches}
    images = {each.images for each in matches.values()}
    assert len(images) <= 1, "detectors of the same images"
    for done, counts in enumerate(draws(images.pop(), times, seed) if images else (), start=1):
        for name, each in matches.items():
            found[name].append(each.ap(counts))
        if progress is not None:
            progress(done, times)
    return {name: np.stack(rows) for name, rows in found.items()}


def mean_ap(aps: np.ndarray) -> np.ndarray:
    """mAP of the classes that have objects, [...] of [..., k]; NaN where none has."""
    there = ~np.isnan(aps)
    count = there.sum(-1)
    return np.where(count > 0, np.where(there, aps, 0).sum(-1) / np.maximum(count, 1), np.nan)


def interval(value: float, drawn: np.ndarray) -> Interval:
    """The interval of a figure. drawn: the same on each drawn set; sets that lack it are left out.

    It is that of the drawn figures around their mean, laid around the value: COCO takes the best precision from each
    recall on, which is higher the fewer different images there are, so that all drawn sets have some more mAP.
    """
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Interval(value, value, value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - drawn.mean()
    return Interval(value, value + float(low), value + float(high))


# --- details --------------------------------------------------------------------------------------------


class _Hits:
    """Rows that have found an object at one IoU, by class. odd: rows that count here and not at the first IoU, or the
    other way round."""

    def __init__(
        self, hit: np.ndarray, odd: np.ndarray, counted: np.ndarray, classes: np.ndarray, places: np.ndarray
    ) -> None:
        self.rows = np.flatnonzero(hit)
        self.classes = classes[self.rows]
        self.bounds = np.searchsorted(self.classes, places)
        # of classes one after the other the running best of each must not reach into the one before it
        self.shift = 2.0 * (len(places) - 2 - self.classes)
        self.odd = np.flatnonzero(odd)
        self.sign = np.where(counted[self.odd], 1, -1)
        self.odd_before = np.searchsorted(self.odd, self.rows, side="right")
        self.odd_starts = np.searchsorted(classes[self.odd], places[:-1])

    def precision(self, weights: np.ndarray, seen: np.ndarray, starts: np.ndarray, needed: np.ndarray) -> np.ndarray:
        """Mean precision of each class over RECALLS, 0..1 [k]. weights: of rows. seen: their sum before each row.
        starts: first row of each class. needed: hits that each recall takes [k, 101]."""
        if not len(self.rows):
            return np.zeros(len(starts))
        right = np.append(0, np.cumsum(weights[self.rows]))
        before = right[self.bounds[:-1]]
        all_, all_before = seen[self.rows + 1], seen[starts]
        if len(self.odd):
            more = np.append(0, np.cumsum(weights[self.odd] * self.sign))
            all_, all_before = all_ + more[self.odd_before], all_before + more[self.odd_starts]
        right = right[1:]
        share = (right - before[self.classes]) / (all_ - all_before[self.classes] + np.spacing(1))
        best = np.maximum.accumulate((share + self.shift)[::-1])[::-1] - self.shift
        place = np.searchsorted(right, before[:, None] + needed)
        there = place < self.bounds[1:, None]
        return np.where(there, best[np.minimum(place, len(best) - 1)], 0.0).mean(1)


def _hits_needed(objects: np.ndarray) -> np.ndarray:
    """The fewest hits, at least one, whose share of the objects is each of RECALLS: int64 [k, 101]. Compared as COCO
    does, as floats: 29 of 100 may be less than 0.29."""
    count = np.maximum(objects, 1)[:, None]
    hits = np.maximum(np.floor(RECALLS * count).astype(np.int64) - 1, 0)
    for _ in range(3):
        hits += hits / count < RECALLS
    return np.maximum(hits, 1)
