"""COCO's mean average precision written from its definition, one box after the other, without an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]
SMALL, MEDIUM, LARGE, ALL = (0, 32**2), (32**2, 96**2), (96**2, 1e10), (0, 1e10)


def mean_precision(
    document: Row, rows: Sequence[Row], *, limit: int = 100, sizes: tuple[float, float] = ALL
) -> float | None:
    """mAP in percent over thresholds and classes; None without an object of these sizes."""
    found = [_curve(document, rows, c, t, limit, sizes) for c in _classes(document) for t in THRESHOLDS]
    values = [_interpolated(*curve) for curve in found if curve is not None]
    return 100 * sum(values) / len(values) if values else None


def mean_recall(document: Row, rows: Sequence[Row], *, limit: int = 100) -> float | None:
    """Mean of the last recall in percent."""
    found = [_curve(document, rows, c, t, limit, ALL) for c in _classes(document) for t in THRESHOLDS]
    values = [sum(hits) / objects for hits, objects in (curve for curve in found if curve is not None)]
    return 100 * sum(values) / len(values) if values else None


def _classes(document: Row) -> list[int]:
    return [row["id"] for row in document["categories"]]


def _curve(
    document: Row, rows: Sequence[Row], category: int, threshold: float, limit: int, sizes: tuple[float, float]
) -> tuple[list[bool], int] | None:
    """Right or wrong of every detection that counts, best score first; and the number of objects."""
    scored: list[tuple[float, bool]] = []
    objects = 0
    for image in sorted(row["id"] for row in document["images"]):
        here = [r for r in document["annotations"] if (r["image_id"], r["category_id"]) == (image, category)]
        areas = [r.get("area", r["bbox"][2] * r["bbox"][3]) for r in here]
        truth = [
            (r["bbox"], bool(r.get("iscrowd", 0)), not sizes[0] <= area <= sizes[1])
            for r, area in zip(here, areas, strict=True)
        ]
        objects += sum(not crowd and not other for _, crowd, other in truth)
        found = [r for r in rows if (r["image_id"], r["category_id"]) == (image, category)]
        found.sort(key=lambda r: -r["score"])
        taken: set[int] = set()
        for row in found[:limit]:
            choice = None  # (counts, IoU, place): an object that counts before one that does not, then the best overlap
            for place, (box, crowd, other) in enumerate(truth):
                overlap = _overlap(row["bbox"], box, crowd)
                if (crowd or place not in taken) and overlap >= threshold - 1e-12:
                    choice = max(choice or (False, 0.0, 0), (not (crowd or other), overlap, place))
            if choice is None:
                if sizes[0] <= row["bbox"][2] * row["bbox"][3] <= sizes[1]:
                    scored.append((row["score"], False))
                continue
            taken.add(choice[2])
            if choice[0]:
                scored.append((row["score"], True))
    scored.sort(key=lambda pair: -pair[0])
    return ([right for _, right in scored], objects) if objects else None


def _interpolated(hits: list[bool], objects: int) -> float:
    """Mean over the recalls 0, 0.01, … 1 of the best precision at that recall or a higher one."""
    points: list[tuple[float, float]] = []
    for place, right in enumerate(hits):
        if right:
            found = sum(hits[: place + 1])
            points.append((found / objects, found / (place + 1)))
    return sum(max((p for r, p in points if r >= step / 100 - 1e-12), default=0.0) for step in range(101)) / 101


def _overlap(box: Sequence[float], other: Sequence[float], crowd: bool) -> float:
    sides = [min(box[i] + box[i + 2], other[i] + other[i + 2]) - max(box[i], other[i]) for i in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    both = sides[0] * sides[1]
    area = box[2] * box[3]
    return both / (area if crowd else area + other[2] * other[3] - both)
