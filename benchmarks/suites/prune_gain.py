"""Gain of distillation in giving a pruned detector back what the cut cost, over seeds; beside students built small.

    python -m benchmarks prune_gain cpu                           # all budgets of the preset `cpu`, 3 seeds
    python -m benchmarks prune_gain bccd --groups "keep 0.5"      # some of them, on blood cells

The table `prune` of a preset's `arms.yaml` has a group for each share of the teacher's GFLOPs that stays, and groups of
unpruned students that train for as many steps. The baseline of a pruned group begins with the weights that the cut left
and learns from the labels alone; its arms learn from the whole teacher as well. All arms of one seed see the same
images in the same order; differences to the baseline are taken in pairs. Of each architecture one file in int8 is timed
in ONNX Runtime on the CPU, one image a call, all of them and the teacher's in turn: the network with its suppression.

Resumable: finished arms are kept below the recipe's `runs`, and a call with `--groups` of what is finished makes the
table of that. Settings were chosen with `--tune`, which draws both training and validation images from another seed.
The case is called as the preset.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.measure import MAX_FOREIGN, ForeignCpu
from benchmarks.lib.results import Case, Row
from benchmarks.lib.tables import TEACHER, pruned_table
from benchmarks.lib.trainings import (
    Arm,
    Group,
    arm_recipe,
    last_of_groups,
    preset_arms,
    preset_table,
    rows_of_training,
    teacher_row,
    told,
    train,
)
from compress.config.recipe import Recipe
from compress.detectors.build import model_size
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.export.onnx import export_checkpoint
from compress.manifest import PRUNE, PRUNED, STUDENT, TEACHER_CHECK, RunFolder
from compress.run.plans import quantizing, validation_images
from compress.run.quantize import quantize_file
from deploy.core.errors import UserError
from deploy.core.files import write_json
from deploy.latency import benchmark
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner

TABLE = "prune"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", nargs="?", default="cpu")
    parser.add_argument("--groups", metavar="A,B", help="only these groups of the table `prune`, in this order")
    options.seeds(parser)
    options.settings(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time of each file")
    options.threads(parser, 1)
    parser.add_argument("--tune", action="store_true", help="on other images: to choose settings, not to report")


def run(args: argparse.Namespace) -> Iterator[Case]:
    groups = chosen(preset_table(args.preset, TABLE), args.groups)
    path, arms, common = preset_arms(args.preset, groups, args.set, tune=args.tune)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for group in groups:  # with all its seeds before the next one: what was stopped has whole groups
        finished: list[RunFolder] = []
        for seed in sorted(args.seeds):
            for arm in (arm for arm in arms if arm.group == group.name):
                folder = RunFolder(arm_recipe(path, arm, seed, common).run_dir)
                hand_on(finished, folder)
                done = train(path, arm, seed, common)
                finished.append(folder)
                found[done[:2]] = done[2]
                print(told(done), flush=True)
    rows: list[Row] = []
    for arm in arms:
        for seed in sorted(args.seeds):
            rows += rows_of_training(arm.name, seed, found[arm.name, seed], arm.settings)
    students = {arm.group: arm_recipe(path, arm, min(args.seeds), common) for arm in last_of_groups(arms)}
    for name, recipe in students.items():
        rows += rows_of_architecture(name, recipe)
    rows += rows_of_teacher(last_of_groups(arms)[0], next(iter(students.values())))
    rows += latency_rows(students, args.seconds, args.threads)
    print(pruned_table(rows))
    yield Case(f"{args.preset}-tune" if args.tune else args.preset, rows)


def chosen(groups: list[Group], names: str | None) -> list[Group]:
    """The groups of these names. Raises UserError for one that is not there."""
    if names is None:
        return groups
    by_name = {group.name: group for group in groups}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise UserError(f"--groups: no group {', '.join(unknown)}; the table has {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def hand_on(finished: list[RunFolder], folder: RunFolder) -> None:
    """Give a run the cut and the check of the teacher of finished ones of its group, the last first: those of its seed,
    on which the cut may depend. A run does a stage itself whose inputs differ."""
    for other in reversed(finished):
        theirs, own = other.stages(), folder.stages()
        more = {name: theirs[name] for name in (PRUNE, TEACHER_CHECK) if name in theirs and name not in own}
        if not more:
            continue
        folder.path.mkdir(parents=True, exist_ok=True)
        if PRUNE in more:
            shutil.copyfile(other.weights(PRUNED), folder.weights(PRUNED))
        write_json(folder.manifest, {"stages": {**more, **own}})


def rows_of_architecture(group: str, recipe: Recipe) -> list[Row]:
    """GFLOPs and parameters of a group's students, and mAP as the cut left it. recipe: of a finished training."""
    folder = RunFolder(recipe.run_dir)
    rows = size_rows(group, str(folder.weights()), folder.result(STUDENT)["canvas"])
    if recipe.student.prune is not None:
        cut = folder.result(PRUNE)["metrics"]["map"]
        rows.append(Row(group, "mAP before training", round(cut, 3)))
    return rows


def rows_of_teacher(arm: Arm, recipe: Recipe) -> list[Row]:
    """The teacher's mAP, GFLOPs and parameters. arm, recipe: of a finished training that learned from it."""
    assert recipe.teacher is not None and recipe.teacher.checkpoint is not None, "presets have a teacher"
    canvas = RunFolder(recipe.run_dir).result(STUDENT)["canvas"]
    accuracy = teacher_row(Arm(arm.name, arm.settings), recipe)
    return [accuracy, *size_rows(TEACHER, str(recipe.teacher.checkpoint), canvas)]


def size_rows(variant: str, checkpoint: str, canvas: list[int]) -> list[Row]:
    size = model_size(load_teacher_checkpoint(checkpoint)[0], (canvas[0], canvas[1]))
    return [Row(variant, "GFLOPs", size["gflops"]), Row(variant, "parameters", size["params_m"], "M")]


def latency_rows(students: dict[str, Recipe], seconds: float, threads: int) -> list[Row]:
    """p50 of a student of each group and of the teacher, in int8."""
    recipes = list(students.values())
    teacher = recipes[0].teacher
    assert teacher is not None and teacher.checkpoint is not None, "presets have a teacher"
    _, _, checks = validation_images(recipes[0])
    files = {name: RunFolder(recipe.run_dir).weights() for name, recipe in students.items()}
    files[TEACHER] = Path(teacher.checkpoint)
    how, deploy = quantizing(recipes[0]), recipes[0].deploy
    with tempfile.TemporaryDirectory(prefix="bench-prune-gain-") as folder:
        runners: dict[str, Runner] = {}
        for number, (name, weights) in enumerate(files.items()):
            whole, small = Path(folder, f"{number}.onnx"), Path(folder, f"{number}.int8.onnx")
            export_checkpoint(
                weights,
                whole,
                deploy,
                input_size=checks.input_size,
                images=checks.images,
                resize_short_long=checks.resize_short_long,
            )
            quantize_file(whole, small, how, "cpu", max_batch=deploy.max_batch)
            runners[name] = OnnxRunner(small, threads=threads)
        with ForeignCpu() as other:
            report = benchmark(
                runners,
                checks.images,
                scopes=("h2d+compute+d2h",),
                seconds=seconds,
                warm_up_seconds=2 * seconds,
            )
    for warning in report.warnings:
        print(f"warning: {warning}")
    notes = f"busy: others used {other.share:.0%} of the CPUs" if other.share > MAX_FOREIGN else ""
    rows = []
    for cell in report.cells:
        p50, calls = cell.latency_ms["p50"], sum(map(len, cell.samples_ms))
        spread = "" if p50.low is None else "95 %"
        rows.append(Row(cell.runner, "int8 p50", p50.value, "ms", p50.low, p50.high, spread, calls, notes=notes))
    return rows
