"""ClearML. What its task does beside recording is off: it reads no arguments, output, frameworks or code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.config.loggers import Clearml
from compress.training.loggers.base import RunFacts, RunLogger, Table


class ClearmlLogger(RunLogger):
    """The constructor raises what ClearML raises where there is no server."""

    def __init__(self, settings: Clearml, facts: RunFacts, identifier: str | None) -> None:
        from clearml import Task

        Task.set_offline(settings.mode == "offline")
        Task.force_store_standalone_script()  # without it the code of a repository, with its changes, is sent
        with _our_signals():
            self._task = Task.init(
                project_name=settings.project,
                task_name=facts.name,
                continue_last_task=False if identifier is None else identifier,
                reuse_last_task_id=False,
                output_uri=False,
                auto_connect_arg_parser=False,
                auto_connect_frameworks=False,
                auto_connect_streams=False,
                auto_resource_monitoring=False,
            )
        self._task.set_initial_iteration(0)  # rows name the step that they are of
        self.identifier = self._task.id
        if identifier is None:
            self._task.set_parameters({**facts.flat(), "run_folder": str(facts.folder.resolve())})

    def row(self, training: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._task.get_logger().report_scalar(key, training, value, iteration=step)

    def table(self, table: Table) -> None:
        logger = self._task.get_logger()
        for key, value in table.figures().items():
            logger.report_single_value(key, value)
        cells = [["" if cell is None else cell for cell in row] for row in table.rows]
        logger.report_table("result", "files", iteration=0, table_plot=[list(table.columns), *cells])

    def upload(self, files: Sequence[Path]) -> None:
        for file in files:
            self._task.upload_artifact(file.name, str(file))

    def close(self, *, finished: bool) -> None:
        if not finished:
            self._task.mark_stopped(force=True, status_message="interrupted")
        self._task.close()


@contextmanager
def _our_signals() -> Iterator[None]:
    """ClearML's task takes over how a process ends; here Ctrl-C stays what it is."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.excepthook
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        sys.excepthook = hook
