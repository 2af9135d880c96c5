"""Gain of distillation: the same student, schedule and images with and without the teacher, over seeds.

    python -m benchmarks distill_gain cpu                   # every method on the preset `cpu`, 3 seeds
    python -m benchmarks distill_gain cpu --table uet       # another table of the preset
    python -m benchmarks distill_gain cpu --table families  # other detectors, each with its own teacher and baseline
    python -m benchmarks distill_gain recipes/quickstart.yaml --seeds 0,1,2,3,4

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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.gains import BASELINE
from benchmarks.lib.results import Case, Row
from benchmarks.lib.tables import arm_table
from benchmarks.lib.trainings import (
    Arm,
    arm_recipe,
    last_of_groups,
    preset_arms,
    preset_table,
    rows_of_training,
    run_all,
    teacher_row,
    told,
)
from compress.config.recipe import load_recipe
from deploy.core.errors import UserError


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
    for done in run_all(jobs, args.jobs):
        found[done[:2]] = done[2]
        print(told(done), flush=True)
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


def read_plan(args: argparse.Namespace) -> tuple[Path, list[Arm], tuple[str, ...]]:
    """The recipe, the arms (the baseline first) and the settings that they share."""
    if args.preset.suffix:
        return args.preset, [Arm(BASELINE, (), alone=True), Arm("distilled", ())], tuple(args.set)
    groups = preset_table(args.preset.name, args.table)
    if args.arms:
        wanted = args.arms.split(",")
        if unknown := set(wanted) - {arm.name for group in groups for arm in group.arms}:
            raise UserError(f"no arm {', '.join(sorted(unknown))} in table {args.table}")
        groups = [replace(g, arms=tuple(arm for arm in g.arms if arm.name in wanted)) for g in groups]
        groups = [group for group in groups if group.arms]
    return preset_arms(args.preset.name, groups, args.set, tune=args.tune)
