"""Time until anything begins: `compress --help` and `import compress`, without torch.

    python -m benchmarks startup

Every round is a process of its own, the cases in turn; an empty interpreter is measured beside them, because it is in
all of them. CPU time tells what a busy machine hides. Bars: 0.4 s for the help, 0.2 s for the import; and neither may
load torch.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.lib import options
from benchmarks.lib.measure import Call, environment_of_child, interleave
from benchmarks.lib.results import ROOT, Case, Row

COMMANDS = {
    "compress --help": ["-m", "compress", "--help"],
    "import compress": ["-c", "import compress"],
    "an empty interpreter": ["-c", ""],
}
BARS_S = {"compress --help": 0.4, "import compress": 0.2}
LOADED = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
"""Put before a case: its last line on standard error says whether torch was loaded."""
CODES = {
    "compress --help": "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('compress', run_name='__main__')",
    "import compress": "import compress",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    options.repeats(parser, 15)


def run(args: argparse.Namespace) -> Iterator[Case]:
    calls: dict[str, Call] = {name: partial(_start, words) for name, words in COMMANDS.items()}
    timings = interleave(calls, repeats=args.repeats, min_repeat_s=0)
    rows = []
    for name, timing in timings.items():
        bar = f"<= {1000 * BARS_S[name]:g}" if name in BARS_S else ""
        rows.append(replace(timing.row(name, "wall time"), bar=bar))
        rows.append(Row(name, "CPU time", timing.parts_ms["cpu"], "ms", n=timing.repeats))
    for name, code in CODES.items():
        loaded = _run(["-c", LOADED + code]).splitlines()[-1]
        rows.append(Row(name, "torch is loaded", int(loaded == "True"), bar="<= 0"))
    yield Case("one process each", rows)


def _start(words: list[str]) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _run(words: list[str]) -> str:
    """Run the interpreter; returns what it wrote to standard error."""
    environment = environment_of_child("default", 1)
    process = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return process.stderr
