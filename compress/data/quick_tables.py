"""`LabelTables` of a large COCO file: no object for a polygon, and never more than a piece of the file as objects.

The two long lists are cut into pieces of some megabytes and decoded by msgspec, which checks the types and steps over
the keys that nobody reads. A cut may stand wherever one object of a list seems to end and the next to begin; in the
wrong place, within an object or a text, what is before it is no list and never decodes, and the next place is tried.

It refuses whatever is not plainly right, and says nothing about it: `label_tables.plain_tables` then reads the file and
finds what is wrong with it, or nothing. One thing is taken here that is refused there: an integer of more than 4300
digits under a key that nobody reads.
"""

from __future__ import annotations

import codecs
import json
import mmap
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from compress.data.label_tables import LabelTables, classes_of, texts, unlabeled_of
from deploy.core.errors import UserError
from deploy.validate.labels import box_twice, empty_categories, line, place_of

PIECE = 4 << 20
"""Bytes of a list that are decoded at once."""


class Unusual(Exception):
    """The file is left to the general reader."""


def quick_tables(file: Path) -> LabelTables:
    """Read a COCO file, every image of which says its size. Raises Unusual, and OSError."""
    try:
        with open(file, "rb") as opened:
            _check_text(opened)
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        top = msgspec.json.decode(mapped, type=dict[str, msgspec.Raw])
        classes = msgspec.json.decode(top["categories"], type=list[_Category])
        info = json.loads(bytes(top["info"])) if "info" in top else None
        images = _images(_pieces(top["images"], _Image, mapped))
        annotations = _annotations(_pieces(top["annotations"], _Annotation, mapped))
        return _tables(file, [msgspec.structs.asdict(row) for row in classes], info, images, annotations)
    except (msgspec.MsgspecError, UserError, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise Unusual(str(error)) from None


# --- details: reading -----------------------------------------------------------------------------------


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
    height: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float = 1.0
    iscrowd: bool | float = 0
    ignore: bool | float = 0
    score: float = 1.0
    id: int | float | str | None = None


_CUT = re.compile(rb"\}[ \t\r\n]*,[ \t\r\n]*\{")
_EXACT = 2.0**52
"""Sums of integers below it are the same as of floats."""
_HUGE = 1e299
"""An integer of this size may be none to the general reader."""
_CROWD, _IGNORE, _EMPTY = 1, 2, 4
_DROPPED = ("unknown image", "unknown category", "category not in info.coverage", "empty box", "outside the image")

Piece = tuple[memoryview, list[Any]]
"""A part of a list, and its objects."""


@dataclass
class _Images:
    """ids: int64 [i]. sizes: int32 [i, 2], (height, width)."""

    ids: np.ndarray
    sizes: np.ndarray
    text: np.ndarray
    text_ends: np.ndarray


@dataclass
class _Annotations:
    """All annotations [n] of the file. boxes: float64 [n, 4], x, y, w, h. flags: uint8 [n], of _CROWD, _IGNORE, and
    _EMPTY by its area. texts: the number of the first annotation in each part of the list, and the part."""

    images: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    flags: np.ndarray
    scores: np.ndarray
    texts: list[tuple[int, memoryview]]

    def place(self, number: int) -> str:
        """`place_of` an annotation."""
        first, text = self.texts[bisect_right(self.texts, number, key=lambda part: part[0]) - 1]
        row = msgspec.json.decode(_as_list(text), type=list[msgspec.Raw])[number - first]
        return place_of(json.loads(bytes(row)), number)


def _check_text(file: BinaryIO) -> None:
    """Raises UnicodeDecodeError: msgspec looks at the texts alone that it returns."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while block := file.read(PIECE):
        decoder.decode(block)
    decoder.decode(b"", final=True)


def _pieces(section: msgspec.Raw, kind: type, mapped: mmap.mmap) -> Iterator[Piece]:
    """The parts of a list in `mapped`, one after the other, each decoded."""
    text, decoder = memoryview(section), msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    if bytes(text[:1]) != b"[":
        raise Unusual("no list")
    start, size = 1, PIECE
    while True:
        cut = _CUT.search(text, start + size)
        piece = text[start : len(text) - 1 if cut is None else cut.start() + 1]
        try:
            rows = decoder.decode(_as_list(piece))
        except msgspec.MsgspecError:
            if cut is None:
                raise
            size *= 2  # and not the next place: there may be thousands within one object
            continue
        yield piece, rows
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # what was read of the file counts as memory of this process
        if cut is None:
            return
        start, size = cut.end() - 1, PIECE


def _as_list(piece: memoryview) -> bytes:
    return b"".join((b"[", piece, b"]"))


def _images(pieces: Iterator[Piece]) -> _Images:
    ids, sizes, names = [], [], []
    for _, rows in pieces:
        ids.append(_column(rows, "id", np.int64))
        sizes.append(np.stack([_column(rows, key, np.int32) for key in ("height", "width")], 1))
        names.append(texts(row.file_name for row in rows))
    lengths = [np.diff(ends, prepend=0) for _, ends in names]
    found = _Images(
        np.concatenate(ids),
        np.concatenate(sizes),
        np.concatenate([text for text, _ in names]),
        np.cumsum(np.concatenate(lengths), dtype=np.int64),
    )
    if len(np.unique(found.ids)) < len(found.ids):
        raise Unusual("an image id repeats")
    return found


def _annotations(pieces: Iterator[Piece]) -> _Annotations:
    columns: list[list[np.ndarray]] = [[] for _ in range(5)]
    parts, count = [], 0
    for text, rows in pieces:
        parts.append((count, text))
        count += len(rows)
        for column, values in zip(columns, _columns(rows), strict=True):
            column.append(values)
    for column in columns:
        column[:] = [np.concatenate(column)]  # one by one: the parts of each are freed
    (ids,), (categories,), (boxes,), (flags,), (scores,) = columns
    return _Annotations(ids, categories, boxes, flags, scores, parts)


def _columns(rows: list[_Annotation]) -> Sequence[np.ndarray]:
    """Of a part: the columns of `_Annotations`. Raises Unusual for values that Python counts otherwise, or refuses."""
    n = len(rows)
    boxes = np.fromiter(chain.from_iterable(map(attrgetter("bbox"), rows)), np.float64, 4 * n).reshape(n, 4)
    area, crowd, ignore, score = (_column(rows, key, np.float64) for key in ("area", "iscrowd", "ignore", "score"))
    fine = np.abs(boxes).max(initial=0) < _EXACT and np.abs(area).max(initial=0) < _HUGE
    flags = ((crowd == 0) | (crowd == 1)) & ((ignore == 0) | (ignore == 1))
    if not (fine and flags.all() and ((score >= 0) & (score <= 1)).all()):
        raise Unusual("a value")
    found = _CROWD * (crowd == 1) + _IGNORE * (ignore == 1) + _EMPTY * (area <= 0)
    ids = (_column(rows, key, np.int64) for key in ("image_id", "category_id"))
    return *ids, boxes, found.astype(np.uint8), score.astype(np.float32)


def _column(rows: list[Any], key: str, kind: type) -> np.ndarray:
    return np.fromiter(map(attrgetter(key), rows), kind, len(rows))


# --- details: what `label_tables.tables_of` does, on columns --------------------------------------------


def _tables(
    file: Path, classes: list[dict[str, Any]], info: Any, images: _Images, annotations: _Annotations
) -> LabelTables:
    category_ids, categories = classes_of(classes, file)
    unlabeled = unlabeled_of(info, {value: i for i, value in enumerate(category_ids)}, file)
    rows = _places(images.ids, annotations.images)
    labels = _places(np.array(category_ids, np.int64), annotations.categories)
    real = np.flatnonzero(annotations.flags & _CROWD == 0)
    named = _named(images.ids, annotations, rows, labels, real)
    notes = _notes(classes, annotations, real)
    del real
    reasons = _reasons(annotations, rows, labels, images.sizes, unlabeled)
    kept = np.flatnonzero(reasons == 0)
    kept = kept[np.argsort(rows[kept], kind="stable")]
    boxes = np.empty((len(kept), 4), np.float32)
    for side in (0, 1):
        first = annotations.boxes[kept, side]
        boxes[:, side], boxes[:, side + 2] = first, first + annotations.boxes[kept, side + 2]
    flags, scores = annotations.flags[kept], annotations.scores[kept]
    crowd = flags & _CROWD > 0
    uncertain = flags & (_CROWD | _IGNORE) == _CROWD | _IGNORE
    return LabelTables(
        category_ids,
        categories,
        unlabeled,
        _dropped(reasons),
        notes,
        image_ids=images.ids,
        sizes=images.sizes,
        text=images.text,
        text_ends=images.text_ends,
        ends=np.cumsum(np.bincount(rows[kept], minlength=len(images.ids)), dtype=np.int64),
        objects=np.bincount(rows[kept[~crowd]], minlength=len(images.ids)).astype(np.int32),
        boxes=boxes,
        labels=labels[kept],
        crowd=crowd,
        uncertain=uncertain if uncertain.any() else None,
        scores=scores if (scores != 1).any() else None,
        named_ids=named[0],
        named_objects=named[1],
        named_most=named[2],
    )


def _places(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """int32: where each value is among the ids, which are different; -1: nowhere."""
    if not len(ids):
        return np.full(len(values), -1, np.int32)
    order = np.argsort(ids)
    found = order[np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)].astype(np.int32)
    found[ids[found] != values] = -1
    return found


def _reasons(
    annotations: _Annotations, rows: np.ndarray, labels: np.ndarray, sizes: np.ndarray, unlabeled: Sequence[int]
) -> np.ndarray:
    """uint8 [n]: 0, or 1 and more for the first of _DROPPED that leaves an annotation out."""
    found = np.zeros(len(rows), np.uint8)
    if not len(sizes):
        return found + 1
    x, y, w, h = annotations.boxes.T
    outside = np.minimum(x + w, sizes[rows, 1]) <= np.maximum(x, 0)
    outside |= np.minimum(y + h, sizes[rows, 0]) <= np.maximum(y, 0)
    empty = ~((w >= 1) & (h >= 1)) | (annotations.flags & _EMPTY > 0)
    reasons = (rows < 0, labels < 0, np.isin(labels, unlabeled), empty, outside)
    for number, why in reversed(list(enumerate(reasons, start=1))):
        found[why] = number
    return found


def _dropped(reasons: np.ndarray) -> Counter[str]:
    """In the order in which they come."""
    counts = np.bincount(reasons, minlength=len(_DROPPED) + 1)
    there = [number for number in range(1, len(counts)) if counts[number]]
    there.sort(key=lambda number: int((reasons == number).argmax()))
    return Counter({_DROPPED[number - 1]: int(counts[number]) for number in there})


def _named(
    ids: np.ndarray, annotations: _Annotations, rows: np.ndarray, labels: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`deploy.validate.labels.objects_of_images`. real: the numbers of annotations that are no crowd regions."""
    known, unknown = len(ids), np.unique(annotations.images[rows < 0])
    images = rows[real].astype(np.int64)
    images[images < 0] = known + np.searchsorted(unknown, annotations.images[real][images < 0])
    if not len(images):
        return (np.zeros(0, np.int64),) * 3
    first = np.empty(known + len(unknown), np.int64)
    first[images[::-1]] = np.arange(len(images))[::-1]  # of several that are given one place the last one stays
    kinds = labels[real].astype(np.int64)
    others = np.unique(annotations.categories[labels < 0])
    most_kinds = int(labels.max(initial=-1)) + 1
    kinds[kinds < 0] = most_kinds + np.searchsorted(others, annotations.categories[real][kinds < 0])
    pairs = np.sort(images * (most_kinds + len(others)) + kinds)
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    counts = np.diff(starts, append=len(pairs))
    of_image = pairs[starts] // (most_kinds + len(others))
    changes = np.flatnonzero(np.diff(of_image, prepend=-1))
    of_image = of_image[changes]
    order = np.argsort(first[of_image])
    objects, most = np.add.reduceat(counts, changes), np.maximum.reduceat(counts, changes)
    return np.concatenate([ids, unknown])[of_image[order]], objects[order], most[order]


def _notes(classes: list[dict[str, Any]], annotations: _Annotations, real: np.ndarray) -> tuple[str, ...]:
    """Column `notes`, in the order of `deploy.validate.labels.KINDS`."""
    notes = []
    repeated, pair = _repeated(annotations, real)
    if repeated:
        notes.append(line(box_twice(*(annotations.place(number) for number in pair)), repeated))
    if len(annotations.images):
        empty = list(empty_categories(classes, set(np.unique(annotations.categories).tolist())))
        notes += [line(empty[0], len(empty))] if empty else []
    return tuple(notes)


def _repeated(annotations: _Annotations, real: np.ndarray) -> tuple[int, tuple[int, int]]:
    """How many annotations have image, category and box of an earlier one; the first of them, and that earlier one."""
    columns = [annotations.images, annotations.categories, *annotations.boxes.T]
    digest = np.zeros(len(real), np.uint64)
    for column in columns:
        values = column[real] + column.dtype.type(0)  # -0.0 is 0.0
        digest = (digest ^ (digest >> np.uint64(32)) ^ values.view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    ordered = np.sort(digest)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(several):
        return 0, (0, 0)
    near = np.minimum(np.searchsorted(several, digest), len(several) - 1)
    alike = real[several[near] == digest]  # these may be: numbers of annotations, ascending
    seen: dict[tuple[Any, ...], int] = {}
    found = []
    for number, *key in zip(alike.tolist(), *(column[alike].tolist() for column in columns), strict=True):
        other = seen.setdefault(tuple(key), number)
        if other != number:
            found.append((number, other))
    return (len(found), found[0]) if found else (0, (0, 0))
