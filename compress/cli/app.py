"""The command line: its groups of commands, and how a process ends.

Exit codes: 0 done, 1 a gate failed, 2 bad input, 130 interrupted, 143 terminated (SIGTERM). A user's mistake is one
`error: …` line on stderr (one a problem for a recipe with several), never a traceback; a traceback is our mistake.

A module of this folder that has `commands` holds a group, and no list names it: every function with
`@commands.command` is a command; its signature is what `--help` shows. Imports of the packages that do the work stand
inside the functions: `--help` answers at once, and commands on exported files run where torch is not installed.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, NoReturn

import typer

from compress import __version__
from compress.cli.addresses import addresses_as_paths
from compress.cli.exits import own_stdout, to_stderr
from deploy.core import interrupts
from deploy.core.errors import LocalUserError, UserError

app = typer.Typer(
    name="compress",
    help="Distill a large object detector into a small one that ships, and prove that it survived.",
    epilog="Start with: compress quickstart",
    rich_markup_mode=None,  # plain help: loading rich takes as long as everything else together
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
WITH_COMMAS = ("--names", "--classes", "--provider", "--precision", "--scope", "--save", "--batch", "--rate")
"""Options that take several values."""
COMPLETE = "_COMPRESS_COMPLETE"
"""Set by what `compress --install-completion` puts into the shell, which then asks for words."""
IN_HELP = (
    "train",
    "data",
    "check_model",
    "prune",
    "export",
    "quantize",
    "build",
    "predict",
    "validate",
    "benchmark",
    "serve",
    "doctor",
)
"""Groups in the order in which `--help` shows them; others follow by name."""

_modules = {found.name for found in iter_modules([str(Path(__file__).parent)])} - {"app"}
for _name in (*IN_HELP, *sorted(_modules.difference(IN_HELP))):
    _commands = getattr(import_module(f"compress.cli.{_name}"), "commands", None)
    if _commands is not None:
        app.add_typer(_commands)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `compress` command: runs it and exits the process."""
    if COMPLETE in os.environ:  # the shell asks
        typer.main.get_command(app)(prog_name="compress")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str]) -> int:
    try:
        with own_stdout(), interrupts.listening(), addresses_as_paths(arguments) as words:
            command = typer.main.get_command(app)
            with command.make_context("compress", words) as context:
                command.invoke(context)
            sys.stdout.flush()
    except typer.Exit as stop:
        return int(stop.exit_code)
    except interrupts.Terminated:
        to_stderr(f"terminated{_how_to_resume(arguments)}")
        return 128 + signal.SIGTERM
    except (KeyboardInterrupt, typer.Abort):
        to_stderr(f"interrupted{_how_to_resume(arguments)}")
        return 128 + signal.SIGINT
    except UserError as error:
        for line in str(error).splitlines():
            to_stderr(f"error: {line}", everywhere=isinstance(error, LocalUserError))
        return 2
    except ImportError as error:
        explanation = _missing_package(error)
        if explanation is None:
            raise
        to_stderr(f"error: {explanation}")
        return 2
    except _UsageProblem as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        to_stderr(f"error: {' '.join(message.replace('Value error, ', '').split())}{_about_commas(message, arguments)}")
        return 2
    except BrokenPipeError:  # `compress … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except OSError as error:  # a full disk, a folder that may not be written, a file where a folder should be
        place = error.filename2 or error.filename
        reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
        to_stderr(f"error: {place}: {reason}" if place else f"error: {reason}", everywhere=True)
        return 2
    return 0


# typer's own copy of click is private; its exceptions are the base classes of a public one.
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _missing_package(error: ImportError) -> str | None:
    """Word the error for a package that is not installed; None when the mistake is ours."""
    from compress import foreign_kernels
    from compress.doctor import TRAIN

    package = (error.name or "").partition(".")[0]
    if package == "kernels":
        return foreign_kernels()
    serving = ("fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart")
    extras = {**dict.fromkeys(TRAIN, "train"), **dict.fromkeys(serving, "serve"), "tensorrt": "trt", "pycuda": "trt"}
    extra = extras.get(package)
    if isinstance(error, ModuleNotFoundError) and extra is not None:
        return f"{package} is not installed; this command needs: pip install 'compress-detectors[{extra}]'"
    return None


def _about_commas(message: str, arguments: list[str]) -> str:
    """The end of an error about words too many, where they are meant as values of an option: `--names a b c`."""
    for option, word in zip(arguments, arguments[2:], strict=False):
        if option in WITH_COMMAS and not word.startswith("-") and "extra argument" in message:
            return f"; several values of {option} are one word with commas, as in {option} a,b,c"
    return ""


def _how_to_resume(arguments: list[str]) -> str:
    resumable = ("quickstart", "run", "distill", "train", "pseudo-label")
    if not arguments or arguments[0] not in resumable or "--dry-run" in arguments:
        return ""
    continues = "--resume" in arguments or arguments[0] == "quickstart"
    again = [*arguments, *([] if continues else ["--resume"])]
    return f"; continue with: compress {shlex.join(again)}"
