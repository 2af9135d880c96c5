"""Runs what a document shows, in its order, in a folder: recipes and modules are saved, commands and programs run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compress import cli
from tests.helpers.server_process import server

SERVER = "http://127.0.0.1:8000"
"""Where a shown program expects a server; it gets one of its own."""


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


def run(snippet: Snippet, folder: Path, *, quicker: Mapping[str, str], left_out: tuple[str, ...]) -> None:
    """Run one snippet; the working directory is `folder`.

    A whole recipe `name: first` is saved as first.yaml. A program that begins with a comment `# mypkg/models.py` is
    saved there; another one runs.

    Args:
        quicker: what is written instead, as regular expressions: long trainings become short ones.
        left_out: beginnings of commands that are not run, because they install things.
    """
    text = snippet.text
    for pattern, replacement in quicker.items():
        text = re.sub(pattern, replacement, text)
    if snippet.language == "yaml":
        if name := re.match(r"name: (\S+)\n", text):
            (folder / f"{name[1]}.yaml").write_text(text, encoding="utf-8")
    elif snippet.language == "console":
        for line in re.sub(r"\\\n>?\s*", "", text).splitlines():
            if line.startswith("$ ") and not line[2:].startswith(left_out):
                _command(line[2:], snippet.where)
    elif snippet.language == "python":
        if file := re.match(r"# ([\w/]+\.py)\n", text):
            (folder / file[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / file[1]).write_text(text, encoding="utf-8")
        elif SERVER in text:
            with server(*folder.glob("runs/*/student.onnx")) as running:
                _program(text.replace(SERVER, running.url), snippet.where)
        else:
            _program(text, snippet.where)


def _program(text: str, where: str) -> None:
    exec(compile(text, where, "exec"), {"__name__": "__main__"})


def _command(line: str, where: str) -> None:
    """`compress …` in this process, which has everything imported; others in a shell. Both must end with 0."""
    words = shlex.split(line, comments=True)
    if words[0] == "compress":
        try:
            cli.main(words[1:])
        except SystemExit as stop:
            assert stop.code in (0, None), f"{where}: {line} ended with {stop.code}"
    else:
        line = line.replace("python ", f"{shlex.quote(sys.executable)} ", 1) if words[0] == "python" else line
        subprocess.run(line, shell=True, check=True)
