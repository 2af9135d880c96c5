"""Arms: trainings of one recipe with different settings, each a run of its own, which may be finished already.

A preset is a folder of `benchmarks/presets`: `student.yaml` (a recipe), `teacher.yaml` (how its teacher is trained,
once for all) and `arms.yaml` (tables of arms; an arm is a list of settings for the recipe). A table may have groups of
arms: `{student: [settings], teacher: [settings], arms: {...}}`, with a baseline and a teacher each; an arm may have
another teacher, `{teacher: [settings], settings: [...]}`, and a group without arms has its baseline alone.
"""

from __future__ import annotations

import concurrent.futures
import csv
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib.gains import BASELINE, SEPARATOR
from benchmarks.lib.results import ROOT, Row
from compress.config.recipe import Recipe, load_recipe
from compress.manifest import STUDENT, TEACHER_CHECK, RunFolder
from deploy.core.errors import UserError
from deploy.core.files import sha256_of

PRESETS = ROOT / "benchmarks" / "presets"
VISION_MODEL = "VISION_MODEL"  # in an arm's settings: the folder of `benchmarks.lib.vision_model`
TUNING_DATA = 5  # added to the data's seed by --tune


@dataclass(frozen=True)
class Arm:
    """One row of a table: settings on top of the recipe's; `alone` trains from the labels only and is the baseline of
    the arms of its `group`. teacher: settings of its own teacher; None: it has that of the group."""

    name: str
    settings: tuple[str, ...]
    alone: bool = False
    group: str = ""
    teacher: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Group:
    """Arms of one student. student, teacher: settings on top of the preset's two recipes."""

    name: str
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    arms: tuple[Arm, ...]


Job = tuple[Path, Arm, int, tuple[str, ...]]
"""A training: recipe, arm, seed, and the settings that all arms share."""


def preset_table(preset: str, table: str) -> list[Group]:
    """The groups of a table of a preset. Raises UserError for a preset or table that is not there."""
    path = PRESETS / preset / "arms.yaml"
    if not path.is_file():
        names = ", ".join(sorted(path.name for path in PRESETS.iterdir()))
        raise UserError(f"{preset or '.'}: neither a preset ({names}) nor a .yaml recipe")
    tables = yaml.safe_load(path.read_text(encoding="utf-8"))
    if table not in tables:
        raise UserError(f"{preset}: no table {table}; it has {', '.join(tables)}")
    return read_table(tables[table])


def read_table(table: dict[str, Any]) -> list[Group]:
    """The groups of a table of arms.yaml; one without a name where it has only arms."""
    if all(isinstance(settings, list) for settings in table.values()):
        return [Group("", (), (), tuple(_arm("", name, settings) for name, settings in table.items()))]
    return [
        Group(
            name,
            tuple(group["student"]),
            tuple(group["teacher"]),
            tuple(_arm(name, arm, settings) for arm, settings in group["arms"].items()),
        )
        for name, group in table.items()
    ]


def _arm(group: str, name: str, given: list[str] | dict[str, list[str]]) -> Arm:
    name = f"{group} {name}".strip()
    if isinstance(given, dict):
        return Arm(name, tuple(given["settings"]), group=group, teacher=tuple(given["teacher"]))
    return Arm(name, tuple(given), group=group)


def preset_arms(
    preset: str, groups: Sequence[Group], settings: Sequence[str], *, tune: bool = False
) -> tuple[Path, list[Arm], tuple[str, ...]]:
    """The recipe of a preset, the arms of the groups (the baseline of each first) and the settings that all share.
    Teachers that are not trained yet are trained now.

    tune: draw other images, to choose settings on. Raises UserError for settings that make no recipe.
    """
    folder, common = PRESETS / preset, tuple(settings)
    path = folder / "student.yaml"
    if tune:
        recipe = load_recipe(path, common)
        if recipe.data.synthetic is None:
            raise UserError(f"{folder.name}: --tune needs synthetic data, which can be drawn anew")
        seed = recipe.data.synthetic.seed + TUNING_DATA
        common = (*common, f"data.synthetic.seed={seed}", f"name={recipe.name}-tune")
    for group in groups:  # a mistake in the last one should not show up after an hour
        for arm in group.arms:
            load_recipe(path, [*common, *group.student, "teacher.checkpoint=t.safetensors", *arm.settings])
    arms = []
    for group in groups:
        own = group.student
        if (folder / "teacher.yaml").is_file() and group.arms:
            teacher = train_teacher(folder / "teacher.yaml", list(settings), group.teacher)
            own = (*own, f"teacher.checkpoint={teacher}")
        arms.append(Arm(f"{group.name} {BASELINE}".strip(), own, alone=True, group=group.name))
        for arm in group.arms:
            other = ()
            if arm.teacher is not None:
                other = (f"teacher.checkpoint={train_teacher(folder / 'teacher.yaml', list(settings), arm.teacher)}",)
            arms.append(replace(arm, settings=(*own, *other, *with_vision_model(arm, folder, settings))))
    return path, arms, common


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

    recipe = load_recipe(path, [*_of_teachers(settings), *own])
    weights = RunFolder(recipe.run_dir).weights()
    distill(recipe, resume=True, distillation=False)
    return weights


def with_vision_model(arm: Arm, preset: Path, settings: Sequence[str]) -> tuple[str, ...]:
    """The settings of an arm; VISION_MODEL in them becomes the folder of the one trained on the teachers' images."""
    if not any(VISION_MODEL in setting for setting in arm.settings):
        return arm.settings
    from benchmarks.lib.vision_model import vision_model

    folder = vision_model(preset / "teacher.yaml", _of_teachers(settings))
    return tuple(setting.replace(VISION_MODEL, str(folder)) for setting in arm.settings)


def _of_teachers(settings: Sequence[str]) -> list[str]:
    return [setting for setting in settings if setting.startswith(("runs=", "data."))]


def run_all(jobs: Sequence[Job], at_a_time: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (name of the arm, seed, figures) as they come."""
    if at_a_time == 1:
        for job in jobs:
            yield train(*job)
        return
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that start now
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(at_a_time, mp_context=context) as pool:
        first = pool.submit(train, *jobs[0])  # draws the images: the others must not do it at the same time
        yield first.result()
        for future in concurrent.futures.as_completed([pool.submit(train, *job) for job in jobs[1:]]):
            yield future.result()


def train(path: Path, arm: Arm, seed: int, common: tuple[str, ...]) -> tuple[str, int, dict[str, Any]]:
    """Train one arm with one seed, or read what an earlier call measured."""
    from compress.run.pipeline import distill

    recipe = arm_recipe(path, arm, seed, common)
    run_dir = distill(recipe, resume=True, distillation=not arm.alone)
    folder = RunFolder(run_dir)
    result = folder.result(STUDENT)
    figures = {key: round(result["metrics"][key], 3) for key in ("map", "map50", "map75")}
    curve = _curve(folder.training(STUDENT).metrics)
    return arm.name, seed, figures | {"seconds": result["seconds"], "curve": curve}


def _curve(path: Path) -> dict[int, float]:
    """mAP after each number of steps at which a training was evaluated before its end. path: its metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        found = {int(row["step"]): round(float(row["map"]), 3) for row in csv.DictReader(file) if row["map"]}
    return dict(sorted(found.items())[:-1])


def told(found: tuple[str, int, dict[str, Any]]) -> str:
    """What `run_all` yields, for people."""
    arm, seed, figures = found
    return f"{arm}, seed {seed}: mAP {figures['map']:.2f} ({figures['seconds']:.0f} s of training)"


def rows_of_training(variant: str, seed: int, figures: dict[str, Any], settings: tuple[str, ...] = ()) -> list[Row]:
    """The rows of one training. figures: map, map50, map75, seconds and, where it was evaluated on the way, curve."""
    on_the_way = [Row(variant, f"mAP after {n} steps", v, seed=seed) for n, v in figures.get("curve", {}).items()]
    return [
        Row(variant, "mAP", round(figures["map"], 3), seed=seed, notes=SEPARATOR.join(settings)),
        Row(variant, "mAP50", round(figures["map50"], 3), seed=seed),
        Row(variant, "mAP75", round(figures["map75"], 3), seed=seed),
        Row(variant, "training time", figures["seconds"], "s", seed=seed),
        *on_the_way,
    ]


def last_of_groups(arms: Sequence[Arm]) -> list[Arm]:
    """The last arm of each group that learns from the group's teacher."""
    return list({arm.group: arm for arm in arms if not arm.alone and arm.teacher is None}.values())


def teacher_row(arm: Arm, recipe: Recipe) -> Row:
    """mAP of the group's teacher on the students' validation images, and which file it is, if it is one. recipe: of a
    finished training of the arm."""
    value = RunFolder(recipe.run_dir).result(TEACHER_CHECK)["metrics"]["map"]
    checkpoint = recipe.teacher.checkpoint if recipe.teacher is not None else None
    file = Path(checkpoint) if checkpoint is not None else None
    notes = f"sha256 {sha256_of(file)}" if file is not None and file.is_file() else ""
    return Row(f"{arm.group} teacher".strip(), "mAP", round(value, 3), notes=notes)
