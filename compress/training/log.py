"""Log of a training: a live line on a terminal, plain lines elsewhere, metrics.csv, TensorBoard, other loggers."""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from compress.console import open_console
from compress.manifest import TrainingFolder
from compress.training.loggers.opened import OpenLoggers
from compress.training.time_left import TimeLeft
from deploy.core.files import naming, write_text
from deploy.validate.coco import CocoMetrics

OBSERVED = ("map", "grad_", "scale_", "variance_")  # how columns that are no losses begin
PLAIN_EVERY_S = 15.0  # seconds between plain lines when the output is not a terminal, at the beginning
PLAIN_SHARE = 0.05  # of the time that a training has taken, later


class TrainingLog:
    """Progress and history of one training. `enabled` is False on all processes but the first.

    Rows after `from_step` of an earlier, interrupted run are dropped from metrics.csv, so that the file tells
    one story. Columns: step, epoch, seconds, lr, loss, every loss term; grad_norm, with methods grad_detection,
    grad_<method>, scale_<method>, and what they report (variance_<level>_<method>); map (filled at evaluations).
    """

    def __init__(
        self,
        folder: TrainingFolder,
        name: str,
        total: int,
        from_step: int,
        left: TimeLeft,
        loggers: OpenLoggers | None = None,
        *,
        enabled: bool,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        self._path = folder.metrics
        self._rows = _rows_until(self._path, from_step)
        self._name, self._total, self._from_step = name, total, from_step
        self._console = open_console()
        self._live = sys.stdout.isatty()
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), TextColumn("{task.fields[text]}"),
            console=self._console, disable=not self._live,
        )  # fmt: skip
        self._task = self._progress.add_task(name, total=total, completed=from_step, text="", left="")
        self._loggers, self._left = loggers, left
        self._events = folder.tensorboard
        with naming(self._events):
            self._board = _tensorboard(self._events, from_step)
        self._started = self._printed = time.perf_counter()

    def start(self) -> None:
        """Begin the progress display."""
        if self._enabled:
            self._progress.start()
            if not self._live and self._from_step:
                self._console.print(f"{self._name}: resumed at step {self._from_step} of {self._total}")

    def tick(self, step: int) -> None:
        """Move the progress display to a step of which nothing is recorded."""
        if self._enabled:
            self._left.step()
            self._progress.update(self._task, completed=step)

    def step(
        self,
        step: int,
        epoch: int,
        seconds: float,
        lr: float,
        losses: dict[str, float],
        observed: dict[str, float],
    ) -> None:
        """Record one row: the losses of this step, and what else was observed (gradient norms, scales …)."""
        if not self._enabled:
            return
        self._left.step()
        loss = sum(losses.values())
        row: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "seconds": round(seconds, 2),
            "lr": lr,
            "loss": loss,
            **losses,
            **observed,
        }
        self._rows.append(row)
        figures = {key: value for key, value in row.items() if key not in ("step", "epoch", "seconds")}
        with naming(self._events):
            for key, value in figures.items():
                self._board.add_scalar(key, value, step)
        if self._loggers is not None:
            self._loggers.row(self._name, step, {"epoch": epoch, **figures})
        text = f"loss {loss:.3f}  " + "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in losses.items())
        left = str(self._left)
        self._progress.update(self._task, completed=step, text=text, left=left)
        now = time.perf_counter()
        pause = max(PLAIN_EVERY_S, PLAIN_SHARE * (now - self._started))
        if not self._live and (now - self._printed > pause or step == self._total):
            self._printed = now
            line = f"{self._name}: step {step}/{self._total}"
            line += f", {text}" if step == self._total else f", {left}; {text}"
            self._console.print(line, soft_wrap=True)
            self.write()

    def evaluated(self, step: int, epoch: int, metrics: CocoMetrics) -> None:
        """Record the metrics of an evaluation, and write metrics.csv."""
        if not self._enabled:
            return
        seconds = self._rows[-1]["seconds"] if self._rows else 0.0
        found = {"map": metrics.map, "map50": metrics.map50, "map75": metrics.map75}
        self._rows.append({"step": step, "epoch": epoch, "seconds": seconds, **found})
        if self._loggers is not None:
            self._loggers.row(self._name, step, found)
        with naming(self._events):
            self._board.add_scalar("map", metrics.map, step)
        self._progress.console.print(
            f"{self._name}: step {step}/{self._total}: mAP {metrics.map:.2f}, AP50 {metrics.map50:.2f}",
        )
        self.write()
        self._left.pause()

    def note(self, line: str | None) -> None:
        """Show a line, if there is one."""
        if self._enabled and line is not None:
            self._progress.console.print(f"{self._name}: {line}", markup=False, soft_wrap=True)

    def stop(self, last_line: str | None = None) -> None:
        """End the progress display, show a line if there is one, and write everything."""
        if self._enabled:
            self._progress.stop()
            if last_line is not None:
                self._console.print(last_line, markup=False, soft_wrap=True)
            self.write()
            with naming(self._events):
                self._board.close()

    def write(self) -> None:
        """Write everything that was recorded."""
        if not self._enabled:
            return
        with naming(self._events):
            self._board.flush()
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        order = sorted(columns, key=lambda column: column.startswith(OBSERVED))  # stable: those come last
        text = io.StringIO()
        writer = csv.DictWriter(text, order, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._path, text.getvalue())


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    if step == 0 or not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    return [row for row in rows if int(row["step"]) <= step]


def _tensorboard(folder: Path, from_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import: only where training happens

    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)
