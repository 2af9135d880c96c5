"""What a runtime gets no file of, and the versions of its converter in which the reason was seen.

A newer version is tried, since what it makes is compared before it gets its name (`deploy.targets.make`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from deploy.core.card import ModelCard, network_precision
from deploy.core.environment import version_numbers
from deploy.core.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """precision: `fp16`, also of files with parts of it; `bf16`; `int8`. why, instead: for people.

    converter, seen, version: it is a converter's fault, whose newest version that had it is `seen`; the version that is
    here, None where there is none, of which its maker tells. No converter: no version of anything makes it better.
    """

    precision: str
    why: str
    instead: str
    converter: str | None = None
    seen: str = ""
    version: Callable[[], str | None] = lambda: None

    def check(self, source: Path, network: str) -> None:
        """Raise UserError, one line, if the file at `source` is refused. network: its precision, as `network_of`."""
        if self.precision not in network.split("+"):
            return
        what = f"{source}: is {network}, and"
        if self.converter is None:
            raise UserError(f"{what} {self.why}: {self.instead}")
        version = self.version()
        if version is not None and version_numbers(version) <= version_numbers(self.seen):
            raise UserError(f"{what} {self.converter} {version} {self.why}: {self.instead}")


def network_of(card: ModelCard) -> str:
    """`int8` of every quantized file, else the precision of the network."""
    return "int8" if card.quantization is not None else network_precision(card.precision)


def of_package(name: str) -> Callable[[], str | None]:
    """The version of an installed package."""

    def version() -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return version


def of_command(name: str) -> Callable[[], str | None]:
    """The version that a command on PATH says."""

    def version() -> str | None:
        try:
            done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        said = done.stdout.strip()
        return said if said[:1].isdigit() else None

    return version
