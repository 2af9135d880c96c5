"""A run at the loggers of other tools: where it begins and is continued, and the figures that it ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console

from compress.config.loggers import Loggers
from compress.manifest import TRAININGS, RunFolder
from compress.report.reading import parse_report
from compress.training.distributed import on_first_process
from compress.training.loggers.base import Cell, RunFacts, Table
from compress.training.loggers.opened import OpenLoggers, logging_to


@dataclass(frozen=True)
class LoggingPlan:
    """Plan of what a run tells loggers.

    content: the recipe as JSON. identity: of everything in it that shapes the result.
    """

    settings: Loggers
    name: str
    content: Mapping[str, Any]
    identity: str


@contextmanager
def logging_run(
    fabric: Fabric, plan: LoggingPlan, folder: RunFolder, console: Console, *, resume: bool
) -> Iterator[OpenLoggers]:
    """The loggers of a run, opened by process 0 before anything is trained; see `logging_to`."""
    say = partial(console.print, markup=False, soft_wrap=True)
    opened = [OpenLoggers({}, (), say)]
    with ExitStack() as stack:

        def begin() -> None:
            facts = RunFacts(plan.name, folder.path, plan.content)
            logging = logging_to(plan.settings, facts, folder.loggers, plan.identity, resume=resume, say=say)
            opened[0] = stack.enter_context(logging)

        on_first_process(fabric, begin)
        yield opened[0]


def final_table(folder: RunFolder, *, reported: bool) -> Table:
    """The figures of a run: those of its report, or of its trainings where it has none."""
    if not reported:
        stages = folder.stages()
        trained = [(name, stages[name]["result"]["metrics"]["map"]) for name in TRAININGS if name in stages]
        return Table(("model", "map"), trained)
    report = parse_report(json.loads(folder.report.read_text(encoding="utf-8")))
    rows: list[tuple[Cell, ...]] = []
    for role in report.models.titles:
        model, torch = report.models.of(role), report.in_torch(role)
        if model is not None:
            times = (None, None) if torch is None else (torch.p50, torch.p99)
            rows.append((role, model.map, None, model.params_m, model.gflops, *times, None))
    rows += [(file.file, file.map, file.map_drop, None, None, file.p50, file.p99, file.gate) for file in report.files]
    return Table(("model", "map", "map drop", "params M", "GFLOPs", "p50 ms", "p99 ms", "gate"), rows)


def files_of(folder: RunFolder) -> list[Path]:
    """What a run leaves for others: recipe, student, exported files and report, as far as they are there."""
    exported = sorted(folder.path.glob("student*.onnx"))
    return [file for file in (folder.recipe, folder.weights(), *exported, folder.report, folder.page) if file.is_file()]
