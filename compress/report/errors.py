"""Section "Errors" of the page: what costs mAP, where it is low, and which classes are confused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.manifest import STUDENT
from compress.report.document import Artifact, Report, ShapeMap, Slice
from compress.report.text import figure, signed
from deploy.validate.tide import KINDS

MOST_CLASSES = 12
"""Classes that a matrix shows; of more, the pairs that are confused most are named."""
MOST_PAIRS = 12


@dataclass(frozen=True)
class Confused:
    """A table of counts. rows: the object, then cells with their share of the row, 0 to 1."""

    columns: list[str]
    rows: list[tuple[str, list[tuple[str, float]]]]


@dataclass(frozen=True)
class Pair:
    """An object of a class that is found as another one, how often, and the share of the objects of that class."""

    object: str
    found: str
    count: int
    share: str


@dataclass(frozen=True)
class LostRecall:
    """Of detections with a score of at least `score`: classes, the student's recall, and the points that each file
    loses, with a CSS class."""

    score: float
    files: list[str]
    rows: list[tuple[str, str, list[tuple[str, str]]]]


@dataclass(frozen=True)
class Errors:
    """kinds: title and explanation of each kind of error. costs: file, and for each kind its points and how many.
    columns: of mAP, all, by size, shape and slice, with the number of objects or images. maps: file and cells.
    recall: classes whose recall files lose; None: nobody looked, or none loses any.
    file: whose classes are confused, at a score of at least `score`; matrix or, of many classes, pairs.
    """

    kinds: list[tuple[str, str]]
    costs: list[tuple[str, list[tuple[str, str]]]]
    columns: list[tuple[str, str]]
    maps: list[tuple[str, list[str]]]
    file: str
    score: float
    matrix: Confused | None
    pairs: list[Pair]
    recall: LostRecall | None


def errors_section(report: Report) -> Errors | None:
    """Of the files that were validated; None where none was looked at."""
    looked_at = [a for a in report.artifacts if a.analysis is not None]
    if not looked_at:
        return None
    costs = []
    for a in looked_at:
        errors = (a.analysis.errors if a.analysis else None) or {}
        cells = [errors.get(kind) for kind in KINDS]
        costs.append((a.label, [("–", "") if c is None else (figure(c.points, 1), f"{c.count:,}") for c in cells]))
    shapes = list(dict.fromkeys((s.name, s.objects) for a in looked_at for s in _shapes(a)))
    slices = list(dict.fromkeys((s.name, s.images) for a in looked_at for s in _slices(a)))
    names = ["small", "medium", "large"]
    columns = [("All", ""), *((name.capitalize(), "") for name in names)]
    maps = []
    for a in looked_at:
        found = {(s.name, s.images): s.map for s in _slices(a)}
        shaped = {(s.name, s.objects): s.map for s in _shapes(a)}
        values = [a.map, a.map_small, a.map_medium, a.map_large, *(shaped.get(key) for key in shapes)]
        values += [found.get(key) for key in slices]
        maps.append((a.label, [figure(value, 1) for value in values]))
    first = looked_at[0]
    assert first.analysis is not None
    classes = _classes(first.analysis.confusion, report.classes)
    few = len(classes) <= MOST_CLASSES
    return Errors(
        kinds=[(kind.capitalize(), words) for kind, words in KINDS.items()],
        costs=costs,
        columns=[
            *columns,
            *((name.capitalize(), f"{number:,} object{'' if number == 1 else 's'}") for name, number in shapes),
            *((name, f"{images:,} image{'' if images == 1 else 's'}") for name, images in slices),
        ],
        maps=maps,
        file=first.label,
        score=first.analysis.confusion_score,
        matrix=_matrix(first.analysis.confusion, classes) if few and classes else None,
        pairs=[] if few else _pairs(first.analysis.confusion),
        recall=_lost_recall(report),
    )


# --- details --------------------------------------------------------------------------------------------

Counts = Sequence[tuple[str | None, str | None, int]]


def _slices(a: Artifact) -> list[Slice]:
    return a.analysis.slices if a.analysis else []


def _shapes(a: Artifact) -> list[ShapeMap]:
    return a.analysis.shapes if a.analysis else []


def _lost_recall(report: Report) -> LostRecall | None:
    """The classes of which some file finds fewer objects than the student in PyTorch, most lost first."""
    student, score = report.in_torch(STUDENT), report.recall_score
    files = [a for a in report.files if a.recall]
    if student is None or not student.recall or not files or score is None:
        return None
    losses: dict[str, list[float | None]] = {}
    for name, value in student.recall.items():
        others = [a.recall.get(name) for a in files]
        if value is not None:
            losses[name] = [None if other is None else 100 * (value - other) for other in others]
    worst = {name: max((loss for loss in row if loss is not None), default=0.0) for name, row in losses.items()}
    order = sorted((name for name in losses if worst[name] > 0.05), key=lambda name: -worst[name])[:MOST_CLASSES]
    rows = []
    for name in order:
        cells = [("–", "") if x is None else (signed(-x, 1), "bad" if x > 0.05 else "") for x in losses[name]]
        rows.append((name, figure(100 * (student.recall[name] or 0), 1), cells))
    return LostRecall(score, [a.label for a in files], rows)


def _classes(counts: Counts, order: Sequence[str]) -> list[str]:
    """The classes that occur, in the order of the report."""
    seen = {name for pair in counts for name in pair[:2] if name is not None}
    return sorted(seen, key=lambda name: (order.index(name) if name in order else len(order), name))


def _matrix(counts: Counts, classes: Sequence[str]) -> Confused:
    found = {(thing, as_what): count for thing, as_what, count in counts}
    rows = []
    for thing in (*classes, None):
        numbers = [found.get((thing, as_what), 0) for as_what in (*classes, None)]
        total = max(1, sum(numbers))
        cells = [(f"{number:,}" if number else "·", number / total) for number in numbers]
        rows.append(("no object" if thing is None else thing, cells if thing is not None else [*cells[:-1], ("", 0.0)]))
    return Confused([*classes, "not found"], rows)


def _pairs(counts: Counts) -> list[Pair]:
    """Pairs of two classes, most frequent first."""
    objects: dict[str, int] = {}
    for thing, _, count in counts:
        if thing is not None:
            objects[thing] = objects.get(thing, 0) + count
    wrong = [(a, b, n) for a, b, n in counts if a is not None and b is not None and a != b]
    return [Pair(a, b, n, f"{100 * n / objects[a]:.1f} %") for a, b, n in wrong[:MOST_PAIRS]]
