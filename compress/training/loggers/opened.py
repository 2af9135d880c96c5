"""The loggers of a run while it goes on. They cost the training nothing but warnings: each works in a thread of its
own, and one that fails is given up with one line.

    with logging_to(recipe.loggers, facts, folder.loggers, "3f…", resume=False) as loggers:
        loggers.row("student", 10, {"loss": 2.5})
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.config.loggers import Loggers
from compress.training.loggers.base import RunFacts, RunLogger, Table
from compress.training.loggers.to_clearml import ClearmlLogger
from compress.training.loggers.to_mlflow import MlflowLogger
from compress.training.loggers.to_wandb import WandbLogger
from deploy.core.errors import UserError, one_line
from deploy.core.files import write_json

LOGGERS: Mapping[str, Callable[[Any, RunFacts, str | None], RunLogger]] = {
    "mlflow": MlflowLogger,
    "wandb": WandbLogger,
    "clearml": ClearmlLogger,
}
"""Key of the recipe's section, name of package and extra → what opens it."""
LAST_WAIT_S = 120.0  # for what is still to be sent at the end of a run; of one that is interrupted:
SHORT_WAIT_S = 5.0


class OpenLoggers:
    """Those of a run, by name; none in all processes but the first."""

    def __init__(self, loggers: Mapping[str, RunLogger], uploads: Sequence[str], say: Callable[[str], None]) -> None:
        self._lines = {name: _Line(name, logger, say) for name, logger in loggers.items()}
        self._uploads = uploads

    def row(self, training: str, step: int, values: Mapping[str, float]) -> None:
        """Hand on figures of one training at an optimizer step."""
        for line in self._lines.values():
            line.put(lambda logger: logger.row(training, step, values))

    def table(self, table: Table, files: Sequence[Path]) -> None:
        """Hand on the final figures, and the files where that was asked for."""
        for name, line in self._lines.items():
            line.put(lambda logger: logger.table(table))
            if name in self._uploads:
                line.put(lambda logger: logger.upload(files))

    def close(self, *, finished: bool) -> None:
        """Wait for what is still to be sent; for one that hangs not for ever."""
        for line in self._lines.values():
            line.put(lambda logger: logger.close(finished=finished))
            line.put(None)
        for line in self._lines.values():
            line.wait(LAST_WAIT_S if finished else SHORT_WAIT_S)


def need_packages(settings: Loggers) -> None:
    """Raise UserError where the package of a logger is not installed."""
    for name in _wanted(settings):
        if find_spec(name) is None:
            raise UserError(f"loggers.{name}: {name} is not installed; pip install 'compress-detectors[{name}]'")


@contextmanager
def logging_to(
    settings: Loggers,
    facts: RunFacts,
    record: Path,
    identity: str,
    *,
    resume: bool,
    say: Callable[[str], None],
) -> Iterator[OpenLoggers]:
    """The loggers of a run, open. For one process of several.

    Args:
        record: file that keeps their identifiers. With `resume`, or the same `identity` (of the settings), the run goes
            on in the same runs of the loggers; otherwise new ones begin.
        say: prints a line; called from other threads.

    Raises UserError for one that cannot be opened.
    """
    wanted = _wanted(settings)
    before = _recorded(record)
    known = before.get("runs", {}) if resume or before.get("identity") == identity else {}
    opened: dict[str, RunLogger] = {}
    for name, section in wanted.items():
        try:
            opened[name] = LOGGERS[name](section, facts, known.get(name))
        except Exception as error:  # each library has its own
            reason = one_line(error)[:200] or type(error).__name__
            raise UserError(f"loggers.{name}: {reason}; to go on without it: --set loggers.{name}=null") from error
    if opened:
        write_json(record, {"identity": identity, "runs": {name: one.identifier for name, one in opened.items()}})
    loggers = OpenLoggers(opened, [name for name, section in wanted.items() if section.upload], say)
    finished = False
    try:
        yield loggers
        finished = True
    finally:
        loggers.close(finished=finished)


# --- details --------------------------------------------------------------------------------------------


class _Line:
    """What is handed to one logger, in order, by a thread of its own."""

    def __init__(self, name: str, logger: RunLogger, say: Callable[[str], None]) -> None:
        self._name, self._logger, self._say = name, logger, say
        self._work: queue.SimpleQueue[Callable[[RunLogger], None] | None] = queue.SimpleQueue()
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[RunLogger], None] | None) -> None:
        if not self._given_up:
            self._work.put(work)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"warning: loggers.{self._name}: does not answer; what was not sent yet is lost")

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work(self._logger)
            except Exception as error:  # whatever a library raises for a server that is gone
                self._given_up = True
                reason = one_line(error)[:200] or type(error).__name__
                self._say(f"warning: loggers.{self._name}: {reason}; the run goes on without it")
                return


def _wanted(settings: Loggers) -> dict[str, Any]:
    sections = {name: getattr(settings, name) for name in LOGGERS}
    return {name: section for name, section in sections.items() if section is not None}


def _recorded(record: Path) -> dict[str, Any]:
    """The identifiers of an earlier process; a damaged record counts as none."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("runs"), dict) else {}
