"""The rows of the page's tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.manifest import BASELINE, FINE_TUNED, PRUNED, STUDENT, TEACHER
from compress.report.document import Artifact, Comparison, Engine, Figures, Layers, Models, Report
from compress.report.text import figure, lower, ratio, signed


@dataclass(frozen=True)
class Cell:
    """tone: CSS class: good, bad or nothing. small: what stands below."""

    text: str
    tone: str = ""
    small: str = ""


@dataclass(frozen=True)
class ModelTable:
    """columns: names of the figures. rows: role, title and cells; no cells: the run has no such model. comparisons:
    title and cells of the student against another model."""

    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    comparisons: list[tuple[str, list[Cell]]]


def model_table(report: Report) -> ModelTable | None:
    """A row for each model, with its latency in PyTorch, then the student against those that it is compared with; None
    without any model."""
    models = report.models
    if not any(models.of(role) for role in models.titles):
        return None
    limit = more_than_usual(models.of(role) for role in models.titles)
    columns = [
        ("mAP", "map", 1),
        *([(f"mAP at {limit}", "map_at_max", 1)] if limit else []),
        ("AP50", "map50", 1),
        ("AP75", "map75", 1),
        ("Params, M", "params_m", 2),
        ("GFLOPs", "gflops", 2),
    ]
    timed = any(row is not None and row.p50 is not None for row in map(report.in_torch, models.titles))
    rows, comparisons = [], []
    for role, title in models.titles.items():
        figures = models.of(role)
        cells = [Cell(figure(getattr(figures, key), digits)) for _, key, digits in columns] if figures else []
        if figures and timed:
            cells.append(_latency(report.in_torch(role)))
        rows.append((role, title, cells))
    student = models.student
    for role in (BASELINE, FINE_TUNED, TEACHER):
        other = models.of(role)
        if student is None or other is None:
            continue
        found = report.compared(STUDENT, role)
        judge = role != TEACHER and not (found is not None and found.is_noise)
        cells = [_against(key, getattr(student, key), getattr(other, key), judge=judge) for _, key, _ in columns]
        if found is not None:
            cells[0] = Cell(cells[0].text, cells[0].tone, _range(found))
        if timed:
            cells.append(_times_as_fast(report.in_torch(STUDENT), report.in_torch(role)))
        comparisons.append((f"Student against {_named(role, models)}", cells))
    return ModelTable([*(name for name, _, _ in columns), *["PyTorch, ms"] * timed], rows, comparisons)


def _range(found: Comparison | None) -> str:
    return "" if found is None else f"{signed(found.low, 1)} to {signed(found.high, 1)}"


def _latency(row: Artifact | None) -> Cell:
    if row is None or row.p50 is None:
        return Cell("–")
    return Cell(f"{row.p50:.2f} ?", "doubt") if row.latency_doubts else Cell(f"{row.p50:.2f}")


def _times_as_fast(student: Artifact | None, other: Artifact | None) -> Cell:
    """A ratio of two latencies, where both were measured well."""
    if student is None or other is None or not student.well_timed or not other.well_timed:
        return Cell("–")
    return Cell(f"{other.well_timed / student.well_timed:.1f}× as fast")


def reference_words(report: Report) -> str:
    """Say what the files are compared with, and how it stands to what training measured."""
    row = report.in_torch(STUDENT)
    if row is None or row.map is None or report.models.student is None:
        return ""
    words = f"The reference has {row.map:.1f} mAP on this path"
    if row.training_drop is not None and report.models.student.map is not None:
        words += f", where training measured {report.models.student.map:.1f}"
    if row.gate == "fail":
        words += f"; it fails its own gate: {row.reason or 'it is not what training measured'}"
    return f"{words}."


def _named(role: str, models: Models) -> str:
    """A model that the student is compared with, within a sentence."""
    if models.is_pruned and role != TEACHER:
        return {BASELINE: "the one from scratch", FINE_TUNED: "the one on labels alone"}[role]
    return lower(models.titles[role])


def _against(key: str, value: float | None, reference: float | None, *, judge: bool) -> Cell:
    if value is None or reference is None:
        return Cell("–")
    if key.startswith("map"):
        return _delta(value - reference, judge=judge)
    if reference > 0 and value > 0:
        return Cell("same" if value == reference else ratio(reference, value))
    return Cell("–")


def more_than_usual(figures: Iterable[Figures | Artifact | None]) -> int | None:
    """The largest number of detections of an image that an mAP of its own counts; None where only COCO's 100 do."""
    return max((row.max_detections for row in figures if row is not None and row.max_detections), default=None)


def pseudo_labels(report: Report) -> list[str]:
    """Say in sentences what teachers labelled; empty where they did not."""
    found, student = report.pseudo_labels, report.models.student
    if found is None:
        return []
    teachers = ", ".join(found.teachers) or "teachers"
    images = f"{found.labelled_images:,} images with labels, and on {found.images:,} that {teachers} labelled"
    words = [
        f"The student was trained on {images}: {found.labels:,} boxes, and {found.regions:,} regions that are neither "
        "object nor background."
    ]
    if found.skipped:
        words.append(f"{found.skipped:,} images could not be read and were left out.")
    if found.first_stage_map is not None and student is not None and student.map is not None:
        words.append(
            f"Fine-tuning on the images with labels took it from {found.first_stage_map:.1f} to {student.map:.1f} mAP."
        )
    return words


def artifact_row(a: Artifact, found: Comparison | None = None) -> dict[str, Any]:
    """The cells of an exported file. found: how it stands to the student in PyTorch."""
    latency = {
        name: figure(getattr(a.latency_ms, name) if a.latency_ms else None, 2) for name in ("p50", "p90", "p95", "p99")
    }
    word, _, why = a.gate.partition(":")
    if word == "fail":
        why = a.reason or ""
        if a.differs_most:
            pictures = ", ".join(f"{picture.id} ({picture.file})" for picture in a.differs_most)
            why = "; ".join(filter(None, (why, f"differs most in images {pictures}")))
    return {
        "file": a.file,
        "label": a.label,
        "doubts": "; ".join(a.latency_doubts),
        "backend": a.backend or (a.engine.machine.library if a.engine else "–"),
        "precision": a.precision or "–",
        "size": figure(a.size_mb, 1),
        "map": figure(a.map, 1),
        "map_at_max": figure(a.map_at_max, 1),
        "drop": figure(a.map_drop, 2).replace("-", "−"),
        "drop_range": "" if found is None else f"{signed(-found.high, 2)} to {signed(-found.low, 2)}",
        "training_drop": figure(a.training_drop, 2).replace("-", "−"),
        "agreement": "–" if a.agreement is None else f"{100 * a.agreement:.1f} %",
        "throughput": figure(a.throughput_ips, 0 if (a.throughput_ips or 0) >= 100 else 1),
        "in_float32": "" if a.half is None else ", ".join(f"{name} {why}" for name, why in a.half.float32.items()),
        "note": a.note or "",
        "gate": word,
        "why": why.strip(),
        "gate_class": {"pass": "pass", "fail": "fail"}.get(word, "notrun"),
        "timed": a.p50 is not None,
        **latency,
    }


def engine_row(file: str, engine: Engine) -> dict[str, str]:
    """Make a row of an engine's card; it holds whether the engine could run here or not."""
    built, (smallest, best, largest) = engine.machine, engine.options.batches
    batches = f"{smallest}" if smallest == largest else f"{smallest} to {largest}, best at {best}"
    layers = engine.layers_missing or "not known"
    if engine.layers is not None:
        layers = f"{engine.layers.count}: {_formats(engine.layers)}"
    return {
        "file": file,
        "library": f"{built.library} {built.version}".strip(),
        "gpu": built.gpu or "none",
        "batches": batches,
        "network": _formats(engine.network),
        "layers": layers,
        "seconds": figure(engine.build_seconds, 0),
    }


def _formats(layers: Layers) -> str:
    """Share of each number format, largest first."""
    shares = sorted(layers.share.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.0%} {name}" for name, share in shares) or "–"


@dataclass(frozen=True)
class ClassTable:
    """roles: (role, title) of the bars of each class. against: title of the model that the student is compared with;
    None: there is none. rows: name, (role, AP, its text) for each bar, difference."""

    roles: list[tuple[str, str]]
    against: str | None
    rows: list[tuple[str, list[tuple[str, float | None, str]], Cell]]


def class_table(report: Report) -> ClassTable | None:
    """A row a class, best student AP first (that of another model where there is no student); None without any. The
    student is compared with the model that learned like it, but for the teacher."""
    models = report.models
    per_class: dict[str, dict[str, float | None]] = {
        role: figures.per_class
        for role in models.titles
        if role != PRUNED and (figures := models.of(role)) and figures.per_class
    }
    names = list(dict.fromkeys(name for figures in per_class.values() for name in figures))
    if not names:
        return None
    order = per_class.get(STUDENT) or next(iter(per_class.values()))

    def rank(name: str) -> float:
        value = order.get(name)
        return 1.0 if value is None else -value

    other = next((role for role in (FINE_TUNED, BASELINE) if role in per_class), None)
    found = None if other is None else report.compared(STUDENT, other)
    judge = not (found is not None and found.is_noise)  # of classes there is no interval
    rows = []
    for name in sorted(names, key=rank):
        bars = [(role, figures.get(name), figure(figures.get(name), 1)) for role, figures in per_class.items()]
        student, reference = per_class.get(STUDENT, {}).get(name), per_class.get(other or "", {}).get(name)
        rows.append((name, bars, _against("map", student, reference, judge=judge)))
    roles = [(role, models.titles[role]) for role in per_class]
    against = None if other is None else "labels alone" if other == FINE_TUNED else lower(models.titles[other])
    return ClassTable(roles, against, rows)


def _delta(value: float, *, judge: bool) -> Cell:
    text = signed(value, 1)
    return Cell(text, ("good" if text[0] == "+" else "bad" if text[0] == "−" else "") if judge else "")
