"""The rows of the page's tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.report.document import ROLES, Artifact, Engine, Figures, Layers, Models, Report
from compress.report.text import figure, ratio, signed


@dataclass(frozen=True)
class Cell:
    """tone: CSS class: good, bad or nothing."""

    text: str
    tone: str = ""


def model_rows(models: Models) -> list[tuple[str, dict[str, Cell]]]:
    """(metric, cells by column): the three roles, then the student against baseline and teacher."""
    rows = []
    limit = more_than_usual([models.teacher, models.baseline, models.student])
    for label, key, digits in (
        ("mAP", "map", 1),
        *([(f"mAP at {limit}", "map_at_max", 1)] if limit else []),
        ("AP50", "map50", 1),
        ("AP75", "map75", 1),
        ("Params, M", "params_m", 2),
        ("GFLOPs", "gflops", 2),
    ):
        values = {role: getattr(getattr(models, role), key) if getattr(models, role) else None for role in ROLES}
        cells = {role: Cell(figure(values[role], digits)) for role in ROLES}
        for other in ("baseline", "teacher"):
            value, reference = values["student"], values[other]
            if value is None or reference is None:
                cells["vs_" + other] = Cell("–")
            elif key.startswith("map"):
                cells["vs_" + other] = _delta(value - reference, judge=other == "baseline")
            elif reference > 0 and value > 0:
                cells["vs_" + other] = Cell("same" if value == reference else ratio(reference, value))
            else:
                cells["vs_" + other] = Cell("–")
        rows.append((label, cells))
    return rows


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


def artifact_row(a: Artifact) -> dict[str, Any]:
    """The cells of an exported file."""
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
        "backend": a.backend or (a.engine.machine.library if a.engine else "–"),
        "precision": a.precision or "–",
        "size": figure(a.size_mb, 1),
        "map": figure(a.map, 1),
        "map_at_max": figure(a.map_at_max, 1),
        "drop": figure(a.map_drop, 2),
        "training_drop": figure(a.training_drop, 2),
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


def class_rows(models: Models) -> list[dict[str, Any]]:
    """A row a class, best student AP first (the teacher's or baseline's where there is no student)."""
    per_class: dict[str, dict[str, float | None]] = {
        role: figures.per_class for role in ROLES if (figures := getattr(models, role)) and figures.per_class
    }
    names = list(dict.fromkeys(name for figures in per_class.values() for name in figures))
    order = per_class.get("student") or next(iter(per_class.values()), {})

    def rank(name: str) -> float:
        value = order.get(name)
        return 1.0 if value is None else -value

    rows = []
    for name in sorted(names, key=rank):
        bars = [(role, figures.get(name), figure(figures.get(name), 1)) for role, figures in per_class.items()]
        student, baseline = per_class.get("student", {}).get(name), per_class.get("baseline", {}).get(name)
        rows.append(
            {
                "name": name,
                "bars": bars,
                "delta": Cell("–") if student is None or baseline is None else _delta(student - baseline, judge=True),
            }
        )
    return rows


def _delta(value: float, *, judge: bool) -> Cell:
    text = signed(value, 1)
    return Cell(text, ("good" if text[0] == "+" else "bad" if text[0] == "−" else "") if judge else "")
