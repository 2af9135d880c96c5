"""What a runtime's converter makes nothing good of, and the versions of it in which that was seen.

A newer version is tried, since what it makes is compared before it gets its name (`deploy.targets.make`).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from deploy.core.card import ModelCard, network_precision
from deploy.core.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """precision: `int8`, or `half`: fp16, bf16 and files with parts of them. converter: its name. seen: its newest
    version that did so. why, instead: for people. version: of the converter that is here; None: there is none, of which
    its maker tells.
    """

    precision: str
    converter: str
    seen: str
    why: str
    instead: str
    version: Callable[[], str | None]

    def check(self, source: Path, card: ModelCard) -> None:
        """Raise UserError, one line, if the file at `source` is refused. card: of it."""
        network = "int8" if card.quantization is not None else network_precision(card.precision)
        if ("half" if "16" in network else network) != self.precision:
            return
        version = self.version()
        if version is not None and _numbers(version) <= _numbers(self.seen):
            raise UserError(f"{source}: is {network}, and {self.converter} {version} {self.why}: {self.instead}")


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
        return done.stdout.strip()

    return version


# --- details --------------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
