"""Arms: trainings of one recipe with different settings, each a run of its own, which may be finished already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.gains import SEPARATOR
from benchmarks.lib.results import ROOT, Row
from compress.config.recipe import Recipe, load_recipe
from compress.manifest import RunFolder

PRESETS = ROOT / "benchmarks" / "presets"


@dataclass(frozen=True)
class Arm:
    """One row of a table: settings on top of the recipe's; `alone` trains from the labels only and is the baseline of
    the arms of its `group`."""

    name: str
    settings: tuple[str, ...]
    alone: bool = False
    group: str = ""


@dataclass(frozen=True)
class Group:
    """Arms of one student. student, teacher: settings on top of the preset's two recipes."""

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    arms: tuple[Arm, ...]


def arm_recipe(path: Path, arm: Arm, seed: int, common: tuple[str, ...]) -> Recipe:
    """The recipe of one training: baseline and distilled arm are runs of their own."""
    name = load_recipe(path, common).name
    label = "".join(c if c.isalnum() or c in "._" else "-" for c in arm.name)
    own = (f"seed={seed}", f"name={name}-gain-{label}-seed{seed}", "baseline=false")
    return load_recipe(path, [*common, *arm.settings, *own])


def train_teacher(path: Path, settings: list[str], own: tuple[str, ...] = ()) -> Path:
    """The teacher of a preset or of a group (`own`: its settings), trained once below `runs`, where `settings` say that
    the images are."""
    from compress.run.pipeline import distill

    shared = [setting for setting in settings if setting.startswith(("runs=", "data."))]
    recipe = load_recipe(path, [*shared, *own])
    weights = RunFolder(recipe.run_dir).weights()
    distill(recipe, resume=True, distillation=False)
    return weights


def rows_of_training(variant: str, seed: int, figures: dict[str, Any], settings: tuple[str, ...] = ()) -> list[Row]:
    """The rows of one training. figures: map, map50, map75 and seconds."""
    return [
        Row(variant, "mAP", round(figures["map"], 3), seed=seed, notes=SEPARATOR.join(settings)),
        Row(variant, "mAP50", round(figures["map50"], 3), seed=seed),
        Row(variant, "mAP75", round(figures["map75"], 3), seed=seed),
        Row(variant, "training time", figures["seconds"], "s", seed=seed),
    ]
