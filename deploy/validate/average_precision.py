"""COCO precision and recall on arrays, in memory that is bounded.

The figures are those of pycocotools 2.0.11 to the last bit, where it gives any.

Rows are sorted once by class, image and score. Groups, the detections of a class in an image, are matched some thousand
rows at a time, the first of every group at once, then the second of every group, and so on; what stays of a row are two
times 40 bits, a bit for each of 4 ranges of area and 10 IoU thresholds. Then each class is summed up alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from deploy.core.boxes import intersection, share, xyxy
from deploy.core.detection_table import DetectionTable
from deploy.validate.ground_truth import GroundTruth

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Pixels of all, small, medium and large objects, both ends included."""
FEW = (1, 10)
"""Numbers of detections of a class in an image for which COCO asks no more than the recall."""
ROWS = 1 << 14  # detections that are matched at a time
PAIRS = 1 << 16  # pairs whose IoU is computed at a time


@dataclass(frozen=True)
class Curves:
    """Precision [10 IoUs, 101 recalls, k classes, 4 areas, limits], recall [10, k, 4, limits], and recall of all sizes
    with FEW detections [10, k, 2]; 0..1, -1 where there is no object of that class and size."""

    precision: np.ndarray
    recall: np.ndarray
    recall_of_few: np.ndarray

    @classmethod
    def empty(cls, classes: int, limits: int) -> Curves:
        """Nothing but -1."""
        shape = (classes, len(AREAS), limits)
        shapes = (len(IOUS), len(RECALLS), *shape), (len(IOUS), *shape), (len(IOUS), classes, len(FEW))
        return cls(*(np.full(shape, -1.0) for shape in shapes))


def curves(truth: GroundTruth, table: DetectionTable, limits: Sequence[int]) -> Curves:
    """Match detections with objects as COCO does. limits: how many detections of a class in an image count.

    The rows are finite and of images and categories of `truth`.
    """
    objects = _Objects(truth)
    rows = _Rows(truth, table, np.arange(len(table), dtype=_kind(len(table))), max(limits))
    hit, skip = _match(objects, rows)
    found = Curves.empty(len(truth.category_ids), len(limits))
    bounds = np.searchsorted(rows.groups, np.arange(len(truth.category_ids) + 1) * len(truth.image_ids))
    counts = np.zeros((len(truth.category_ids), len(AREAS)), np.int64)
    np.add.at(counts, objects.groups // max(len(truth.image_ids), 1), ~objects.ignored)
    for k in np.flatnonzero(counts.any(1)):
        category = slice(bounds[k], bounds[k + 1])
        places = _places_in_runs(rows.groups[category])
        best_first = np.argsort(-table.scores[rows.numbers[category]], kind="stable")
        if counts[k, 0]:
            found.recall_of_few[:, k] = _recall_of_few(hit, category, places, int(counts[k, 0]))
        for m, limit in enumerate(limits):
            ranked = best_first[places[best_first] < limit]
            for a in np.flatnonzero(counts[k]):
                for t in range(len(IOUS)):
                    bit = (int(a), t)
                    hits, counted = hit.column(category, *bit)[ranked], ~skip.column(category, *bit)[ranked]
                    precision, recall = _curve(hits, counted, int(counts[k, a]))
                    found.precision[t, :, k, a, m], found.recall[t, k, a, m] = precision, recall
    return found


def right_at_half(truth: GroundTruth, table: DetectionTable, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n] of the detections that count at an IoU of 0.5, and whether each is right: bool [n]. chosen: numbers of
    the rows that are looked at."""
    rows = _Rows(truth, table, chosen)
    hit, skip = _match(_Objects(truth), rows)
    everything = slice(0, len(rows))
    counted = ~skip.column(everything, 0, 0)
    return table.scores[rows.numbers[counted]].astype(np.float64), hit.column(everything, 0, 0)[counted]


def _curve(hits: np.ndarray, counted: np.ndarray, objects: int) -> tuple[np.ndarray, float]:
    """Precision at each of RECALLS, and the last recall.

    hits: bool [n], the detection, best first, has found an object that counts. counted: bool [n], it counts at all.
    """
    places = np.flatnonzero(hits)
    right = np.arange(1, len(places) + 1, dtype=np.float64)
    # what pycocotools adds against a division by 0 makes the first of all 2.2e-16 less than 1
    precision = right / (np.cumsum(counted, dtype=np.int32)[places] + np.spacing(1))
    best_from_here = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best_from_here[np.searchsorted(right / objects, RECALLS)], len(places) / objects


def _recall_of_few(hit: _Bits, category: slice, places: np.ndarray, objects: int) -> np.ndarray:
    """Recall [10 IoUs, 2] with FEW detections. places: of the rows within their groups, best first."""
    found = [[hit.column(category, 0, t)[places < limit].sum() for limit in FEW] for t in range(len(IOUS))]
    return np.array(found) / objects


# ----------------------------------------------------------------------------------------------------


class _Objects:
    """The ground truth, sorted by class and image. groups: int64 [n], class times number of images plus image.
    ignored: bool [n, area], does not count there."""

    def __init__(self, truth: GroundTruth) -> None:
        groups = truth.categories.astype(np.int64) * len(truth.image_ids) + truth.images
        order = np.argsort(groups, kind="stable")
        self.groups, self.boxes, self.crowd = groups[order], truth.boxes[order], truth.crowd[order]
        self.ignored = _outside(truth.areas[order]) | self.crowd[:, None]


class _Rows:
    """Chosen detections, sorted by class, image and score, without those beyond the limit of their group.

    numbers: of the rows in the table. groups: as of the objects.
    """

    def __init__(self, truth: GroundTruth, table: DetectionTable, chosen: np.ndarray, limit: int | None = None) -> None:
        self.table = table
        groups = np.searchsorted(truth.category_ids, table.category_ids[chosen])
        groups = groups.astype(_kind(len(truth.category_ids) * len(truth.image_ids)), copy=False)
        groups *= len(truth.image_ids)
        groups += np.searchsorted(truth.image_ids, table.image_ids[chosen]).astype(groups.dtype)
        # stable: equal scores stay in their order
        order = np.lexsort((-table.scores[chosen], groups)).astype(_kind(len(table)), copy=False)
        self.numbers, self.groups = chosen[order], groups[order]
        if limit is not None:
            within = _places_in_runs(self.groups) < limit
            if not within.all():
                self.numbers, self.groups = self.numbers[within], self.groups[within]

    def __len__(self) -> int:
        return len(self.numbers)

    def parts(self) -> Iterator[slice]:
        """Slices of whole groups of about ROWS rows."""
        start, n = 0, len(self)
        while start < n:
            end = min(start + ROWS, n)
            if end < n:
                end = int(np.searchsorted(self.groups, self.groups[end]))
            if end <= start:  # one group is larger
                end = int(np.searchsorted(self.groups, self.groups[start], side="right"))
            yield slice(start, end)
            start = end


class _Bits:
    """A bool for every row, area and IoU threshold, packed."""

    def __init__(self, rows: int) -> None:
        self._packed = np.zeros((rows, len(AREAS) * len(IOUS) // 8), np.uint8)

    def put(self, rows: slice, values: np.ndarray) -> None:
        """values: bool [rows, area, IoU]."""
        self._packed[rows] = np.packbits(values.reshape(len(values), -1), axis=1)

    def column(self, rows: slice, area: int, iou: int) -> np.ndarray:
        byte, bit = divmod(area * len(IOUS) + iou, 8)
        return (self._packed[rows, byte] >> (7 - bit) & 1).astype(bool)


def _match(objects: _Objects, rows: _Rows) -> tuple[_Bits, _Bits]:
    """hit: the row has found an object that counts. skip: it does not count itself, because it has found an object that
    does not count, or none and has another size."""
    hit, skip = _Bits(len(rows)), _Bits(len(rows))
    for part in rows.parts():
        boxes = rows.table.xywh(rows.numbers[part])
        shape = (len(boxes), len(AREAS), len(IOUS))
        hits = np.zeros(shape, bool)
        skips = np.broadcast_to(_outside(boxes[:, 2] * boxes[:, 3])[:, :, None], shape).copy()
        groups = rows.groups[part]
        first = np.searchsorted(objects.groups, groups)
        count = np.searchsorted(objects.groups, groups, side="right") - first
        _match_part(objects, groups, _overlaps(boxes, objects, first, count), hits, skips)
        hit.put(part, hits)
        skip.put(part, skips)
    return hit, skip


Overlaps = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row of the part int64 [e], object int64 [e] and IoU float64 [e] of pairs that reach the first threshold."""


def _overlaps(boxes: np.ndarray, objects: _Objects, first: np.ndarray, count: np.ndarray) -> Overlaps:
    """Compare every row i with the objects first[i] to first[i] + count[i]; pairs by row, IoU and object ascending."""
    found: list[Overlaps] = []
    ends = np.cumsum(count)
    start = 0
    while start < len(boxes):
        before = int(ends[start] - count[start])
        end = max(int(np.searchsorted(ends, before + PAIRS, side="right")), start + 1)
        row = np.repeat(np.arange(start, end), count[start:end])
        item = np.arange(len(row)) - np.repeat(ends[start:end] - count[start:end] - before, count[start:end])
        item += np.repeat(first[start:end], count[start:end])
        iou = _iou(boxes[row], objects.boxes[item], objects.crowd[item])
        near = iou >= IOUS[0]
        found.append((row[near], item[near], iou[near]))
        start = end
    row, item, iou = (np.concatenate([part[i] for part in found]) for i in range(3))
    order = np.lexsort((item, iou, row))
    return row[order], item[order], iou[order]


def _match_part(objects: _Objects, groups: np.ndarray, pairs: Overlaps, hits: np.ndarray, skips: np.ndarray) -> None:
    """Write into `hits` and `skips`, bool [rows, area, IoU], which pairs are matches.

    COCO lets the rows of a group choose one after the other, best score first: the free object of the largest IoU, of
    equal ones the last, and one that does not count only if none does that counts. Crowds stay free.
    """
    row, item, iou = pairs
    if not len(row):
        return
    chooser, heads = np.unique(row, return_index=True)
    turn = _places_in_runs(groups[chooser])
    turn_of_pair = np.repeat(turn, np.diff(np.append(heads, len(row))))
    order = np.argsort(turn_of_pair, kind="stable")
    bounds = np.searchsorted(turn_of_pair[order], np.arange(turn.max() + 2))
    low = int(item.min())
    taken = np.zeros((int(item.max()) - low + 1, len(AREAS), len(IOUS)), bool)
    for start, end in pairwise(bounds):
        now = order[start:end]
        r, g = row[now], item[now]
        fits = (iou[now][:, None] >= IOUS)[:, None] & (~taken[g - low] | objects.crowd[g][:, None, None])
        n = len(now)
        worth = np.arange(n)[:, None] + n * ~objects.ignored[g]  # [n, area]: the later, the better
        heads = np.flatnonzero(np.diff(r, prepend=-1))
        best = np.maximum.reduceat(np.where(fits, worth[:, :, None], -1), heads, axis=0)  # [choosers, area, IoU]
        place, area, threshold = np.nonzero(best >= 0)
        chosen = g[best[place, area, threshold] % n]
        taken[chosen - low, area, threshold] = True
        uncounted = objects.ignored[chosen, area]
        where = (r[heads][place], area, threshold)
        hits[where], skips[where] = ~uncounted, uncounted


def _iou(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU [n] of pairs of boxes xywh; of a crowd, the share of the box inside. In this order of operations it is that
    of pycocotools to the last bit."""
    both = intersection(xyxy(boxes), xyxy(others))
    area, other_area = boxes[:, 2] * boxes[:, 3], others[:, 2] * others[:, 3]
    return share(both, np.where(crowd, area, area + other_area - both))


def _outside(areas: np.ndarray) -> np.ndarray:
    """Tell which areas lie outside each of AREAS: bool [n, area]."""
    low, high = np.array(AREAS).T
    outside: np.ndarray = (areas[:, None] < low) | (areas[:, None] > high)
    return outside


def _kind(largest: int) -> type[np.signedinteger[Any]]:
    """The smallest integers that hold this number."""
    return np.int32 if largest < 2**31 else np.int64


def _places_in_runs(values: np.ndarray) -> np.ndarray:
    """Number the members of each run of equal values from 0: int32 [n]."""
    places = np.arange(len(values), dtype=np.int32)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return places - np.repeat(places[starts], np.diff(np.append(starts, len(values))))
