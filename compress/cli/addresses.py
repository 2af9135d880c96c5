"""Addresses among the words of a command line: each becomes the path of its place in the cache before typer makes paths
of words, which would make one slash of two."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast

import typer

from deploy.core.storage import TAR, place, push, shown, workplace

OUTPUTS = ("--out", "--json")
"""Options whose value is written; it is uploaded when the command ends, also where a gate failed."""
WORKED_ON = ("report",)
"""Commands that write into what they are given."""
OF_SERVERS = ("predict", "benchmark")
"""Commands that know themselves what http:// is: a server, or a picture."""
OF_NO_FILES = {"--set", "--address"}
"""Options whose addresses stay: a recipe reads its own itself, and a cluster is no file."""


@contextmanager
def addresses_as_paths(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The words with paths in the place of addresses. What the command prints says addresses again, and in the end what
    was written for one is uploaded."""
    words: list[str] = []
    written: list[Path] = []
    command = next((word for word in arguments if not word.startswith("-")), "")
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, address = _address(word, http=command not in OF_SERVERS)
        if not address or not OF_NO_FILES.isdisjoint((before, option.rstrip("="))):
            words.append(word)
        elif before in OUTPUTS or option.rstrip("=") in OUTPUTS or command in WORKED_ON:
            written.append(workplace(address))
            words.append(f"{option}{written[-1]}")
        else:
            words.append(f"{option}{place(address)}")
    try:
        with redirect_stdout(cast(TextIO, _Shown(sys.stdout))):
            yield words
    except typer.Exit:
        _upload(written)
        raise
    _upload(written)


# --- details --------------------------------------------------------------------------------------------

_WORD = re.compile(r"([\w.-]+=)?([a-z][a-z0-9+.-]+://.*)", re.IGNORECASE)


def _address(word: str, *, http: bool) -> tuple[str, str]:
    """What stands before an address, such as `--out=` or `NAME=`, and the address; nothing where there is none."""
    found = _WORD.fullmatch(word)
    if found is None:
        return ("", word) if word.endswith(TAR) and not word.startswith("-") else ("", "")
    return ("", "") if found[2].startswith("http") and not http else (found[1] or "", found[2])


class _Shown:
    """A stream with addresses in the place of their places."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(shown(text) if isinstance(text, str) else text)  # click tries whether bytes go

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _upload(written: Sequence[Path]) -> None:
    for path in written:
        for address in push(path):
            print(f"uploaded: {address}")
