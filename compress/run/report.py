"""report.json of a run: its models, its files, pictures; and the page made of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.config.data import Split
from compress.config.prune import Prune
from compress.config.pseudo import FineTune
from compress.console import open_console, progress
from compress.data.coco import CocoDetection
from compress.detectors.base import Capability, Detector
from compress.detectors.build import model_size
from compress.detectors.checkpoints import load_detector, load_teacher_checkpoint
from compress.manifest import (
    BASELINE,
    FINE_TUNED,
    PRUNE,
    PRUNED,
    STUDENT,
    STUDENT_ON_PSEUDO_LABELS,
    TEACHER,
    TEACHER_CHECK,
    RunFolder,
)
from compress.report import build_report, doubt_lines, summary_table
from compress.report.gains import compared, recalls
from compress.report.gallery import PICTURES, choose
from compress.report.headline import first_lines
from compress.report.reading import parse_report
from compress.run.samples import one_of_each, uncertainty_pictures
from deploy.core.card import SHOWN_SCORE
from deploy.core.environment import environment
from deploy.core.files import write_json
from deploy.core.storage import shown
from deploy.validate.bootstrap import TIMES
from deploy.validate.coco import load_annotations
from deploy.validate.differences import in_words
from deploy.validate.kept import Kept

MANY_IMAGES = 1000


@dataclass(frozen=True)
class ReportPlan:
    """Plan of a run's report.

    input_size: (height, width) that the models' operations are counted at.
    teacher: the checkpoint that is drawn beside the student; None: there is none, or it is of another library.
    has_teacher: one was measured in this run, drawn or not.
    methods: that the student learned by.
    pseudo_labels: what teachers labelled, for report.json; None: nothing.
    commands: that make this run and use its files.
    device: where torch runs.
    prune: how the student was cut; None: it was not.
    """

    name: str
    folder: RunFolder
    val: CocoDetection
    input_size: tuple[int, int]
    teacher: str | None
    has_teacher: bool
    pseudo_labels: Mapping[str, Any] | None
    commands: Sequence[str]
    device: str = "cpu"
    prune: Prune | None = None
    methods: Sequence[str] = ()


def write_report(plan: ReportPlan, artifacts: Sequence[Mapping[str, Any]]) -> None:
    """Write report.json and report.html. artifacts: a row for each file."""
    detectors = _detectors(plan)
    models = _models(plan, detectors)
    shown = {name: _shown_score(figures) for name, figures in models.items()}
    kept, names = Kept(plan.folder.evaluation), [row["file"] for row in artifacts]
    pictures = choose(kept, shown, names, PICTURES)
    uncertainty = []
    if TEACHER in detectors and Capability.DENSE in detectors[TEACHER].capabilities:
        with progress("uncertainty") as step:
            teacher = detectors[TEACHER].to(plan.device)
            uncertainty = uncertainty_pictures(plan.val, teacher, shown[TEACHER], one_of_each(pictures), progress=step)
    score = shown.get(STUDENT, SHOWN_SCORE)
    found = recalls(kept, names, score)
    quiet = len(plan.val) < MANY_IMAGES  # then the intervals take no time worth a line in a log
    with progress("intervals", at_least=TIMES + 1 if quiet else 0) as step:
        comparisons = compared(kept, names, step)
    report = {
        "name": plan.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "classes": list(plan.val.categories),
        "models": models,
        "pruning": _pruning(plan, detectors),
        "validation_images": len(plan.val),
        "comparisons": comparisons,
        "recall_score": score,
        "artifacts": [{**row, "recall": found[row["file"]]} if row["file"] in found else row for row in artifacts],
        "methods": list(plan.methods),
        "pseudo_labels": plan.pseudo_labels,
        "environment": environment(),
        "commands": list(plan.commands),
        "pictures": pictures,
        "uncertainty": uncertainty,
    }
    write_json(plan.folder.report, report)
    build_report(plan.folder.path)


def show_report(folder: RunFolder) -> None:
    """Print the first lines and the table of a run's report.json, why files fail the gate, and what was measured
    badly."""
    report = json.loads(folder.report.read_text(encoding="utf-8"))
    open_console().print(first_lines(parse_report(report)), markup=False)
    open_console().print(summary_table(report))
    for line in [*failures(report["artifacts"]), *doubt_lines(report, folder.path)]:
        open_console().print(line, markup=False, soft_wrap=True)


def failures(artifacts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say why files fail the gate, and in which pictures they differ most; empty where none fails."""
    lines = []
    for row in artifacts:
        if row["gate"] == "fail" and row.get("reason"):
            lines.append(f"{row['file']}: {row['reason']}")
            if row.get("differs_most"):
                lines.append(f"{row['file']}: differs most in images {in_words(row['differs_most'])}")
    return lines


def labelled_by_teachers(
    folder: RunFolder, stages: Sequence[str], labelled: Split | None, fine_tune: FineTune | None
) -> dict[str, Any]:
    """Sum up what the teachers labelled, for report.json. stages: rows of the manifest that say it. labelled: the
    images with labels of people, if there are any."""
    found = folder.stages()
    rows = [found[name]["result"] for name in stages]
    first = found.get(STUDENT_ON_PSEUDO_LABELS) if fine_tune is not None else None
    return {
        **{key: sum(row[key] for row in rows) for key in ("images", "labels", "regions", "skipped")},
        "labelled_images": 0 if labelled is None else len(load_annotations(labelled.annotations)["images"]),
        "teachers": rows[0]["teachers"] if rows else [],
        "first_stage_map": None if first is None else first["result"]["metrics"]["map"],
    }


def commands(folder: RunFolder, split: Split) -> list[str]:
    """Commands that make the run, and use its files."""
    exported = folder.onnx()
    lines = [
        f"compress run {folder.recipe}",
        f"compress export {folder.weights()}",
        f"compress validate {exported} --data {split.annotations} --images {split.images}",
        f"compress benchmark {exported} --images {split.images} --batch 1,8",
        f"compress report {folder.path}",
    ]
    return [shown(line) for line in lines]


# --- details --------------------------------------------------------------------------------------------


def _detectors(plan: ReportPlan) -> dict[str, Detector]:
    """Every detector of the run that is there; of a pruned student also those that it is compared with."""
    stages = plan.folder.stages()
    found = {} if plan.teacher is None else {TEACHER: load_teacher_checkpoint(plan.teacher)[0]}
    for name in _compared(plan):
        if plan.folder.weights(name).is_file() and _stage(name) in stages:
            found[name] = load_detector(plan.folder.weights(name))[0]
    return found


def _compared(plan: ReportPlan) -> tuple[str, ...]:
    if plan.prune is None:
        return BASELINE, STUDENT
    alone = () if not plan.methods and plan.pseudo_labels is None else (FINE_TUNED,)  # else the student is that
    return PRUNED, BASELINE, *alone, STUDENT


def _stage(name: str) -> str:
    """The row of the manifest with a model's figures."""
    return {TEACHER: TEACHER_CHECK, PRUNED: PRUNE}.get(name, name)


def _models(plan: ReportPlan, detectors: Mapping[str, Detector]) -> dict[str, Any]:
    """Figures of the models."""
    stages = plan.folder.stages()
    models = {}
    if plan.has_teacher and TEACHER not in detectors and TEACHER_CHECK in stages:
        models[TEACHER] = dict(stages[TEACHER_CHECK]["result"]["metrics"])
    for name, detector in detectors.items():
        measured = name != TEACHER or (plan.has_teacher and TEACHER_CHECK in stages)
        result = stages[_stage(name)]["result"] if measured else {"metrics": {}}
        models[name] = {**result["metrics"], **model_size(detector, plan.input_size)}
        if "seconds" in result:
            models[name]["train_seconds"] = result["seconds"]
    if STUDENT_ON_PSEUDO_LABELS in stages and STUDENT in models:
        models[STUDENT]["train_seconds"] += stages[STUDENT_ON_PSEUDO_LABELS]["result"]["seconds"]
    return models


def _shown_score(figures: Mapping[str, Any]) -> float:
    """The score from which a model's detections are drawn: that of its best F1, where it was measured."""
    point = figures.get("operating_point")
    return SHOWN_SCORE if point is None else float(point["score"])


def _pruning(plan: ReportPlan, detectors: Mapping[str, Detector]) -> dict[str, Any] | None:
    """How the student was cut, its layers in their order; None where it was not."""
    if plan.prune is None or PRUNED not in detectors:
        return None
    settings = plan.prune.model_dump(mode="json", include={"of", "importance", "shares", "round_to", "schedule"})
    found = {key: value for key, value in plan.folder.result(PRUNE).items() if key not in ("metrics", "canvas")}
    order = {name: index for index, (name, _) in enumerate(detectors[PRUNED].named_modules())}
    return settings | found | {"rows": sorted(found["rows"], key=lambda row: order[row["name"]])}
