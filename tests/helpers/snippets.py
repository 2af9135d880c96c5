"""Follows a document as a reader does, in a folder: recipes and modules are saved, commands and programs run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from compress import cli
from tests.helpers.server_process import ROOT, Server, server

SERVER = "http://127.0.0.1:8000"
"""Where a shown program expects a server: the one that the page started last, or one of its own."""


@dataclass(frozen=True)
class Snippet:
    where: str
    language: str
    text: str


def snippets(document: Path) -> Iterator[Snippet]:
    """The fenced blocks of a document that say what language they are in."""
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        yield Snippet(f"{document.name}:{line}", match[1], match[2])


def commands(text: str) -> Iterator[tuple[str, int]]:
    """The commands of a console block, after `$ `, each with its exit code: 1 if `failed: …` is shown below it."""
    for shown in re.split(r"^\$ ", re.sub(r"\\\n>?\s*", "", text), flags=re.MULTILINE)[1:]:
        line, _, printed = shown.partition("\n")
        yield line, int(bool(re.search(r"^failed: ", printed, re.MULTILINE)))


def run(shown: Iterable[Snippet], folder: Path, *, quicker: Mapping[str, str], left_out: Iterable[str]) -> None:
    """Run snippets one after the other; the working directory is `folder`.

    A whole recipe `name: first` is saved as first.yaml. A program that begins with a comment `# mypkg/models.py` is
    saved there; another one runs. A server runs until the next one, or the end, and must then end with 0.

    Args:
        quicker: what is written instead, as regular expressions: long trainings become short ones.
        left_out: beginnings of commands and programs that are not run.
    """
    with ExitStack() as stack:
        running: Server | None = None
        for snippet in shown:
            text = snippet.text
            for pattern, replacement in quicker.items():
                text = re.sub(pattern, replacement, text)
            if snippet.language == "yaml":
                if name := re.match(r"name: (\S+)\n", text):
                    (folder / f"{name[1]}.yaml").write_text(text, encoding="utf-8")
            elif snippet.language == "console":
                for line, code in commands(text):
                    if line.startswith(tuple(left_out)):
                        continue
                    if line.startswith("compress serve "):
                        _stop(running, snippet.where)
                        arguments = shlex.split(line)[2:]
                        running = stack.enter_context(server(*arguments, folder=folder))
                    else:
                        _command(line, code, snippet.where)
            elif snippet.language == "python" and not text.startswith(tuple(left_out)):
                if file := re.match(r"# ([\w/]+\.py)\n", text):
                    (folder / file[1]).parent.mkdir(parents=True, exist_ok=True)
                    (folder / file[1]).write_text(text, encoding="utf-8")
                    continue
                if SERVER in text and running is None:
                    running = stack.enter_context(server(*folder.glob("runs/*/student.onnx")))
                _program(text if running is None else text.replace(SERVER, running.url), snippet.where)
        _stop(running, "the end")


def _stop(running: Server | None, where: str) -> None:
    assert running is None or running.stop() == 0, f"{where}: {running.log_file.read_text()}"


def _program(text: str, where: str) -> None:
    exec(compile(text, where, "exec"), {"__name__": "__main__"})


def _command(line: str, code: int, where: str) -> None:
    """`compress …` in this process, which has everything imported; in a shell what starts processes, and the rest."""
    words = shlex.split(line, comments=True)
    if words[0] == "compress" and "--devices" not in words:
        ended: object = 0
        try:
            cli.main(words[1:])
        except SystemExit as stop:
            ended = stop.code or 0
    else:
        python = shlex.quote(sys.executable)
        torchrun = f"{python} -m torch.distributed.run"
        of_the_repository = words[0] == ".venv/bin/python"
        first = {
            "compress": f"{python} -m compress",
            "python": python,
            ".venv/bin/python": python,
            "torchrun": torchrun,
        }.get(words[0], words[0])
        line = line.replace(words[0], first, 1)
        ended = subprocess.run(line, shell=True, cwd=ROOT if of_the_repository else None).returncode
    assert ended == code, f"{where}: {line} ended with {ended}"
