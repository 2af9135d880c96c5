"""Work that is killed, is sent a signal, or whose disk is full, at moments that a seed chooses; and the same work taken
up again.

    python -m tests.helpers.interrupted run kill FOLDER SEED COUNT

A program of its own, which forks a process for each try: what has to be imported is imported once, and no test's
threads are copied. It prints a JSON list with an entry a moment: how the first try ended, what it said, and what is
wrong with what it left (nothing, if all is well).
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import cli
from compress.export import onnx as export
from compress.pseudo import parts
from compress.run import pipeline
from deploy.core.files import sha256_of
from tests.helpers import exchanged_inputs, random_teacher, tiny_recipe

KEPT = (".safetensors", ".onnx", ".json", ".yaml", ".html")
"""Files that are whole at any moment: as they were, or as they will be."""


@dataclass(frozen=True)
class Work:
    """start: what is there before, in a fresh folder. first, again: the command, and how it is taken up."""

    start: Callable[[Path], object]
    first: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    result: Callable[[Path], list[Path]]
    """The files that must come out the same."""


@dataclass
class Outcome:
    ended: int
    """Exit code; -9: killed."""
    said: str
    moments: int
    """Changes of the file system until then."""
    seconds: float
    wrong: list[str] = field(default_factory=list)


# --- what is done ---------------------------------------------------------------------------------------

STUDENT = ["--set", "teacher=null", "--set", "methods={bckd: null}", "--set", "train.checkpoint_every=2"]
STUDENT += ["--set", "deploy.benchmark.seconds=0.001"]


def _run(folder: Path, *more: str) -> list[str]:
    return ["run", str(tiny_recipe.recipe_file(folder)), *STUDENT, *more]


def _pseudo(folder: Path, *more: str) -> list[str]:
    world = folder / "world"
    teachers = [str(world / f"{name}.safetensors") for name in "ab"]
    names = ["--class-map", str(world / "map.json"), "--short", "64", "--long", "96", "--batch", "2", "--workers", "0"]
    thresholds = ["--tau", "0.6", "--tau-ignore", "0.5"]
    places = ["--images", str(world / "images"), "--out", str(folder / "out.json")]
    return ["pseudo-label", *teachers, *places, *names, *thresholds, *more]


def _world(folder: Path) -> None:
    for index in range(24):
        exchanged_inputs.picture(folder / "world" / "images" / f"{index:02}.png", (index * 9, 200 - index * 5, 30))
    random_teacher.teacher(folder / "world" / "a.safetensors", ("cat", "dog"), 1)
    random_teacher.teacher(folder / "world" / "b.safetensors", ("person", "kitten"), 2)
    (folder / "world" / "map.json").write_text('{"kitten": "cat"}')


def _results(folder: Path, *names: str) -> list[Path]:
    return [folder / "runs" / "tiny" / name for name in names]


def _export(folder: Path) -> list[str]:
    (checkpoint,) = _results(folder, "student.safetensors")
    return [
        "export",
        str(checkpoint),
        "--precision",
        "fp32,int8",
        "--calibration-images",
        "2",
        "--nms-threshold",
        "0.55",
    ]


WORK = {
    "train": Work(  # with loader processes
        start=lambda folder: None,
        first=lambda folder: ["train", str(tiny_recipe.recipe_file(folder)), *STUDENT, "--set", "data.workers=2"],
        again=lambda folder: [*WORK["train"].first(folder), "--resume"],
        result=lambda folder: _results(folder, "student.safetensors", "recipe.yaml"),
    ),
    # An older run of the same name, with another seed, is there and finished.
    "run": Work(
        start=lambda folder: quietly(_run(folder, "--set", "seed=7")),
        first=lambda folder: _run(folder),
        again=lambda folder: _run(folder, "--resume"),
        result=lambda folder: _results(
            folder, "student.safetensors", "student.onnx", "recipe.yaml"
        ),
    ),
    # Files of a student with other thresholds are there.
    "export": Work(
        start=lambda folder: quietly(_run(folder)),
        first=_export,
        again=_export,
        result=lambda folder: _results(folder, "student.onnx", "student.int8.onnx", "student.safetensors"),
    ),
    "pseudo-label": Work(
        start=_world,
        first=lambda folder: _pseudo(folder),
        again=lambda folder: _pseudo(folder, "--resume"),
        result=lambda folder: [folder / "out.json"],
    ),
}  # fmt: skip


SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
ROOM = {"run": 11_000_000, "export": 1_500_000, "pseudo-label": 50_000}
"""Bytes that each needs for a while beside what it leaves, and some."""

# --- how it is interrupted ------------------------------------------------------------------------------


def main(kind: str, how: str, folder: Path, seed: int, count: int) -> list[dict[str, Any]]:
    work, chance = WORK[kind], random.Random(seed)
    at = folder / "at"  # one place for all: recipes and manifests name it
    start, whole = folder / "start", folder / "whole"
    at.mkdir(parents=True)
    in_child(lambda: work.start(at))
    shutil.copytree(at, start)
    before = size_of(at)
    reference = in_child(lambda: command(work.first(at)))
    assert reference.ended == 0, reference
    shutil.copytree(at, whole)
    most = size_of(at) + ROOM.get(kind, 0)
    found = []
    for _ in range(count):
        share = chance.random()
        shutil.rmtree(at)
        if how == "kill":
            shutil.copytree(start, at)
            outcome = in_child(lambda: command(work.first(at)), kill_at=1 + int(share * reference.moments))
            allowed = (-signal.SIGKILL, 0)  # it may have changed less than the first time
        elif how in SIGNALS:
            shutil.copytree(start, at)
            outcome = in_child(lambda: command(work.first(at)), send=SIGNALS[how], after=share * reference.seconds)
            allowed = (128 + SIGNALS[how], 0)  # it may have been done by then
            outcome.wrong += _told_otherwise(outcome)
        else:
            with disk(at, before + 20_000 + int(share * (most - before))) as grow:
                shutil.copytree(start, at, dirs_exist_ok=True)
                outcome = in_child(lambda: command(work.first(at)))
                outcome.wrong += left_wrong(at, start, whole, work)
                grow()
                finish(outcome, at, whole, work)
            allowed = (0, 2)
        if outcome.ended not in allowed:
            outcome.wrong.append(f"ended with {outcome.ended}")
        if how != "full":
            outcome.wrong += left_wrong(at, start, whole, work)
            finish(outcome, at, whole, work)
        elif outcome.ended == 2:
            lines = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
            if len(lines) != 1 or str(at) not in lines[0] or "Traceback" in outcome.said:
                outcome.wrong.append(f"said {outcome.said[-500:]!r}")
        found.append({"share": round(share, 3), **vars(outcome)})
        print(kind, how, json.dumps(found[-1])[:600], file=sys.stderr, flush=True)
    return found


def _told_otherwise(outcome: Outcome) -> list[str]:
    """What is wrong with what an interrupted command said: one line about it, how to go on, and no other error."""
    told = [line for line in outcome.said.splitlines() if "; continue with: compress " in line]
    loud = [word for word in ("Traceback", "Exception ignored", "error:", "Error") if word in outcome.said]
    if outcome.ended != 0 and (loud or len(told) != 1 or not told[0].endswith(" --resume")):
        return [f"said {outcome.said[-1500:]!r}"]
    return []


def size_of(folder: Path) -> int:
    """Bytes on a disk that gives out whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


def left_wrong(at: Path, start: Path, whole: Path, work: Work) -> list[str]:
    """What is neither as it was nor as it will be. Reports and records differ by times, and only have to be whole."""
    wrong = []
    for path in work.result(at):
        was, will = (base / path.relative_to(at) for base in (start, whole))
        kept = {sha256_of(file) for file in (was, will) if file.is_file()}
        if path.is_file() and sha256_of(path) not in kept:
            wrong.append(f"{path.name} is neither the old one nor the new one")
        if not path.is_file() and was.is_file():
            wrong.append(f"{path.name} is gone")
    for path in at.rglob("[!.]*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            wrong.append(f"{path} is not whole")
    return wrong


def finish(outcome: Outcome, at: Path, whole: Path, work: Work) -> None:
    """Take the work up, and look whether it ends as it would have."""
    again = work.again(at) if outcome.ended != 0 or "--resume" in work.again(at) else work.first(at)
    ended = in_child(lambda: command(again))
    if ended.ended != 0:
        outcome.wrong.append(f"taken up, it ended with {ended.ended}: {ended.said[-500:]}")
    for path in work.result(at):
        if not path.is_file() or sha256_of(path) != sha256_of(whole / path.relative_to(at)):
            outcome.wrong.append(f"{path.name} differs at the end")
    left = [path.name for name in ("*.new", "*.old", "*.parts", "*.lock") for path in at.rglob(name)]
    # Whether a file can be written is tried with an empty one.
    left += [path.name for path in at.rglob(".*-*") if path.is_file() and path.stat().st_size]
    if left:
        outcome.wrong.append(f"left behind: {left}")


def in_child(
    work: Callable[[], object], *, kill_at: int = 0, send: signal.Signals | None = None, after: float = 0.0
) -> Outcome:
    """Do it in a forked process, which what it prints comes back from. kill_at: its change of the file system, counted
    from 1, before which it is killed; 0: none. send: a signal that it gets so many seconds `after` it began to listen.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counted:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                export.datetime = types.SimpleNamespace(UTC=None, datetime=_Clock)  # type: ignore[attr-defined]
                _count(counted.fileno(), kill_at)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have ignored it
                work()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        started = time.perf_counter()
        if send is not None:
            _send(child, send, after)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        said = output.read().decode(errors="replace")
        moments = int(os.pread(counted.fileno(), 20, 0) or 0)
    return Outcome(os.waitstatus_to_exitcode(status), said, moments, seconds)


def _send(child: int, number: signal.Signals, after: float) -> None:
    """Send a signal to a process that may end before."""
    until = time.perf_counter() + after
    while time.perf_counter() < until or not _listens(child, number):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)
    os.kill(child, number)


def _listens(child: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal. Python has one for SIGINT from the start."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE)
    return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "tempfile.mkstemp", "shutil.rmtree")


def _count(counter: int, kill_at: int) -> None:
    """Count this process's changes of the file system, and kill it before one of them; in a part of pseudo labels in
    the middle of a line."""
    moments = 0

    def moment() -> bool:
        nonlocal moments
        moments += 1
        os.pwrite(counter, str(moments).encode(), 0)
        return moments == kill_at

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        if (writes or event in CHANGES) and moment():
            os.kill(os.getpid(), signal.SIGKILL)

    def append(file: Any, chunk: dict[str, Any]) -> None:
        if moment():
            file.write(json.dumps(chunk)[:40])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, chunk)

    original = parts.append
    parts.append = append
    sys.addaudithook(heard)


class _Clock:
    """Cards say when a file was made; here always the same."""

    @staticmethod
    def now(zone: object) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1)


def command(arguments: list[str]) -> None:
    cli.main(arguments)


def quietly(arguments: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(arguments)


@contextlib.contextmanager
def disk(at: Path, size: int) -> Any:
    """A small disk at a folder; what it yields makes room."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(at)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


if __name__ == "__main__":
    assert pipeline  # imported before the first fork
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
