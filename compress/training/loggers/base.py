"""The contract of a logger, and the facts of a run that it begins with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """The final figures of a run: a row a model or file, whose name is its first cell."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def figures(self) -> dict[str, float]:
        """Every number by `<row>/<column>`."""
        return {
            f"{row[0]}/{column}": float(cell)
            for row in self.rows
            for column, cell in zip(self.columns[1:], row[1:], strict=True)
            if isinstance(cell, int | float)
        }


@dataclass(frozen=True)
class RunFacts:
    """What a logger is told of a run when it begins.

    folder: of the run. settings: the recipe as JSON.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]

    def flat(self) -> dict[str, str]:
        """The settings by dotted key, as text; lists are JSON-like text, empty sections have no key."""
        return dict(_flat("", self.settings))


class RunLogger(ABC):
    """A run at one tool, which may be continued by `identifier`. All methods after the constructor are called in one
    thread of their own, and may take long or fail; then the logger is given up and the training goes on."""

    identifier: str

    @abstractmethod
    def row(self, training: str, step: int, values: Mapping[str, float]) -> None:
        """Record figures of one training (`student`) at an optimizer step."""

    @abstractmethod
    def table(self, table: Table) -> None:
        """Record the final figures of the run."""

    @abstractmethod
    def upload(self, files: Sequence[Path]) -> None:
        """Store files of the run."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """End the run at the tool. finished: False where it was interrupted or failed."""


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else key, inner)]
    return [(prefix, "null" if value is None else str(value))]
