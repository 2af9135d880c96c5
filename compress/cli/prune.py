"""`compress prune`: a checkpoint without the channels that matter least."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.exits import next_command
from compress.cli.groups import with_groups
from compress.cli.options import (
    JsonOut,
    ThresholdFlags,
    need_file,
    need_json_place,
    provider_names,
    refuse,
    values_of,
    write_results,
)
from compress.cli.student import Student, read_student
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, ONNX_SUFFIX

if TYPE_CHECKING:
    from compress.config.data import Split
    from compress.config.prune import Cut
    from compress.run.prune_checkpoint import CheckpointPruning, PrunedCheckpoint

commands = typer.Typer()


@dataclass(frozen=True)
class BudgetFlags:
    """How much leaves: one of these."""

    gflops: Annotated[float | None, typer.Option("--gflops", metavar="SHARE", help="Share of the GFLOPs to keep.")] = (
        None
    )
    params: Annotated[
        float | None, typer.Option("--params", metavar="SHARE", help="Share of the parameters to keep.")
    ] = None
    latency_ms: Annotated[
        float | None,
        typer.Option("--latency-ms", metavar="MS", help="Median latency of its exported file, measured here."),
    ] = None
    max_map_drop: Annotated[
        float | None,
        typer.Option("--max-map-drop", metavar="POINTS", help="mAP to lose by the cut alone, on --data."),
    ] = None


@dataclass(frozen=True)
class CutFlags:
    """Which channels leave."""

    importance: Annotated[
        Literal["group_norm", "taylor", "fisher", "random"] | None,
        typer.Option("--importance", help="Which channels matter; taylor and fisher ask --data. Default: group_norm."),
    ] = None
    shares: Annotated[
        Literal["uniform", "global", "sensitivity"] | None,
        typer.Option("--shares", help="How much of each layer leaves; sensitivity asks --data. Default: uniform."),
    ] = None
    round_to: Annotated[
        int | None, typer.Option("--round-to", metavar="8|16|32", help="Widths are multiples of this. Default: 8.")
    ] = None
    schedule: Annotated[
        Literal["once", "iterative"] | None, typer.Option("--schedule", help="In one cut, or in four. Default: once.")
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NAME", help="A layer or part that stays; maps: what methods compare. Repeat."),
    ] = None
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option("--precision", help="File whose latency counts. Default: fp32."),
    ] = None
    provider: Annotated[
        str | None,
        typer.Option("--provider", metavar="NAME,NAME", help="Where it runs. Default: the recipe's, or cpu."),
    ] = None


@dataclass(frozen=True)
class ImageFlags:
    """Training images, and how large the network sees them."""

    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="JSON", help="Labels of training images. Default: the run's."),
    ] = None
    images: Annotated[Path | None, typer.Option("--images", metavar="DIR", help="Folder of the images.")] = None
    data_images: Annotated[
        int | None, typer.Option("--data-images", metavar="N", help="Look at so many of them. Default: 128.")
    ] = None
    input_size: Annotated[
        str | None,
        typer.Option("--input-size", metavar="HxW", help="That GFLOPs, latency and mAP are of. Default: the run's."),
    ] = None
    short: Annotated[
        int | None, typer.Option("--short", min=1, help="Limit of a picture's shorter side. Default: the run's.")
    ] = None
    long: Annotated[int | None, typer.Option("--long", min=1, help="Limit of its longer side. Default: the run's.")] = (
        None
    )


@commands.command()
@with_groups
def prune(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="FILE.safetensors, an mmdet FILE.pth, or zoo:NAME.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: CHECKPOINT's name with .pruned.safetensors.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    budget: BudgetFlags = BudgetFlags(),
    flags: CutFlags = CutFlags(),
    of_images: ImageFlags = ImageFlags(),
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Cut nothing: show what each layer's channels are worth.")
    ] = False,
    json_out: JsonOut = None,
) -> None:
    """Cut a checkpoint to a budget: the least important channels leave all layers.

    The file is another checkpoint, with fewer channels and the weights of those that stay; nothing is trained, and mAP
    falls until something teaches it. Settings that are not given come from the recipe.yaml beside CHECKPOINT, or are
    the defaults.
    """
    need_json_place(json_out)
    settings = _settings(budget, flags, of_images, sensitivity=sensitivity)
    from compress.config.base import is_published

    if not is_published(checkpoint):
        need_file(Path(checkpoint))
    if Path(checkpoint).suffix in (ONNX_SUFFIX, ENGINE_SUFFIX):
        raise UserError(
            f"{checkpoint}: is an exported file, whose layers cannot lose channels; give the checkpoint that it was "
            "made from, such as student.safetensors"
        )
    if sensitivity:
        refuse({"--out": out, "--force": force or None}, "is about a cut, and --sensitivity makes none; leave it out")
    student = read_student(Path(checkpoint), of_images.images, of_images.input_size, ThresholdFlags())
    from compress.run.prune_checkpoint import CheckpointPruning, beside, need_new_file, prune_checkpoint, sensitivity_of

    out = beside(checkpoint) if out is None else out
    if not sensitivity:
        need_json_place(out, "--out")
        need_new_file(out, checkpoint, force=force)
    size, limits = _size(student, of_images)
    needed = _needing(settings, sensitivity=sensitivity)
    labels = _labels(student, of_images, needed)
    deploy = student.settings
    if flags.provider is not None:
        deploy = deploy.model_copy(update={"providers": tuple(provider_names(flags.provider))})
    optional = needed is None and of_images.data is None
    plan = CheckpointPruning(checkpoint, out, settings, size, limits, deploy, labels, optional)
    with _options_named(sensitivity=sensitivity):
        if sensitivity:
            found = sensitivity_of(plan, print)
            write_results(json_out, {"file": str(plan.sensitivities), **found})
            _show_sensitivity(plan, found)
            next_command("prune", checkpoint, "--gflops", 0.5, "--shares", "sensitivity", *_given(flags, of_images))
        else:
            made = prune_checkpoint(plan, print)
            write_results(json_out, {**asdict(made), "path": str(made.path)})
            _show(plan, made)
            next_command("distill", "RECIPE", "--set", f"student={_in_a_recipe(plan)}")


# --- details --------------------------------------------------------------------------------------------


def _settings(budget: BudgetFlags, flags: CutFlags, of_images: ImageFlags, *, sensitivity: bool) -> Cut:
    from compress.config.prune import read_cut

    budgets, given = values_of(budget), values_of(flags)
    if sensitivity:
        others = {option: given[option] for option in ("--shares", "--schedule", "--precision", "--provider")}
        refuse(budgets | others, "is about a cut, and --sensitivity makes none; leave it out")
        given["--gflops"], given["--shares"] = 0.5, "sensitivity"  # settings have a budget, of which nothing comes
    asked = [option for option, value in budgets.items() if value is not None]
    if not sensitivity and len(asked) != 1:
        what = f"{' and '.join(asked)} are given" if asked else "none is given"
        raise UserError(f"needs exactly one of {', '.join(budgets)}, or --sensitivity; {what}")
    if budget.latency_ms is None:
        of_file = {option: given[option] for option in ("--precision", "--provider")}
        refuse(of_file, "is about the file whose latency counts; give --latency-ms, or leave it out")
    given |= {option: value for option, value in budgets.items() if value is not None}
    given["--images"] = of_images.data_images
    del given["--provider"]  # of the file, no setting of the cut
    with _options_named():
        return read_cut({_key(option): value for option, value in given.items() if value is not None})


def _needing(settings: Cut, *, sensitivity: bool) -> str | None:
    """The option that cannot do without images; None: there is no such."""
    key = settings.needs_pictures
    return "--sensitivity" if sensitivity else None if key is None else _option(key)


def _size(student: Student, flags: ImageFlags) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the canvas, and (short, long), the limits of pictures on it."""
    recipe, size = student.recipe, student.settings.input_size
    if size is None and recipe is None:
        raise UserError(f"--input-size: there is no {student.recipe_file} to take it from; give it, such as 800x1344")
    if size is None:
        from compress.run.plans import validation_images

        assert recipe is not None, "looked at above"
        size = validation_images(recipe)[2].input_size
    short, long = (min(size), max(size)) if recipe is None else (recipe.data.eval_short, recipe.data.long)
    short, long = flags.short or short, flags.long or long
    if short > long:
        raise UserError(f"--short: {short} is more than --long, {long}")
    return size, (short, long)


def _labels(student: Student, flags: ImageFlags, needed: str | None) -> Split | None:
    """The training images to look at: those of the options, or the run's."""
    from compress.config.data import Split
    from compress.run.plans import training_labels

    given = None
    if flags.data is not None or flags.images is not None:
        if flags.data is None or flags.images is None:
            there, other = ("--data", "--images") if flags.images is None else ("--images", "--data")
            raise UserError(f"{there}: needs {other} beside it, COCO JSON and the folder of its images")
        need_file(flags.data)
        given = Split(annotations=flags.data, images=flags.images)
    elif student.recipe is None:
        if needed:
            raise UserError(f"{needed}: looks at labelled training images; give --data and --images")
        refuse({"--data-images": flags.data_images}, "belongs to --data, which is not given")
    return training_labels(student.recipe, given, needed, print)


@contextmanager
def _options_named(*, sensitivity: bool = False) -> Iterator[None]:
    """Name the option in errors about a setting: `prune.round_to: …` is about --round-to. sensitivity: nothing is cut,
    so that `prune.shares` is about --sensitivity."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if sensitivity:
            text = re.sub(r"^prune\.shares\b", "--sensitivity", text, flags=re.MULTILINE)
        raise UserError(re.sub(r"^prune\.(\w+)", lambda m: _option(m[1]), text, flags=re.MULTILINE)) from None


def _option(key: str) -> str:
    return "--data-images" if key == "images" else f"--{key.replace('_', '-')}"


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _show(plan: CheckpointPruning, made: PrunedCheckpoint) -> None:
    from rich.table import Table

    from compress.console import open_console

    layers = Table("layer")
    for heading in ("channels", "left", "share"):
        layers.add_column(heading, justify="right")
    for row in made.figures["rows"]:
        whole, left = row["width"], row["left"]
        layers.add_row(row["name"], str(whole), str(left), f"{left / whole:.0%}")
    height, width = plan.size
    figures = Table("")
    for heading in ("whole", "pruned", "share"):
        figures.add_column(heading, justify="right")
    for name, key, form in (
        (f"GFLOPs, {height} x {width}", "gflops", "{:.3f}"),
        ("parameters", "params_m", "{:.2f} M"),
    ):
        before, after = (size[key] for size in made.sizes)
        figures.add_row(name, form.format(before), form.format(after), f"{after / before:.0%}")
    latency = made.figures["latency"]
    if latency is not None:
        before, after = latency["whole_ms"], latency["median_ms"]
        name = f"{latency['precision']} file, median latency"
        figures.add_row(name, f"{before:.2f} ms", f"{after:.2f} ms", f"{after / before:.0%}")
    if made.maps is not None:
        figures.add_row(f"mAP before training, {made.images} images", *(f"{value:.2f}" for value in made.maps))
    console = open_console()
    console.print(layers)
    console.print(figures)
    if latency is not None:
        (low, high), (least, most) = latency["interval_ms"], latency["aa_ratio"]
        print(
            f"latency: 95 % interval {low:.2f} to {high:.2f} ms, where {latency['asked']:g} ms are asked for; the file "
            f"against itself: {least:.3f} to {most:.3f} of its time"
        )
        for line in filter(None, [latency["note"], *latency["warnings"]]):
            print(f"note: {line}")
    size = plan.out.stat().st_size / 1e6
    print(f"{plan.out}: {size:.1f} MB; in a recipe, which cuts and teaches it: student: {_in_a_recipe(plan)}")


def _show_sensitivity(plan: CheckpointPruning, found: dict[str, Any]) -> None:
    from rich.table import Table

    from compress.console import open_console
    from compress.prune.sensitivity import SHARES

    table = Table("layer", title=f"mAP with a share of one layer's channels; with all: {found['map']:.2f}")
    for share in SHARES:
        table.add_column(f"{share:g}", justify="right")
    for row in found["rows"]:
        cells: dict[float, list[str]] = {share: [] for share in SHARES}
        for left, value in row["points"]:  # widths are rounded, so a layer may have none of these shares exactly
            share = min(SHARES, key=lambda share: abs(share - left))
            cells[share].append(f"{value:.2f}" if left == share else f"{value:.2f} ({left:.2g})")
        table.add_row(row["name"], *(", ".join(cell) or "-" for cell in cells.values()))
    open_console().print(table)
    print(f"{plan.sensitivities}: what was measured, which --shares sensitivity takes")


def _in_a_recipe(plan: CheckpointPruning) -> str:
    """The student of a recipe that is cut like this, in YAML on one line."""
    settings = {"of": plan.checkpoint, **plan.settings.model_dump(mode="json", exclude_defaults=True)}
    return f"{{prune: {{{', '.join(f'{key}: {json.dumps(value)}' for key, value in settings.items())}}}}}"


def _given(*groups: Any) -> list[Any]:
    """The words of the options that were given."""
    words: list[Any] = []
    for group in groups:
        for option, value in values_of(group).items():
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                words += [option, one]
    return words
