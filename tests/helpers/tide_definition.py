"""TIDE's errors and a confusion matrix from their definitions, one box after the other. Pictures have no crowds."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

MENDABLE = ("localization", "classification")


def tide(document: Row, rows: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Points of AP50 that each kind costs, and how many there are."""
    objects, found = _matched(document, rows)
    for row in found:
        if row["right"]:
            continue
        here = [o for o in objects if o["image_id"] == row["image_id"]]
        own = [(_iou(row, o), n) for n, o in enumerate(here) if o["category_id"] == row["category_id"]]
        other = [(_iou(row, o), n) for n, o in enumerate(here) if o["category_id"] != row["category_id"]]
        s, near = max(own, default=(0.0, 0))
        o, wrong = max(other, default=(0.0, 0))
        if 0.1 <= s < 0.5:
            row["kind"], row["about"] = "localization", here[near]
        elif o >= 0.5:
            row["kind"], row["about"] = "classification", here[wrong]
        elif s >= 0.5:
            row["kind"] = "duplicate"
        elif s < 0.1 and o < 0.1:
            row["kind"] = "background"
        else:
            row["kind"] = "both"
    mendable = [row for row in found if row.get("kind") in MENDABLE]
    for row in mendable:
        rivals = [other["score"] for other in mendable if other["about"] is row["about"]]
        row["wins"] = not row["about"]["taken"] and row["score"] == max(rivals)

    base = _ap50(objects, found)
    costs = {}
    for kind in (*MENDABLE, "both", "duplicate", "background"):
        mended = []
        for row in found:
            if row.get("kind") != kind:
                mended.append(row)
            elif row.get("wins"):
                mended.append({**row, "right": True, "category_id": row["about"]["category_id"]})
        costs[kind] = (_ap50(objects, mended) - base, sum(row.get("kind") == kind for row in found))
    missed = [o for o in objects if not o["taken"]]
    nobody = [o for o in missed if not any(row["about"] is o for row in mendable)]
    for name, gone in (("missed", nobody), ("false negatives", missed)):
        left = [o for o in objects if not any(o is one for one in gone)]
        costs[name] = (_ap50(left, found, objects) - base, len(gone))
    right = [row for row in found if row["right"]]
    costs["false positives"] = (_ap50(objects, right) - base, len(found) - len(right))
    return costs


def confused(document: Row, rows: Sequence[Row]) -> Counter[tuple[str | None, str | None]]:
    """How often an object of a class is found as another one; None: no object, no detection."""
    names = {row["id"]: row["name"] for row in document["categories"]}
    objects, found = _matched(document, [row for row in rows if row["score"] >= 0.3], any_class=True)
    pairs: Counter[tuple[str | None, str | None]] = Counter()
    for row in found:
        pairs[names[row["object"]["category_id"]] if row["right"] else None, names[row["category_id"]]] += 1
    for entry in objects:
        if not entry["taken"]:
            pairs[names[entry["category_id"]], None] += 1
    return pairs


def _matched(document: Row, rows: Sequence[Row], any_class: bool = False) -> tuple[list[Row], list[Row]]:
    """Copies of objects with `taken`, and of detections, best first, with `right` and `object`."""
    objects = [{**entry, "taken": False} for entry in document["annotations"]]
    found = []
    for row in sorted(copy.deepcopy(list(rows)), key=lambda row: -row["score"]):
        free = [
            o
            for o in objects
            if o["image_id"] == row["image_id"]
            and (any_class or o["category_id"] == row["category_id"])
            and not o["taken"]
            and _iou(row, o) >= 0.5
        ]
        row["right"] = bool(free)
        if free:
            row["object"] = max(free, key=lambda o: _iou(row, o))
            row["object"]["taken"] = True
        found.append(row)
    return objects, found


def _ap50(objects: Sequence[Row], found: Sequence[Row], classes_of: Sequence[Row] | None = None) -> float:
    """Mean over the classes of `classes_of`, by default of the objects, in percent; `found` is best first."""
    values = []
    for kind in {entry["category_id"] for entry in classes_of or objects}:
        right = np.array([row["right"] for row in found if row["category_id"] == kind], bool)
        count = sum(entry["category_id"] == kind for entry in objects)
        if not count or not right.any():
            values.append(0.0)
            continue
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        recall = np.cumsum(right) / count
        values.append(np.mean([max(precision[recall >= step / 100 - 1e-12], default=0.0) for step in range(101)]))
    return float(100 * np.mean(values))


def _iou(row: Row, entry: Row) -> float:
    (ax, ay, aw, ah), (bx, by, bw, bh) = row["bbox"], entry["bbox"]
    width, height = min(ax + aw, bx + bw) - max(ax, bx), min(ay + ah, by + bh) - max(ay, by)
    both = max(width, 0.0) * max(height, 0.0)
    union = aw * ah + bw * bh - both
    return both / union if union > 0 else 0.0
