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
from deploy.validate.ground_truth import AREA, GroundTruth

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = (AREA, (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Pixels of all, small, medium and large objects, both ends included."""
FEW = (1, 10)
"""Numbers of detections of a class in an image for which COCO asks no more than the recall."""
ROWS = 1 << 14  # detections that are matched at a time
PAIRS = 1 << 16  # pairs whose IoU is computed at a time
CELLS = 1 << 16  # detections times thresholds that are summed up at a time


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


def curves(
    truth: GroundTruth, table: DetectionTable, limits: Sequence[int], chosen: np.ndarray | None = None
) -> Curves:
    """Match detections with objects as COCO does. limits: how many detections of a class in an image count. chosen:
    numbers of the rows that are looked at; None: all.

    The rows are finite and of images and categories of `truth`.
    """
    objects = _Objects(truth)
    rows = _Rows(truth, table, chosen, max(limits))
    hit, skip, _ = _match(objects, rows)
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
            ranked = bounds[k] + best_first[places[best_first] < limit]
            for a in np.flatnonzero(counts[k]):
                hits, counted = hit.columns(ranked, int(a)), ~skip.columns(ranked, int(a))
                precision, recall = curve(hits, counted, int(counts[k, a]))
                found.precision[:, :, k, a, m], found.recall[:, k, a, m] = precision, recall
    return found


@dataclass(frozen=True)
class Matched:
    """Detections that count at an IoU of 0.5, by class, image and score. rows: their numbers in the table [n]. objects:
    of the object that each has found, in the order of the ground truth; -1: it is wrong."""

    rows: np.ndarray
    objects: np.ndarray


def matched_at_half(
    truth: GroundTruth, table: DetectionTable, chosen: np.ndarray | None = None, limit: int | None = None
) -> Matched:
    """Match detections with objects of any size. chosen: numbers of the rows that are looked at; None: all. limit: how
    many of a class in an image."""
    objects, rows = _Objects(truth), _Rows(truth, table, chosen, limit)
    _, skip, found = _match(objects, rows)
    counted = ~skip.columns(slice(0, len(rows)), 0)[:, 0]
    places = np.append(objects.order, -1).astype(np.int32)  # -1 is the last
    return Matched(rows.numbers[counted], places[found[counted]])


@dataclass(frozen=True)
class Ranked:
    """Detections of each class, best first, with what they found among objects of any size. classes, images: places in
    the ground truth [n]. rows: numbers in the table [n]. hit: bool [n, 10], has found an object that counts at each of
    IOUS. counted: bool [n, 10], counts itself, as a hit or as wrong."""

    classes: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    hit: np.ndarray
    counted: np.ndarray


def ranked(truth: GroundTruth, table: DetectionTable, limit: int) -> Ranked:
    """Match as `curves` does. limit: how many detections of a class in an image count."""
    objects, rows = _Objects(truth), _Rows(truth, table, None, limit)
    hit, skip, _ = _match(objects, rows)
    numbers, groups = rows.numbers, rows.groups
    del objects, rows  # most of the memory
    images = max(len(truth.image_ids), 1)
    order = np.lexsort((-table.scores[numbers], (groups // images).astype(np.int32)))  # stable: images in their order
    numbers, groups = numbers[order], groups[order]
    return Ranked(
        classes=(groups // images).astype(np.int32),
        images=(groups % images).astype(np.int32),
        rows=numbers,
        hit=hit.columns(order, 0).copy(),  # of what holds the bits of other areas as well
        counted=~skip.columns(order, 0),
    )


def curve(hits: np.ndarray, counted: np.ndarray, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision at each of RECALLS [m, 101], and the last recall [m].

    hits: bool [n, m], the detection, best first, has found an object that counts. counted: bool [n, m], it counts at
    all. objects: how many there are.
    """
    hit_of_recall = np.searchsorted(np.arange(1, objects + 1) / objects, RECALLS)
    precision = np.zeros((hits.shape[1], len(RECALLS)))
    width = max(1, CELLS // max(1, len(hits)))
    for start in range(0, hits.shape[1], width):
        part = slice(start, start + width)
        right = np.cumsum(hits[:, part], axis=0, dtype=np.int32)
        # what pycocotools adds against a division by 0 makes the first of all 2.2e-16 less than 1
        share_right = right / (np.cumsum(counted[:, part], axis=0, dtype=np.int32) + np.spacing(1))
        best_from_here = np.maximum.accumulate(share_right[::-1])[::-1]
        column, row = np.nonzero(hits[:, part].T)
        of_hit = np.zeros((right.shape[1], objects))
        of_hit[column, right[row, column] - 1] = best_from_here[row, column]
        precision[part] = of_hit[:, hit_of_recall]
    return precision, hits.sum(0) / objects


def _recall_of_few(hit: _Bits, category: slice, places: np.ndarray, objects: int) -> np.ndarray:
    """Recall [10 IoUs, 2] with FEW detections. places: of the rows within their groups, best first."""
    hits = hit.columns(category, 0)
    return np.stack([hits[places < limit].sum(0) for limit in FEW], 1) / objects


# ----------------------------------------------------------------------------------------------------


class _Objects:
    """The ground truth, sorted by class and image. order: places in the ground truth. groups: int64 [n], class times
    number of images plus image. ignored: bool [n, area], does not count there."""

    def __init__(self, truth: GroundTruth) -> None:
        groups = truth.categories.astype(np.int64) * len(truth.image_ids) + truth.images
        self.order = order = np.argsort(groups, kind="stable")
        self.groups, self.boxes, self.crowd = groups[order], truth.boxes[order], truth.crowd[order]
        self.ignored = _outside(truth.areas[order]) | self.crowd[:, None]


class _Rows:
    """Chosen detections, sorted by class, image and score, without those beyond the limit of their group.

    numbers: of the rows in the table. groups: as of the objects.
    """

    def __init__(
        self, truth: GroundTruth, table: DetectionTable, chosen: np.ndarray | None, limit: int | None = None
    ) -> None:
        self.table = table
        chosen = np.arange(len(table), dtype=_kind(len(table))) if chosen is None else chosen
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

    def columns(self, rows: slice | np.ndarray, area: int) -> np.ndarray:
        """Of some rows and one area: bool [n, IoU]."""
        start = area * len(IOUS)
        first, end = start // 8, (start + len(IOUS) + 7) // 8
        bits = np.unpackbits(self._packed[rows, first:end], axis=1)
        return bits[:, start - 8 * first :][:, : len(IOUS)].view(bool)


def _match(objects: _Objects, rows: _Rows) -> tuple[_Bits, _Bits, np.ndarray]:
    """hit: the row has found an object that counts. skip: it does not count itself, because it has found an object that
    does not count, or none and has another size. found: int32 [n], its object of any size at the first IoU, or -1."""
    hit, skip = _Bits(len(rows)), _Bits(len(rows))
    found = np.full(len(rows), -1, np.int32)
    for part in rows.parts():
        boxes = rows.table.xywh(rows.numbers[part])
        shape = (len(boxes), len(AREAS), len(IOUS))
        hits = np.zeros(shape, bool)
        skips = np.broadcast_to(_outside(boxes[:, 2] * boxes[:, 3])[:, :, None], shape).copy()
        groups = rows.groups[part]
        first = np.searchsorted(objects.groups, groups)
        count = np.searchsorted(objects.groups, groups, side="right") - first
        pairs = overlaps(boxes, objects.boxes, objects.crowd, first, count, IOUS[0])
        _match_part(objects, groups, pairs, hits, skips, found[part])
        hit.put(part, hits)
        skip.put(part, skips)
    return hit, skip, found


Overlaps = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row int64 [e], object int64 [e] and IoU float64 [e] of pairs."""


def overlaps(
    boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray, first: np.ndarray, count: np.ndarray, least: float
) -> Overlaps:
    """Compare every box i (xywh) with the objects first[i] to first[i] + count[i]; pairs with an IoU of `least` or
    more, by row, IoU and object ascending."""
    found: list[Overlaps] = []
    ends = np.cumsum(count)
    start = 0
    while start < len(boxes):
        before = int(ends[start] - count[start])
        end = max(int(np.searchsorted(ends, before + PAIRS, side="right")), start + 1)
        row = np.repeat(np.arange(start, end), count[start:end])
        item = np.arange(len(row)) - np.repeat(ends[start:end] - count[start:end] - before, count[start:end])
        item += np.repeat(first[start:end], count[start:end])
        iou = _iou(boxes[row], objects[item], crowd[item])
        near = iou >= least
        found.append((row[near], item[near], iou[near]))
        start = end
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    row, item, iou = (np.concatenate([part[i] for part in found]) for i in range(3))
    order = np.lexsort((item, iou, row))
    return row[order], item[order], iou[order]


def _match_part(
    objects: _Objects, groups: np.ndarray, pairs: Overlaps, hits: np.ndarray, skips: np.ndarray, found: np.ndarray
) -> None:
    """Write into `hits` and `skips`, bool [rows, area, IoU], and `found` which pairs are matches.

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
        usual = (area == 0) & (threshold == 0)
        found[r[heads][place[usual]]] = chosen[usual]


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
