"""Which validation pictures a report shows, and why: `choose(kept, shown, files, many)`.

The worst and the best of the student, those on which teacher and student differ most, those on which a file differs
most from the student, and some of all. What was kept of the evaluation says which; no model and no image is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.manifest import BASELINE, STUDENT, TEACHER
from compress.report.document import STUDENT_IN_TORCH
from deploy.core.card import SHOWN_SCORE
from deploy.core.detection_table import DetectionTable
from deploy.core.shown import counted
from deploy.core.storage import shown
from deploy.validate.average_precision import matched_at_half
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.kept import Kept

PICTURES = 12
"""Pictures in a report, unless more are asked for."""
MOST = 200
"""Pictures that a page can hold."""
KINDS = {
    "worst": "Worst of the student",
    "best": "Best of the student",
    "teacher": "Teacher and student differ",
    "file": "A file differs",
    "sample": "Samples",
}
"""Why a picture is there, and what that is called."""


def choose(kept: Kept, shown: Mapping[str, float], files: Iterable[str], many: int) -> list[dict[str, Any]]:
    """Entries of `pictures` in report.json, by kind; none where nothing was kept.

    shown: the score from which detections of each model are shown. files: names of exported files. many: pictures.
    """
    if not kept or STUDENT not in kept:
        return []
    cut = {role: shown.get(role, SHOWN_SCORE) for role in (TEACHER, BASELINE, STUDENT)}
    found = {role: _Shown.of(kept, role, cut[role]) for role in cut if role in kept}
    others = {file: _Shown.of(kept, file, cut[STUDENT]) for file in files if file in kept and file != STUDENT_IN_TORCH}
    queues = _queues(kept, found, others)
    chosen: dict[int, tuple[str, str, str]] = {}
    while queues and len(chosen) < many:
        for kind in list(queues):
            entry = next((entry for entry in queues[kind] if entry[0] not in chosen), None)
            if entry is None:
                del queues[kind]
            elif len(chosen) < many:
                chosen[entry[0]] = (kind, entry[1], entry[2])
    order = sorted(chosen, key=lambda place: list(KINDS).index(chosen[place][0]))  # stable: best match first
    return [_entry(kept, place, *chosen[place], found, others) for place in order]


# --- details --------------------------------------------------------------------------------------------

Queue = Iterator[tuple[int, str, str]]
"""Places of images, most fitting first, with the reason in words and the file that it is about."""


@dataclass(frozen=True)
class _Shown:
    """Detections that are shown: rows of a table from a score on. images: their places [n]."""

    table: DetectionTable
    rows: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, kept: Kept, name: str, score: float) -> _Shown:
        table = kept.table(name)
        rows = np.flatnonzero(table.scores.astype(np.float64) >= score)
        return cls(table, rows, np.searchsorted(kept.truth.image_ids, table.image_ids[rows]))

    def as_objects(self, truth: GroundTruth) -> GroundTruth:
        """These detections in the place of the labels."""
        n = len(self.rows)
        return GroundTruth(
            image_ids=truth.image_ids,
            category_ids=truth.category_ids,
            names=truth.names,
            images=self.images.astype(np.int32),
            categories=np.searchsorted(truth.category_ids, self.table.category_ids[self.rows]).astype(np.int32),
            boxes=self.table.xywh(self.rows),
            areas=np.ones(n),
            crowd=np.zeros(n, bool),
        )


def _counts(objects: GroundTruth, found: _Shown) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many objects each image has, how many of them are found, and how many detections are wrong: int [images]."""
    matched = matched_at_half(objects, found.table, found.rows)
    images = np.searchsorted(objects.image_ids, found.table.image_ids[matched.rows])
    right = matched.objects >= 0
    there, hits, extra = (
        np.bincount(places, minlength=len(objects.image_ids))
        for places in (objects.images[objects.counts], images[right], images[~right])
    )
    return there, hits, extra


def _queues(kept: Kept, found: Mapping[str, _Shown], others: Mapping[str, _Shown]) -> dict[str, Queue]:
    student, images = found[STUDENT], len(kept.truth.image_ids)
    there, hits, extra = _counts(kept.truth, student)
    f1 = 2 * hits / np.maximum(there + hits + extra, 1)

    def told(word: str) -> Callable[[int], str]:
        return lambda i: f"{word}: {hits[i]} of {there[i]} objects found, {extra[i]} extra"

    wrong = np.flatnonzero((there > hits) | (extra > 0))
    some = np.flatnonzero(there > 0)
    worst = wrong[np.lexsort((-(there - hits + extra)[wrong], f1[wrong]))]
    best = some[np.lexsort((-there[some], -f1[some]))]
    queues = {"worst": _queue(worst, told("Among the worst")), "best": _queue(best, told("Among the best"))}
    if TEACHER in found:
        apart = _apart(kept.truth, student, found[TEACHER])
        queues["teacher"] = _queue(_most(apart), lambda i: f"Teacher and student differ: {_boxes(apart[i])}")
    differences = {file: _apart(kept.truth, student, other) for file, other in others.items()}
    if differences:
        file = max(differences, key=lambda name: int(differences[name].sum()))
        most = differences[file]
        queues["file"] = _queue(_most(most), lambda i: f"{file} and the student differ: {_boxes(most[i])}", file)
    step = max(1, images // PICTURES)
    order = np.concatenate([np.arange(start, images, step) for start in range(step)])
    queues["sample"] = _queue(order, lambda i: "A sample: taken at even steps, whatever was found")
    return queues


def _queue(places: np.ndarray, why: Callable[[int], str], file: str = "") -> Queue:
    return ((place, why(place), file) for place in places.tolist())


def _apart(truth: GroundTruth, one: _Shown, other: _Shown) -> np.ndarray:
    """Boxes of either side that the other side has not, of the same class at an IoU of 0.5: int [images]."""
    there, hits, extra = _counts(other.as_objects(truth), one)
    missed: np.ndarray = there - hits + extra
    return missed


def _most(apart: np.ndarray) -> np.ndarray:
    order = np.argsort(-apart, kind="stable")
    return order[apart[order] > 0]


def _boxes(number: int) -> str:
    return f"{counted(int(number), 'box')} that only one of them has"


def _entry(
    kept: Kept,
    place: int,
    kind: str,
    why: str,
    file: str,
    found: Mapping[str, _Shown],
    others: Mapping[str, _Shown],
) -> dict[str, Any]:
    truth, number = kept.truth, int(kept.truth.image_ids[place])
    mine = np.flatnonzero((truth.images == place) & ~truth.crowd)
    labels = [truth.names[label] for label in truth.categories[mine].tolist()]
    drawn = {role: _drawn(truth, place, shown) for role, shown in found.items()}
    return {
        "image": shown(kept.path(number)),
        "id": number,
        "kind": kind,
        "why": why,
        "ground_truth": _as_boxes(truth.boxes[mine], labels, None),
        **drawn,
        **({"files": {file: _drawn(truth, place, others[file])}} if file else {}),
    }


def _drawn(truth: GroundTruth, place: int, shown: _Shown) -> list[dict[str, Any]]:
    rows = shown.rows[shown.images == place]
    rows = rows[np.argsort(-shown.table.scores[rows], kind="stable")]
    labels = np.searchsorted(truth.category_ids, shown.table.category_ids[rows]).tolist()
    return _as_boxes(shown.table.xywh(rows), [truth.names[label] for label in labels], shown.table.scores[rows])


def _as_boxes(boxes: np.ndarray, labels: Sequence[str], scores: np.ndarray | None) -> list[dict[str, Any]]:
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).round(1).tolist()
    if scores is None:
        return [{"box": box, "label": label} for box, label in zip(corners, labels, strict=True)]
    rows = zip(corners, labels, scores.astype(np.float64).round(3).tolist(), strict=True)
    return [{"box": box, "label": label, "score": score} for box, label, score in rows]
