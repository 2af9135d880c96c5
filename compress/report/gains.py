"""How sure it is that one model of a run is better than another: intervals of differences of mAP.

Detections of both on the same validation images are compared on sets of them drawn again (`deploy.validate.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from compress.manifest import BASELINE, FINE_TUNED, STUDENT, TEACHER
from compress.report.document import STUDENT_IN_TORCH
from deploy.core.detection_table import DetectionTable
from deploy.core.progress import Progress
from deploy.validate.average_precision import matched_at_half
from deploy.validate.bootstrap import TIMES, Matches, drawn_aps, interval, mean_ap
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.kept import Kept

PAIRS = (
    (STUDENT, BASELINE),
    (STUDENT, FINE_TUNED),
    (STUDENT, TEACHER),
    (TEACHER, BASELINE),
    (TEACHER, FINE_TUNED),
)
"""Models that are compared where both are there."""


def compared(kept: Kept, files: Iterable[str], progress: Progress | None = None) -> list[dict[str, Any]]:
    """Entries of `comparisons` in report.json: `points` of mAP that `of` has more than `against`, and where 95 % of the
    drawn sets have that. files: names of exported files, which are compared with the student in PyTorch."""
    pairs = [*PAIRS, *((file, STUDENT_IN_TORCH) for file in files if file != STUDENT_IN_TORCH)]
    pairs = [(of, against) for of, against in pairs if of in kept and against in kept]
    return differences(kept, pairs, progress) if kept and pairs else []


def differences(kept: Kept, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[dict[str, Any]]:
    """The entries of pairs that are there. progress(done, total) is called after every drawn set."""
    names = dict.fromkeys(name for pair in pairs for name in pair)
    matches = {name: Matches(kept.truth, kept.table(name)) for name in names}
    values = {name: float(mean_ap(each.value())) for name, each in matches.items()}
    drawn = {name: mean_ap(aps) for name, aps in drawn_aps(matches, TIMES, progress=progress).items()}
    rows = []
    for of, against in pairs:
        found = interval(values[of] - values[against], drawn[of] - drawn[against])
        numbers = {"points": found.value, "low": found.low, "high": found.high}
        rows.append({"of": of, "against": against, **{key: round(value, 4) for key, value in numbers.items()}})
    return rows


def recalls(kept: Kept, names: Iterable[str], score: float) -> dict[str, dict[str, float | None]]:
    """Share of the objects of each class that detections of at least this score find at an IoU of 0.5, by the name of
    what is kept; None of a class without objects."""
    found = {}
    for name in names:
        if kept and name in kept:
            found[name] = _recall(kept.truth, kept.table(name), score)
    return found


# --- details --------------------------------------------------------------------------------------------


def _recall(truth: GroundTruth, table: DetectionTable, score: float) -> dict[str, float | None]:
    matched = matched_at_half(truth, table, np.flatnonzero(table.scores.astype(np.float64) >= score))
    right = np.bincount(truth.categories[matched.objects[matched.objects >= 0]], minlength=len(truth.names)).tolist()
    objects = np.bincount(truth.categories[truth.counts], minlength=len(truth.names)).tolist()
    shares = [round(hits / count, 4) if count else None for hits, count in zip(right, objects, strict=True)]
    return dict(zip(truth.names, shares, strict=True))
