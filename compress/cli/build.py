"""Engines: `compress build` makes one of an ONNX file, `compress refit` puts other weights into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.exits import next_command
from compress.cli.groups import with_groups
from compress.cli.options import EngineFlags, batch_sizes, need_file, values_of
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX, ONNX_SUFFIX

if TYPE_CHECKING:
    from compress.run.engines import EnginePlan
    from deploy.tensorrt.card import EngineOptions

commands = typer.Typer()

TritonRepo = Annotated[
    Path | None,
    typer.Option("--triton-repo", metavar="DIR", help="Also add it to a model repository of NVIDIA Triton."),
]


@commands.command()
@with_groups
def build(
    onnx: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An exported file; int8: in TensorRT's format.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: MODEL's name with .engine.")
    ] = None,
    engine: EngineFlags = EngineFlags(),
    triton_repo: TritonRepo = None,
) -> None:
    """Build the TensorRT engine of an exported file, with a card, for this GPU."""
    need_file(onnx)
    if onnx.suffix != ONNX_SUFFIX:
        raise UserError(f"{onnx}: is not an .onnx file; engines are built from exported ones: compress export {onnx}")
    next_command("benchmark", deliver(onnx, out, engine_plan(engine, triton_repo), triton_repo))


@commands.command()
def refit(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Built with --refit or --strip.")],
    onnx: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The same student with other weights.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: over ENGINE.")] = None,
) -> None:
    """Put the weights of an ONNX file into an engine, without building it again."""
    from deploy.tensorrt.build import refit_engine

    card = refit_engine(engine, onnx, out)
    print(f"{out or engine}: {card.engine_bytes / 1e6:.1f} MB with the weights of {onnx}")
    next_command("benchmark", out or engine)


def engine_plan(flags: EngineFlags, triton_repo: Path | None) -> EnginePlan:
    """Plan an engine. Raises UserError for options that cannot be."""
    if flags.strip and flags.refit == "individual":
        raise UserError("--refit: an engine without weights gets all of them back; leave out individual or --strip")
    if flags.strip and triton_repo is not None:
        raise UserError("--strip: Triton cannot serve an engine without weights; leave out --strip or --triton-repo")
    from compress.run.engines import EnginePlan

    plan = EnginePlan(_options(flags))
    return plan if flags.timing_cache is None else EnginePlan(plan.options, flags.timing_cache)


def deliver(onnx: Path, out: Path | None, plan: EnginePlan | None, triton_repo: Path | None) -> Path:
    """Build the engine of an ONNX file, if there is a plan, and put it, or the file, into a model repository."""
    artifact = onnx
    if plan is not None:
        from compress.run import engines

        artifact = onnx.with_suffix(ENGINE_SUFFIX) if out is None else out
        card = engines.build(onnx, artifact, plan)
        print(f"{artifact}: {engines.in_words(card)}")
    if triton_repo is not None:
        add_to_triton(triton_repo, artifact)
    return artifact


def add_to_triton(repository: Path, artifact: Path) -> None:
    from deploy.serve.triton_repo import write_triton_model

    added = write_triton_model(repository, artifact)
    print(f"{added.folder}: version {added.version}, backend {added.backend}, batches up to {added.max_batch}")


def _options(flags: EngineFlags) -> EngineOptions:
    from pydantic import ValidationError

    from deploy.tensorrt.card import EngineOptions

    text = flags.batch or "1,8,32"
    sizes = batch_sizes(text)
    if len(sizes) > 3 or sizes != sorted(sizes):
        raise UserError(f"--batch: '{text}': an engine has a smallest, a best and a largest batch, for example 1,8,32")
    smallest, largest = sizes[0], sizes[-1]
    given = {**values_of(flags), "--refit": "all" if flags.strip else flags.refit}
    fields = {
        option.removeprefix("--").removeprefix("builder-").replace("-", "_"): value
        for option, value in given.items()
        if option not in ("--batch", "--timing-cache") and value is not None
    }
    try:
        return EngineOptions(batches=(smallest, sizes[1] if len(sizes) == 3 else largest, largest), **fields)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
        raise UserError(f"{option}{problem['msg'].removeprefix('Value error, ')}") from None
