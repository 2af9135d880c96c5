"""Gain of distillation: the same student, schedule and images with and without the teacher, over seeds.

    python -m benchmarks distill_gain cpu                   # every method on the preset `cpu`, 3 seeds
    python -m benchmarks distill_gain cpu --table uet       # another table of the preset
    python -m benchmarks distill_gain cpu --table families  # other detectors, each with its own teacher and baseline
    python -m benchmarks distill_gain recipes/quickstart_nano.yaml --seeds 0,1,2,3,4

A preset is a folder of `benchmarks/presets`: `student.yaml` (a recipe), `teacher.yaml` (how its teacher is trained,
once for all) and `arms.yaml` (tables of arms; an arm is a list of settings for the recipe). A table may have groups of
arms: `{student: [settings], teacher: [settings], arms: {...}}`, with a baseline and a teacher each. A recipe on its own
is compared with itself without its methods.

A seed changes the initial weights, the order of the images and their augmentation; all arms of one seed share all
three, so differences to the baseline are taken in pairs. Prints mean and standard deviation, and the mean paired
difference with its 95 % confidence interval (Student's t). Resumable: finished arms are kept below the recipe's `runs`.
The case is called <preset>-<table>, or as the recipe.

Settings of the arms of a preset were chosen with `--tune`, which draws both training and validation images from
another seed: nothing was chosen on the images of the tables. The case cpu-tuning has what was tried.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib import options
from benchmarks.lib.gains import BASELINE
from benchmarks.lib.results import Case, Row
from benchmarks.lib.tables import arm_table
from benchmarks.lib.trainings import PRESETS, Arm, Group, arm_recipe, rows_of_training, train_teacher
from compress.config.recipe import Recipe, load_recipe
from compress.manifest import STUDENT, TEACHER_CHECK, RunFolder
from deploy.core.errors import UserError
from deploy.core.files import sha256_of

TUNING_DATA = 5  # added to the data's seed by --tune


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", nargs="?", type=Path, default=Path("cpu"), metavar="PRESET|RECIPE")
    parser.add_argument("--table", default="methods", help="of the preset's arms.yaml")
    parser.add_argument("--arms", metavar="A,B", help="only these arms (the baseline always runs)")
    options.seeds(parser)
    options.settings(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time; threads are shared out")
    parser.add_argument("--tune", action="store_true", help="on other images: to choose settings, not to report")


def run(args: argparse.Namespace) -> Iterator[Case]:
    check_options(args)
    path, arms, common = read_plan(args)
    jobs = [(path, arm, seed, common) for seed in args.seeds for arm in arms]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for arm, seed, figures in run_all(jobs, args.jobs):
        found[arm, seed] = figures
        print(f"{arm}, seed {seed}: mAP {figures['map']:.2f} ({figures['seconds']:.0f} s of training)", flush=True)
    rows: list[Row] = []
    for arm in arms:
        for seed in sorted(args.seeds):
            rows += rows_of_training(arm.name, seed, found[arm.name, seed], arm.settings)
    rows += [teacher_row(arm, arm_recipe(path, arm, args.seeds[0], common)) for arm in last_of_groups(arms)]
    name = load_recipe(path, common).name if args.preset.suffix else f"{args.preset}-{args.table}"
    print(arm_table(rows))
    yield Case(f"{name}-tune" if args.tune else name, rows)


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if args.jobs < 1:
        raise UserError("--jobs: give 1 or more")
    if args.preset.suffix:
        if args.tune or args.arms or args.table != "methods":
            raise UserError("--tune, --table and --arms are for presets; a recipe has one arm and its own images")
    elif any(setting.partition("=")[0].startswith(("methods", "teacher")) for setting in args.set):
        raise UserError("--set: methods and teacher of a preset are those of its arms; edit arms.yaml")
    elif (args.arms or args.set) and args.label is None and not args.tune:
        raise UserError("--arms and --set make another table than the preset's; name it with --label")


def last_of_groups(arms: list[Arm]) -> list[Arm]:
    """The last arm of each group that has a teacher."""
    return list({arm.group: arm for arm in arms if not arm.alone}.values())


def teacher_row(arm: Arm, recipe: Recipe) -> Row:
    """mAP of the group's teacher on the students' validation images, and which file it is, if it is one."""
    value = RunFolder(recipe.run_dir).result(TEACHER_CHECK)["metrics"]["map"]
    checkpoint = recipe.teacher.checkpoint if recipe.teacher is not None else None
    file = Path(checkpoint) if checkpoint is not None else None
    notes = f"sha256 {sha256_of(file)}" if file is not None and file.is_file() else ""
    return Row(f"{arm.group} teacher".strip(), "mAP", round(value, 3), notes=notes)


def read_plan(args: argparse.Namespace) -> tuple[Path, list[Arm], tuple[str, ...]]:
    """The recipe, the arms (the baseline first) and the settings that they share."""
    common = tuple(args.set)
    if args.preset.suffix:
        return args.preset, [Arm(BASELINE, (), alone=True), Arm("distilled", ())], common
    folder = PRESETS / args.preset
    if not (folder / "arms.yaml").is_file():
        names = ", ".join(sorted(path.name for path in PRESETS.iterdir()))
        raise UserError(f"{args.preset}: neither a preset ({names}) nor a .yaml recipe")
    recipe_path = folder / "student.yaml"
    tables = yaml.safe_load((folder / "arms.yaml").read_text(encoding="utf-8"))
    if args.table not in tables:
        raise UserError(f"{folder.name}: no table {args.table}; it has {', '.join(tables)}")
    groups = read_table(tables[args.table])
    if args.arms:
        wanted = args.arms.split(",")
        if unknown := set(wanted) - {arm.name for group in groups for arm in group.arms}:
            raise UserError(f"no arm {', '.join(sorted(unknown))} in table {args.table}")
        groups = [replace(g, arms=tuple(arm for arm in g.arms if arm.name in wanted)) for g in groups]
        groups = [group for group in groups if group.arms]
    if args.tune:
        recipe = load_recipe(recipe_path, common)
        if recipe.data.synthetic is None:
            raise UserError(f"{folder.name}: --tune needs synthetic data, which can be drawn anew")
        common = (
            *common,
            f"data.synthetic.seed={recipe.data.synthetic.seed + TUNING_DATA}",
            f"name={recipe.name}-tune",
        )
    for group in groups:  # a mistake in the last one should not show up after an hour
        for arm in group.arms:
            load_recipe(recipe_path, [*common, *group.student, "teacher.checkpoint=t.safetensors", *arm.settings])
    arms = []
    for group in groups:
        own = group.student
        if (folder / "teacher.yaml").is_file():
            teacher = train_teacher(folder / "teacher.yaml", args.set, group.teacher)
            own = (*own, f"teacher.checkpoint={teacher}")
        arms.append(Arm(f"{group.name} {BASELINE}".strip(), own, alone=True, group=group.name))
        arms += [replace(arm, settings=(*own, *arm.settings)) for arm in group.arms]
    return recipe_path, arms, common


def read_table(table: dict[str, Any]) -> list[Group]:
    """The groups of a table of arms.yaml; one without a name where it has only arms."""
    if all(isinstance(settings, list) for settings in table.values()):
        return [Group("", (), (), tuple(Arm(name, tuple(settings)) for name, settings in table.items()))]
    return [
        Group(
            name,
            tuple(group["student"]),
            tuple(group["teacher"]),
            tuple(Arm(f"{name} {arm}", tuple(settings), group=name) for arm, settings in group["arms"].items()),
        )
        for name, group in table.items()
    ]


def run_all(jobs: list[tuple[Path, Arm, int, tuple[str, ...]]], at_a_time: int) -> Any:
    """Yield (arm, seed, figures) as they come."""
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
    result = RunFolder(run_dir).result(STUDENT)
    figures = {key: round(result["metrics"][key], 3) for key in ("map", "map50", "map75")}
    return arm.name, seed, figures | {"seconds": result["seconds"]}
