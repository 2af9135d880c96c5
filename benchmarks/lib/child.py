"""A function of a suite in a process of its own: with another interpreter, allocator or number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.lib.results import ROOT
from deploy.core.errors import UserError
from deploy.core.files import write_json


def call(function: str, *arguments: Any, python: Path | None = None, environment: dict[str, str] | None = None) -> Any:
    """Call `function` ("package.module:name") and return its result; it and the arguments are JSON.

    Raises UserError when the process ends with an error, which it has printed by then.
    """
    with tempfile.TemporaryDirectory(prefix="bench-child-") as folder:
        out = Path(folder) / "result.json"
        command = [
            str(python or sys.executable),
            "-m",
            "benchmarks.lib.child",
            function,
            json.dumps(arguments),
            str(out),
        ]
        code = subprocess.run(command, env=environment, cwd=ROOT).returncode
        if code:
            raise UserError(f"the process of {function} ended with code {code}; its error is printed above")
        return json.loads(out.read_text(encoding="utf-8"))


def _main(function: str, arguments: str, out: str) -> None:
    module, _, name = function.partition(":")
    write_json(Path(out), getattr(import_module(module), name)(*json.loads(arguments)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
