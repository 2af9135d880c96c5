"""`compress benchmark`: the latency of exported files, or two results compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.exits import gate_failed, next_command, results_file
from compress.cli.groups import with_groups
from compress.cli.options import (
    JsonOut,
    Providers,
    RunnerFlags,
    batch_sizes,
    images_in,
    need_finite,
    need_folder,
    need_json_place,
    provider_names,
)
from deploy.core.errors import UserError
from deploy.core.shown import counted, first_of_each
from deploy.runtimes.providers import ON_CPU

if TYPE_CHECKING:
    from deploy.latency import BenchmarkReport
    from deploy.runtimes.base import Runner

commands = typer.Typer()
Scenario = Literal["single-stream", "multi-stream", "offline", "server"]


@dataclass(frozen=True)
class LoadFlags:
    """Options of the scenario: how calls follow each other."""

    scenario: Annotated[Scenario, typer.Option("--scenario", help="How calls follow each other.")] = "single-stream"
    streams: Annotated[
        int | None, typer.Option("--streams", min=1, metavar="N", help="Sessions that work at the same time.")
    ] = None
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="R,R", help="Server: mean requests a second, at random times.")
    ] = None
    latency_bound: Annotated[
        float | None,
        typer.Option("--latency-bound", metavar="MS", help="Server: find the highest rate with p99 within this."),
    ] = None


@dataclass(frozen=True)
class TimeFlags:
    """Options of duration and repetition."""

    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="For each measurement.")] = 5.0
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Turns of each file in a measurement.")] = 20
    warm_up: Annotated[float, typer.Option("--warm-up", min=0, help="Most seconds before each.")] = 10.0


@dataclass(frozen=True)
class CompareFlags:
    """Options of the comparison: what counts as too slow."""

    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="OLD.json NEW.json", help="Measure nothing; compare two results."),
    ] = None
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0,
            metavar="PERCENT",
            help="Exit with 1 when significantly slower by more: NEW than OLD (default 2), files than the first.",
        ),
    ] = None


@dataclass(frozen=True)
class OutputFlags:
    """Options for files that results are written to."""

    json_out: JsonOut = None
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write a document there, and its picture.")
    ] = None


@commands.command()
@with_groups
def benchmark(
    artifacts: Annotated[
        list[Path] | None, typer.Argument(metavar="ARTIFACT...", help="Exported files; measured in turn.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Images. Default: eight drawn ones.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N,N", help="Batch sizes. Default: 1; offline: 1,2,4,8,16,32.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            metavar="NAME,NAME",
            help="compute, h2d+compute+d2h, end_to_end, preprocess. Default: the first three; server: end_to_end.",
        ),
    ] = None,
    load: LoadFlags = LoadFlags(),
    time: TimeFlags = TimeFlags(),
    against: CompareFlags = CompareFlags(),
    provider: Providers = "cpu",
    opening: RunnerFlags = RunnerFlags(),
    output: OutputFlags = OutputFlags(),
) -> None:
    """Measure the latency of exported files, or compare two results.

    Rounds of all files are interleaved, so that they meet the same machine. Exit code 1 if a file is significantly
    slower than --tolerance allows.
    """
    tolerance = against.tolerance
    if tolerance is not None:
        need_finite(tolerance, "--tolerance")
    if against.compare is not None:
        if artifacts or output != OutputFlags():
            raise UserError("--compare: takes two results and nothing else: no ARTIFACT, --json or --markdown")
        _compare_results(*against.compare, tolerance=(2.0 if tolerance is None else tolerance) / 100)
        return
    if not artifacts:
        raise UserError("ARTIFACT: name exported files to measure, or two results with --compare OLD.json NEW.json")
    providers = provider_names(provider)
    if tolerance is not None and (len(artifacts) * len(providers) < 2 or load.scenario == "server"):
        raise UserError("--tolerance: needs --compare, or several files that are measured in turn")
    sessions, rates, sizes = _streams(load), _rates(load), _sizes(batch, load)
    need_finite(time.seconds, "--seconds")
    need_finite(time.warm_up, "--warm-up")
    if images is not None:
        need_folder(images, "--images")
    _check_output(output)
    scopes = _scopes(scope, load.scenario)
    from deploy.core.environment import usable_cores
    from deploy.runtimes.open import open_runners

    if sessions > 1 and opening.threads is None and set(ON_CPU) & set(providers):
        opening = replace(opening, threads=max(1, usable_cores() // sessions))
        print(f"--threads: {opening.threads} for each of {sessions} sessions")
    options = opening.arguments(artifacts, providers, max_batch=max(sizes))
    opened = [open_runners(artifacts, providers, **options) for _ in range(sessions)]
    runners = {name: [session[name] for session in opened] for name in opened[0]}
    with _image_files(images, opened[0]) as files:
        measured = _measure(runners, files, load, time, sizes=sizes, scopes=scopes, rates=rates, tolerance=tolerance)
    _show(measured, output, tolerance)
    next_command("serve", artifacts[0])


def _check_output(output: OutputFlags) -> None:
    need_json_place(output.json_out)
    need_json_place(output.markdown, "--markdown")
    if output.markdown is not None and output.markdown.suffix != ".md":
        raise UserError(f"--markdown: {output.markdown} does not end in .md")


def _measure(
    runners: dict[str, list[Runner]],
    files: Sequence[Path],
    load: LoadFlags,
    time: TimeFlags,
    *,
    sizes: Sequence[int],
    scopes: Sequence[Any],
    rates: Sequence[float],
    tolerance: float | None,
) -> BenchmarkReport:
    from compress.console import progress as progress_of
    from deploy import latency

    with progress_of("measuring") as progress:
        if load.scenario == "server":
            return latency.benchmark_server(
                runners, files, rates_ips=rates, bound_ms=load.latency_bound, batch_size=sizes[0], scope=scopes[0],
                seconds=time.seconds, warm_up_seconds=time.warm_up, progress=progress,
            )  # fmt: skip
        return latency.benchmark(
            runners, files, batch_sizes=sizes, scopes=scopes, scenario=load.scenario, seconds=time.seconds,
            rounds=time.rounds, warm_up_seconds=time.warm_up, tolerance=(tolerance or 0.0) / 100, progress=progress,
        )  # fmt: skip


def _show(measured: BenchmarkReport, output: OutputFlags, tolerance: float | None) -> None:
    """Print and write the results; ends the command where a file is too slow."""
    from compress.console import open_console
    from deploy import latency

    console = open_console()
    if measured.cells:
        console.print(latency.report_table(measured))
    if measured.comparisons:
        console.print(latency.comparison_table(measured.comparisons, tolerance=(tolerance or 0.0) / 100))
    for line in [*latency.offline_lines(measured.cells), *latency.bounded_lines(measured.bounded)]:
        print(line)
    for level, lines in (("note", measured.notes), ("warning", measured.warnings)):
        for line in first_of_each(lines, lambda _: None, lambda _, count: f"and {count} more, all in --json"):
            print(f"{level}: {line}")
    if output.json_out is not None:
        with results_file(output.json_out) as place:
            latency.write_report(place, measured)
    if output.markdown is not None:
        latency.write_markdown(output.markdown, measured)
    if tolerance is not None:
        _need_fast_enough(latency.slower(measured.comparisons), tolerance)


def _compare_results(old: Path, new: Path, *, tolerance: float) -> None:
    from compress.console import open_console
    from deploy import latency

    comparisons, differences = latency.compare_reports(
        latency.read_report(old), latency.read_report(new), tolerance=tolerance
    )
    open_console().print(latency.comparison_table(comparisons, tolerance=tolerance))
    for line in differences:
        print(f"warning: {line}")
    print(
        "note: measured at different times: what changed on the machine in between is in the difference and not in its "
        "interval; files measured together, compress benchmark OLD.onnx NEW.onnx, are compared more reliably"
    )
    _need_fast_enough(latency.slower(comparisons), tolerance * 100)


def _need_fast_enough(slower: Sequence[Any], tolerance: float) -> None:
    if slower:
        worst = max(slower, key=lambda found: found.ratio.value)
        gate_failed(
            f"{worst.other} is more than {tolerance:g} % slower than {worst.base}: {worst.figure} "
            f"{worst.ratio.value - 1:+.1%} ({worst.where}); {counted(len(slower), 'figure')} in all"
        )


def _streams(load: LoadFlags) -> int:
    streams = load.streams or 1
    if load.scenario == "single-stream" and streams > 1:
        raise UserError(f"--streams: single-stream has one; for {streams} give --scenario multi-stream")
    if load.scenario == "multi-stream" and streams < 2:
        raise UserError("--streams: multi-stream needs at least 2, for example --streams 2")
    return streams


def _rates(load: LoadFlags) -> list[float]:
    """Requests a second for the server scenario; none when only a bound is given."""
    rate, bound = load.rate, load.latency_bound
    if load.scenario != "server":
        if rate is not None or bound is not None:
            option = "--rate" if rate is not None else "--latency-bound"
            raise UserError(f"{option}: only --scenario server has arrivals")
        return []
    if rate is None and bound is None:
        raise UserError("--scenario server: needs --rate (requests a second) or --latency-bound (milliseconds)")
    if bound is not None and not 0 < bound < math.inf:
        raise UserError(f"--latency-bound: needs a number of milliseconds above 0, got {bound}")
    try:
        rates = [float(part) for part in rate.split(",")] if rate is not None else []
    except ValueError:
        rates = [0.0]
    if not all(0 < value < 1e6 for value in rates):
        raise UserError(f"--rate: '{(rate or '')[:60]}' is not a list of requests a second, for example 10,20")
    return rates


def _sizes(text: str | None, load: LoadFlags) -> list[int]:
    """Batch sizes to measure."""
    sizes = batch_sizes(text or ("1,2,4,8,16,32" if load.scenario == "offline" else "1"))
    if load.scenario == "server" and len(sizes) > 1:
        raise UserError("--batch: the server scenario takes one number, the most requests handled together")
    return sizes


def _scopes(text: str | None, scenario: Scenario) -> list[Any]:
    from deploy.latency import SCOPES, USUAL_SCOPES

    if text is None:
        return ["end_to_end"] if scenario == "server" else list(USUAL_SCOPES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SCOPES:
            raise UserError(f"--scope: unknown scope '{name[:60]}': choose from {', '.join(SCOPES)}")
    if scenario == "server" and (len(names) > 1 or names[0] not in ("h2d+compute+d2h", "end_to_end")):
        raise UserError("--scope: the server scenario takes one, h2d+compute+d2h or end_to_end")
    return list(dict.fromkeys(names))


@contextmanager
def _image_files(folder: Path | None, runners: dict[str, Runner]) -> Iterator[list[Path]]:
    """The image files of `folder`, or drawn ones as large as the largest input, for as long as it is open."""
    if folder is not None:
        from deploy.core.odd_pictures import odd_pictures

        files = images_in(folder)
        odd = odd_pictures(files)
        if odd is not None:
            print(f"note: --images: {odd}")
        yield files
        return
    import tempfile

    from compress.data.synthetic import generate

    side = max(max(runner.card.input_size) for runner in runners.values())
    print(f"no --images: measuring on eight drawn images of {side}x{side} pixels")
    with tempfile.TemporaryDirectory() as drawn:
        generate(Path(drawn) / "drawn", train=8, val=1, size=side, classes=10, seed=0)
        yield sorted((Path(drawn) / "drawn" / "images").glob("train_*.png"))
