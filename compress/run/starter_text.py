"""What `compress init` knows and chose, and the recipe's text that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.config.data import Split
from compress.config.teacher import Source
from compress.detectors.base import Detector
from compress.training.time_left import in_words
from deploy.core.environment import usable_cores
from deploy.core.shown import counted
from deploy.core.storage import shown

TEACHER_LONGER = 1.5  # than its student
CACHE_SHARE = 0.2
"""Share of the memory that decoded pictures may take."""
FEW_CORES = 4
"""With 2 a step took 0.4 s without a loader process and 0.5 s with one."""


@dataclass(frozen=True)
class Wishes:
    """What the user wants. budget: seconds for the whole run.

    device: cpu, cuda, or None for what is there. teacher: one that is there; None: one is trained first.
    unlabeled: folder of more pictures, for a teacher to label.
    """

    name: str
    train: Split
    val: Split
    budget: float
    device: str | None = None
    teacher: Source | None = None
    unlabeled: Path | None = None


@dataclass(frozen=True)
class Facts:
    """Of the pictures and their objects.

    images, val_images, boxes: counts. names: of the classes, by id. sides: (short, long) of the middle picture.
    mixed: pictures of several shapes. object_share: side of an object as a share of its picture's long side; three
    quarters have more. most_objects: in one picture. bytes: of all decoded pictures.
    """

    images: int
    val_images: int
    boxes: int
    names: Mapping[int, str]
    sides: tuple[int, int]
    mixed: bool
    object_share: float
    most_objects: int
    bytes: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)


@dataclass(frozen=True)
class Choice:
    """A pair of student and teacher. student, teacher: sections of a recipe. pretrained: with ImageNet weights."""

    student: Mapping[str, Any]
    teacher: Mapping[str, Any]
    pretrained: bool = False


@dataclass(frozen=True)
class Draft:
    """A recipe before it is written.

    limits: (short, long) of the images. steps: of the student. batch: images a step. head_norm: of the student.
    seconds: that the whole run is expected to take.
    """

    choice: Choice
    limits: tuple[int, int]
    steps: int
    batch: int
    head_norm: str = "group"
    seconds: float = 0.0

    def epochs(self, facts: Facts, steps: int) -> float:
        """Passes over the images in so many steps."""
        return steps / max(1, facts.images // self.batch)

    def long_side(self, facts: Facts) -> float:
        """Of the middle picture in the network input, pixels."""
        short, long = self.limits
        return facts.sides[1] * min(short / facts.sides[0], long / facts.sides[1])


@dataclass(frozen=True)
class Teaching:
    """What there is to learn from.

    choices: of student and teacher. given: the teacher that is there. method: name and settings of a method that fits
    it; None: it only labels. inherit: the student takes its neck and head. limits: (short, long) of its training.
    """

    choices: tuple[Choice, ...]
    given: Detector | None = None
    source: Source | None = None
    method: str | None = None
    inherit: bool = False
    limits: tuple[int, int] | None = None
    """What the teacher was trained on."""


def recipe_text(draft: Draft, wishes: Wishes, facts: Facts, taught: Teaching, device: str) -> str:
    """The recipe, with what was chosen and why."""
    short, long = draft.limits
    px = facts.object_share * draft.long_side(facts)
    cached = facts.bytes <= CACHE_SHARE * _memory()
    student = dict(draft.choice.student) | ({"head_norm": "batch"} if draft.head_norm == "batch" else {})
    why_norm = "  # much of the canvas is padding, which BatchNorm does not see" if draft.head_norm == "batch" else ""
    boxes = (
        ""
        if facts.most_objects <= 80
        else f"\n  max_detections: {facts.most_objects * 5 // 4}"
        + (f"  # up to {facts.most_objects} objects in a picture")
    )
    files = "[fp32, fp16]\n  providers: [cuda]" if device == "cuda" else "[fp32, int8]"
    rows = [
        f"# For {facts.images} images of {counted(facts.classes, 'class')} and a run of about "
        f"{in_words(draft.seconds)} on this {device}; written by compress init.",
        "# All keys: docs/recipe.md. More steps, larger images (short, long) and a larger backbone win most.",
        f"name: {wishes.name}",
        "seed: 0",
        "",
        "data:",
        *(
            f"  {key}: {{annotations: {_quoted(split.annotations)}, images: {_quoted(split.images)}}}"
            for key, split in (("train", wishes.train), ("val", wishes.val))
        ),
        f"  short: {short}",
        f"  long: {long}  # three quarters of the objects are larger than {px:.0f} px then",
        "  flip: 0.5  # 0 where left and right matter: text, road signs",
        "  photometric: true",
        "  scale_jitter: [0.8, 1.25]",
        f"  workers: {_workers(device)}",
        f"  cache: {str(cached).lower()}  # decoded pictures are {facts.bytes / 1e9:.1f} GB",
        "",
        *_sections_of_teacher(draft, facts, taught, device),
        f"student: {_flow(student)}{why_norm}",
        "",
        *([f"methods:\n  {taught.method}", ""] if taught.method else []),
        *_pseudo_labels(wishes, taught),
        "train:",
        *_schedule(draft, draft.steps, facts, device),
        "",
        "baseline: true  # the same student without a teacher, to see what it won; takes nearly as long as the student",
        "",
        "deploy:",
        f"  precisions: {files}{boxes}",
        "  benchmark: {batch_sizes: [1, 8], seconds: 2}",
    ]
    return "\n".join(rows) + "\n"


def _workers(device: str) -> int:
    """Loader processes. Those of a CPU take its cores from the steps: with few cores that costs more than it gives."""
    cores = usable_cores()
    return 0 if device == "cpu" and cores <= FEW_CORES else max(1, min(4, cores - 1))


def _sections_of_teacher(draft: Draft, facts: Facts, taught: Teaching, device: str) -> list[str]:
    if taught.source is not None and taught.method is None:
        return []
    inherit = ["  inherit: true  # the student starts with its neck and head"] if taught.inherit else []
    if taught.source is not None:
        given = taught.source.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return ["teacher:", f"  {_flow(given)[1:-1]}", *inherit, ""]
    schedule = _schedule(draft, int(draft.steps * TEACHER_LONGER), facts, device, of_teacher=True)
    return [
        "teacher:",
        f"  model: {_flow(draft.choice.teacher)}",
        *inherit,
        "  train:",
        *("  " + row for row in schedule),
        "",
    ]


def _schedule(draft: Draft, steps: int, facts: Facts, device: str, *, of_teacher: bool = False) -> list[str]:
    """Rows of a section `train`."""
    epochs = draft.epochs(facts, steps)
    every = max(1, round(epochs / 8)) if facts.val_images < facts.images else max(1, round(epochs / 2))
    warm_up = max(1, min(500, steps // 10))
    optimizer = (
        f"{{name: sgd, lr: {0.01 * draft.batch / 16:g}, weight_decay: 1e-4}}"
        if draft.choice.pretrained
        else "{name: adamw, lr: 2e-3, weight_decay: 0.05}"
    )
    return [
        f"  steps: {steps}  # {epochs:.0f} epochs",
        f"  batch_size: {draft.batch}",
        f"  optimizer: {optimizer}",
        f"  schedule: {{name: cosine, warmup_steps: {warm_up}, warmup_factor: 0.01}}",
        f"  ema: {0.99 if steps < 5000 else 0.999}",
        "  clip_norm: 10",
        *([] if of_teacher or epochs < 2 else [f"  eval_every: {every}"]),
        *(["  accelerator: cuda", "  precision: bf16"] if device == "cuda" else []),
        "  select: last",
    ]


def _pseudo_labels(wishes: Wishes, taught: Teaching) -> list[str]:
    if wishes.unlabeled is None:
        return []
    rows = ["pseudo_labels:", f"  unlabeled: [{_quoted(wishes.unlabeled)}]", "  thresholds: best_f1"]
    if taught.method is None and taught.source is not None:
        given = taught.source.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        rows.insert(1, f"  teachers: [{_flow(given)}]")
    return [*rows, ""]


def _flow(section: Mapping[str, Any]) -> str:
    """A section on one line."""
    return yaml.safe_dump(dict(section), default_flow_style=True, sort_keys=False, width=10**6).strip()


def _quoted(path: Path) -> str:
    return json.dumps(shown(path), ensure_ascii=False)


def _memory() -> int:
    """Bytes of memory that the machine has; 8 GiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 8 * 2**30
