"""manifest.json of a run: what each stage was made from, so that a finished stage is not done twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json


class Manifest:
    """The stages of a run, a row each: inputs (hash), outputs (path and hash), seconds, versions, result."""

    def __init__(self, run_dir: Path, versions: Mapping[str, str]) -> None:
        self._path = run_dir / "manifest.json"
        self._run_dir = run_dir
        self._versions = dict(versions)
        self._rows = _read_rows(self._path)

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        run: Callable[[], Any],
        *,
        write: bool = True,
    ) -> Any:
        """Run a stage, or return its recorded result when inputs and outputs are as it left them.

        Args:
            inputs: JSON-able description of everything that shapes the result (hashes of files included).
            outputs: files that the stage writes.
            run: does the work; its return value must be JSON-able.
            write: False in processes that only help: they run along and record nothing.
        """
        digest = fingerprint(inputs)
        row = self._rows.get(name)
        if row is not None and row["inputs"] == digest and self._intact(row, outputs):
            return row["result"]
        started = time.perf_counter()
        result = run()
        if write:
            self._rows[name] = {
                "inputs": digest,
                "outputs": {self._relative(path): sha256_of(path) for path in outputs},
                "seconds": round(time.perf_counter() - started, 2),
                "versions": self._versions,
                "result": result,
            }
            write_json(self._path, {"stages": self._rows})
        return result

    def _intact(self, row: dict[str, Any], outputs: Sequence[Path]) -> bool:
        recorded = row["outputs"]
        return set(recorded) == {self._relative(path) for path in outputs} and all(
            path.is_file() and sha256_of(path) == recorded[self._relative(path)] for path in outputs
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._run_dir).as_posix()


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The stages that the file records. What is damaged in it counts as absent and only costs time: those stages
    run again. Raises UserError when a folder stands in its place."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a run keeps its record in a file of this name, so remove the folder")
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(stages, dict):
        return {}
    return {name: row for name, row in stages.items() if _is_row(row)}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("inputs"), str)
        and isinstance(row.get("outputs"), dict)
        and "result" in row
    )


def fingerprint(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
