"""Commands that take a recipe or a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from compress.cli.exits import gate_failed, is_rank_zero, next_command, or_command
from compress.cli.groups import with_groups
from compress.cli.options import ClusterFlags, Devices, DryRun, RecipeFile, Resume, Set, WithoutData
from compress.manifest import STUDENT_ON_INT8_GRIDS, RunFolder
from deploy.core.errors import UserError
from deploy.core.storage import pull, shown

if TYPE_CHECKING:
    from compress.config.recipe import Recipe
    from deploy.core.on_ray import Cluster

commands = typer.Typer()


@commands.command()
def quickstart(settings: Set = None) -> None:
    """The whole path on generated data, in minutes; continues what was interrupted."""
    from importlib import resources

    packaged = resources.files("compress") / "assets" / "quickstart.yaml"
    with resources.as_file(packaged) as path:
        recipe = _recipe(path, settings)
    _run(recipe, _how(True, False, False))


@commands.command()
@with_groups
def run(
    recipe: RecipeFile,
    settings: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    without_data: WithoutData = False,
    devices: Devices = None,
    where: ClusterFlags = ClusterFlags(),
) -> None:
    """The whole path of a recipe, from data to report."""
    how = _how(resume, dry_run, without_data)
    _run(_recipe(recipe, settings, devices), how, where=where.cluster(), again=("run", str(recipe)))


@commands.command()
@with_groups
def distill(
    recipe: RecipeFile,
    settings: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    without_data: WithoutData = False,
    devices: Devices = None,
    where: ClusterFlags = ClusterFlags(),
) -> None:
    """Train a recipe's student with its teacher."""
    loaded = _recipe(recipe, settings, devices)
    from compress.config.recipe import check_distills

    check_distills(loaded, recipe)
    _train(loaded, recipe, _how(resume, dry_run, without_data), where.cluster(), distillation=True)


@commands.command()
@with_groups
def train(
    recipe: RecipeFile,
    settings: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    without_data: WithoutData = False,
    devices: Devices = None,
    where: ClusterFlags = ClusterFlags(),
) -> None:
    """Train a recipe's student alone."""
    loaded = _recipe(recipe, settings, devices)
    if loaded.pseudo_labels is not None and is_rank_zero():
        print(f"{recipe}: pseudo_labels is not used here, no teacher labels; compress distill and compress run use it")
    _train(loaded, recipe, _how(resume, dry_run, without_data), where.cluster(), distillation=False)


class How(TypedDict):
    """Options of the pipeline."""

    resume: bool
    dry_run: bool
    without_data: bool


def _how(resume: bool, dry_run: bool, without_data: bool) -> How:
    if without_data and not dry_run:
        raise UserError("--without-data: belongs to --dry-run; a run needs its data")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0  # torchrun --max-restarts: it starts us again
    return {"resume": resume or restarts, "dry_run": dry_run, "without_data": without_data}


def _recipe(path: Path, settings: Sequence[str] | None, devices: int | None = None) -> Recipe:
    from compress.config.recipe import load_recipe

    recipe = load_recipe(path, settings or ())
    if devices is None:
        return recipe
    more = [f"train.devices={devices}"]
    if recipe.teacher is not None and recipe.teacher.train is not None:
        more.append(f"teacher.train.devices={devices}")
    return load_recipe(path, [*(settings or ()), *more])


def _do(work: Callable[..., Path], recipe: Recipe, how: How, cluster: Cluster | None) -> Path:
    """A function of the pipeline, here or in processes of a cluster. Returns the run folder."""
    if cluster is None:
        return work(recipe, **how)
    if how["dry_run"]:
        raise UserError("--dry-run: rehearses on this machine; leave out --engine ray")
    if recipe.ray is not None:
        raise UserError(
            "--engine ray: the recipe's section ray would wait for what the training's own processes hold; add "
            "--set ray=null, and they do that work"
        )
    from compress.run.on_ray import train_on_ray

    train_on_ray(cluster, partial(work, recipe, **how), recipe.train.devices, recipe.runs, restarts=how["resume"])
    return recipe.run_dir


def _run(recipe: Recipe, how: How, *, where: Cluster | None = None, again: tuple[str, ...] = ()) -> None:
    from compress.run import pipeline

    run_dir = _do(pipeline.run, recipe, how, where)
    if not is_rank_zero():
        return
    if how["dry_run"]:
        next_command(*again)
        return
    if not _is_exported(recipe):  # as the pipeline has said: no report, no gate
        return
    folder = RunFolder(run_dir)
    report = json.loads(folder.report.read_text(encoding="utf-8"))
    failed = [artifact["file"] for artifact in report["artifacts"] if artifact["gate"] == "fail"]
    print(f"report: {shown(folder.page)}")
    if failed:
        gate_failed(f"gate of {recipe.deploy.max_map_drop:g} mAP points: {', '.join(failed)}")
    from compress.run.data import splits

    next_command("predict", folder.onnx(), splits(recipe.data, recipe.runs, write=False)[1].images)
    or_command("serve", folder.onnx())


def _detector_of(recipe: Recipe) -> str:
    """What kind of detector the student is; a pruned one is of the kind that it is cut from."""
    from compress.run.plans import with_whole_student

    return with_whole_student(recipe).student.detector


def _is_exported(recipe: Recipe) -> bool:
    from compress.detectors.build import detector_class

    return detector_class(_detector_of(recipe), "student.detector").exportable is None


def _train(recipe: Recipe, path: Path, how: How, cluster: Cluster | None, *, distillation: bool) -> None:
    from compress.run import pipeline

    folder = RunFolder(_do(partial(pipeline.distill, distillation=distillation), recipe, how, cluster))
    if how["dry_run"]:
        next_command("distill" if distillation else "train", path)
    elif not _is_exported(recipe):
        if is_rank_zero():
            print(f"weights: {folder.weights()}; a {_detector_of(recipe)} cannot be exported")
    elif distillation and recipe.deploy.int8.qad is not None:
        next_command("export", folder.weights(STUDENT_ON_INT8_GRIDS), "--precision", "int8")
    else:
        next_command("export", folder.weights())


@commands.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A folder below runs/; several are compared.")],
    pictures: Annotated[int | None, typer.Option(help="How many to choose anew from what the run kept.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Page of a comparison. Default: compare.html beside the runs.")
    ] = None,
) -> None:
    """Write a run's report.html again, or a page that compares runs."""
    from compress.report import build_report, compare_runs

    for folder_at_address in runs:
        pull(folder_at_address)
    if len(runs) > 1:
        if pictures is not None:
            raise UserError("--pictures: belongs to the report of one run")
        page = out or runs[0].parent / "compare.html"
        for line in compare_runs(runs, page):
            print(line)
        print(f"comparison: {shown(page)}")
        return
    if out is not None:
        raise UserError("--out: belongs to a comparison of runs; a report is written into its run")
    run_dir = runs[0]
    print(f"report: {shown(build_report(run_dir, pictures))}")
    folder = RunFolder(run_dir)
    if folder.onnx().is_file():
        next_command("serve", folder.onnx())
    elif folder.weights().is_file():
        next_command("export", folder.weights())
