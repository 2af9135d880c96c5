"""Engines: building one from an ONNX file, and putting other weights into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.exits import next_command
from compress.cli.options import batch_sizes
from deploy.core.errors import UserError
from deploy.core.files import ENGINE_SUFFIX

if TYPE_CHECKING:
    from deploy.tensorrt.card import EngineCard, EngineOptions

commands = typer.Typer()


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


def engine_options(batch: str, given: dict[str, Any]) -> EngineOptions:
    """given: option → value, None where the default holds."""
    from pydantic import ValidationError

    from deploy.tensorrt.card import EngineOptions

    sizes = batch_sizes(batch)
    if len(sizes) > 3 or sizes != sorted(sizes):
        raise UserError(f"--batch: '{batch}': an engine has a smallest, a best and a largest batch, for example 1,8,32")
    smallest, largest = sizes[0], sizes[-1]
    fields = {
        option.removeprefix("--").removeprefix("builder-").replace("-", "_"): value
        for option, value in given.items()
        if value is not None
    }
    try:
        return EngineOptions(batches=(smallest, sizes[1] if len(sizes) == 3 else largest, largest), **fields)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
        raise UserError(f"{option}{problem['msg'].removeprefix('Value error, ')}") from None


def deliver(
    onnx: Path, out: Path | None, options: EngineOptions | None, timing_cache: Path | None, triton_repo: Path | None
) -> tuple[Any, ...]:
    """Build the engine of an ONNX file and put it, or the file, into a model repository. The next command."""
    artifact = onnx
    if options is not None:
        from compress.console import progress as progress_of
        from deploy.tensorrt.build import TIMING_CACHES, build_engine

        artifact = onnx.with_suffix(ENGINE_SUFFIX) if out is None else out
        with progress_of(f"building {artifact.name}") as progress:
            card = build_engine(onnx, artifact, options, timing_caches=timing_cache or TIMING_CACHES, progress=progress)
        print(f"{artifact}: {_engine_in_words(card)}")
    if triton_repo is not None:
        from deploy.serve.triton_repo import write_triton_model

        added = write_triton_model(triton_repo, artifact)
        print(f"{added.folder}: version {added.version}, backend {added.backend}, batches up to {added.max_batch}")
    return ("benchmark", artifact)


def _engine_in_words(card: EngineCard) -> str:
    share = ", ".join(f"{part:.0%} {name}" for name, part in card.network.share.items())
    layers = f"{card.layers.count} layers" if card.layers is not None else f"layers not known ({card.layers_missing})"
    smallest, best, largest = card.options.batches
    return (
        f"{card.engine_bytes / 1e6:.1f} MB in {card.build_seconds:.0f} s with {card.machine.library} "
        f"{card.machine.version} for {card.machine.gpu or 'no GPU'}; batch {smallest} to {largest}, best at {best}; "
        f"convolutions and matrix products {share}; {layers}"
    )
