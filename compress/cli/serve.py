"""`compress serve`: exported files over HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.cli.groups import with_groups
from compress.cli.options import RunnerFlags, need_finite, values_of
from deploy.core.errors import UserError

commands = typer.Typer()


@dataclass(frozen=True)
class QueueFlags:
    """Options of batching: how requests are put together and how long they wait."""

    max_batch: Annotated[int, typer.Option("--max-batch", min=1, max=1024, help="Images in one call.")] = 16
    max_delay_ms: Annotated[
        float, typer.Option("--max-delay-ms", min=0, help="Longest wait for images that are still being decoded.")
    ] = 3.0
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Images inside the server, a model.")] = 256
    deadline_ms: Annotated[
        float, typer.Option("--deadline-ms", min=1, help="Who would wait longer is answered 429.")
    ] = 2000.0


@dataclass(frozen=True)
class RequestFlags:
    """Options of requests: what clients may send, and how it is decoded."""

    max_megabytes: Annotated[float, typer.Option("--max-megabytes", min=0.001, help="Largest request.")] = 20.0
    max_megapixels: Annotated[float, typer.Option("--max-megapixels", min=0.001, help="Largest picture.")] = 32.0
    decode_workers: Annotated[
        int | None, typer.Option("--decode-workers", min=1, help="Threads that decode. Default: one a core, at most 8.")
    ] = None


@commands.command()
@with_groups
def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]ARTIFACT...", help="Exported files; default name: the file's.")
    ],
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    provider: Annotated[
        str,
        typer.Option(
            "--provider",
            metavar="NAME,NAME",
            help="cpu, cuda, tensorrt, in order of preference; or openvino, openvino-gpu, openvino-npu.",
        ),
    ] = "cpu",
    opening: RunnerFlags = RunnerFlags(),
    queue: QueueFlags = QueueFlags(),
    requests: RequestFlags = RequestFlags(),
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Ask for the token in it. Also: COMPRESS_SERVE_TOKEN."),
    ] = None,
    allow_reload: Annotated[
        bool, typer.Option("--allow-reload", help="Clients may have a model's file loaded again.")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="After SIGTERM: not ready, but accepting.")
    ] = 1.0,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option("--log-level")] = "info",
) -> None:
    """Serve exported files over HTTP: pictures, the Open Inference Protocol, metrics, a web page.

    Ends with SIGTERM or SIGINT, after answering what it accepted; SIGHUP loads the files again."""
    for option, number in {**values_of(queue), **values_of(requests), "--drain-seconds": drain_seconds}.items():
        if isinstance(number, float):
            need_finite(number, option)
    files = _named_files(models)
    providers = [name.strip() for name in provider.split(",")]
    options = opening.arguments(list(files.values()), providers, max_batch=queue.max_batch)
    token = _token(token_file)
    from deploy.runtimes.open import open_runner
    from deploy.serve.server import serve as serve_files
    from deploy.serve.settings import Settings

    settings = Settings(
        **vars(queue),
        max_bytes=int(requests.max_megabytes * 1e6),
        max_pixels=int(requests.max_megapixels * 1e6),
        drain_s=drain_seconds,
        allow_reload=allow_reload,
        token=token,
        **({} if requests.decode_workers is None else {"decode_workers": requests.decode_workers}),
    )
    serve_files(
        files,
        lambda path: open_runner(path, providers, **options),
        settings,
        host=host,
        port=port,
        log_level=log_level,
        announce=partial(print, flush=True),
    )


def _named_files(models: Sequence[str]) -> dict[str, Path]:
    """Name → file, from `NAME=FILE` or `FILE`, which is called what the file is called."""
    from deploy.runtimes.open import check_artifact

    files: dict[str, Path] = {}
    for text in models:
        name, given, file = text.partition("=")
        if not given or "/" in name:  # a path may hold an equals sign
            name, file = Path(text).stem, text
        path = Path(file)
        check_artifact(path)
        if name in files:
            raise UserError(f"{path}: a second model named '{name}': give NAME={path}")
        files[name] = path
    return files


def _token(file: Path | None) -> str | None:
    """Read the token from the file or from COMPRESS_SERVE_TOKEN: on a command line every user of the machine could read
    it."""
    if file is None:
        return os.environ.get("COMPRESS_SERVE_TOKEN") or None
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"--token-file: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--token-file: {file}: the token must be ASCII") from None
