"""`compress validate`: the mAP of exported files, with a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.exits import gate_failed, next_command
from compress.cli.groups import with_groups
from compress.cli.options import (
    ActorFlags,
    Artifacts,
    JsonOut,
    Providers,
    RunnerFlags,
    need_finite,
    need_folder,
    need_json_place,
    provider_names,
    write_results,
)
from deploy.core.errors import UserError
from deploy.core.storage import is_file, refresh

if TYPE_CHECKING:
    from deploy.core.on_ray import Cluster
    from deploy.runtimes.base import Runner
    from deploy.validate import ArtifactResult
    from deploy.validate.detect import Detect

commands = typer.Typer()


@commands.command()
@with_groups
def validate(
    artifacts: Artifacts,
    data: Annotated[Path, typer.Option("--data", metavar="JSON", help="COCO instances JSON.")],
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of the images.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="Compare with this file and gate on the difference. Default with several providers: the first file.",
        ),
    ] = None,
    max_map_drop: Annotated[
        float | None,
        typer.Option("--max-map-drop", min=0, help="The gate: mAP points below the reference. Default: 0.5."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    provider: Providers = "cpu",
    opening: RunnerFlags = RunnerFlags(),
    where: ActorFlags = ActorFlags(),
    json_out: JsonOut = None,
) -> None:
    """Measure the mAP of exported files, with a gate.

    With --provider cpu,cuda,tensorrt each .onnx file runs on each of them; the reference is that file on the first one.
    Exit code 1 if a file loses too much against the reference."""
    need_folder(images, "--images")
    if not is_file(data):
        raise UserError(f"--data: {data}: no such file")
    providers = provider_names(provider)
    if reference is None and len(providers) > 1:
        reference = artifacts[0]
    if reference is None and max_map_drop is not None:
        raise UserError("--max-map-drop: needs --reference, the file to compare with")
    max_map_drop = 0.5 if max_map_drop is None else max_map_drop
    need_finite(max_map_drop, "--max-map-drop")
    need_json_place(json_out)
    cluster = where.cluster()
    from deploy.core.odd_pictures import odd_pictures
    from deploy.validate.coco import load_annotations
    from deploy.validate.labels import WHEN_MEASURING, label_notes

    truth = load_annotations(data)
    pictures = [images / row["file_name"] for row in truth["images"]]
    refresh(pictures)
    odd = odd_pictures(pictures)
    for line in [*label_notes(truth, kinds=WHEN_MEASURING), *([] if odd is None else [odd])]:
        print(f"note: {data}: {line}")
    files = [*artifacts, *([reference] if reference is not None and reference not in artifacts else [])]
    from deploy.runtimes.open import open_runners, runner_name

    options = opening.arguments(files, providers, max_batch=batch_size)
    runners = open_runners(files, providers, **options)
    from compress.console import open_console
    from compress.console import progress as progress_of
    from deploy import validate as validation

    with progress_of("validating") as progress:
        results = validation.validate(
            runners,
            data,
            images,
            reference=None if reference is None else runner_name(reference, providers[0], providers),
            max_map_drop=max_map_drop,
            batch_size=batch_size,
            progress=progress,
            detect=_detect(cluster, partial(open_runners, files, providers), options),
        )
    open_console().print(validation.results_table(results))
    write_results(json_out, [result.to_dict() for result in results])
    for result in results if reference is None else ():
        _say_what_training_measured(result.name, runners[result.name].card.val_map, result.metrics.map, max_map_drop)
    _say_what_an_map_does_not(results)
    failed = [result.name for result in results if result.gate == "fail"]
    if failed:
        gate_failed(f"gate of {max_map_drop:g} mAP points: {', '.join(failed)}")
    next_command("benchmark", *files, "--images", images)


def _detect(cluster: Cluster | None, open: Callable[..., Mapping[str, Runner]], options: Mapping[str, Any]) -> Detect:
    """What runs the runners: this process, or actors of a cluster that open them for themselves, with as many threads
    as each has processors unless another number is given."""
    from deploy.validate.detect import detect_all, detect_on

    if cluster is None:
        return detect_all
    threads = options["threads"] or max(1, int(cluster.num_cpus))
    return detect_on(cluster, partial(open, **{**options, "threads": threads}))


def _say_what_an_map_does_not(results: Sequence[ArtifactResult]) -> None:
    """Print the operating point of each file, which errors cost it most, and why it fails."""
    from deploy.validate.differences import in_words

    for result in results:
        if result.metrics.operating_point is not None:
            print(f"{result.name}: {result.metrics.operating_point.in_words()}")
        if result.analysis is not None and result.analysis.errors is not None:
            print(f"{result.name}: points of AP50 lost to errors (TIDE): {result.analysis.errors.in_words()}")
    for result in results:
        if result.diagnosis is not None:
            print(f"{result.name}: {result.diagnosis}")
        if result.pictures:
            print(f"{result.name}: differs most in images {in_words(result.pictures)}")


def _say_what_training_measured(name: str, trained: float | None, found: float, limit: float) -> None:
    """Print a line about a file whose mAP is not the one on its card."""
    if trained is not None and abs(trained - found) > limit:
        print(
            f"{name}: its training measured {trained:.2f} mAP on its own validation images; if they are these, the "
            "difference comes from the canvas, the thresholds or the precision (docs/deployment.md)"
        )
