"""MLflow, by its client: nothing of the process that MLflow knows of otherwise is touched."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from compress.config.loggers import Mlflow
from compress.training.loggers.base import RunFacts, RunLogger, Table

LONGEST_VALUE = 6000  # characters of a parameter; servers refuse more
AT_ONCE = 100  # parameters, or metrics, in one call; servers refuse more
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
Item = TypeVar("Item")


class MlflowLogger(RunLogger):
    """The constructor raises what MLflow raises where there is no server."""

    def __init__(self, settings: Mlflow, facts: RunFacts, identifier: str | None) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        with _soon():
            self._client = MlflowClient(settings.tracking_uri)
            if identifier is not None:
                self.identifier = identifier
                self._client.update_run(identifier, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(settings.experiment)
            place = self._client.create_experiment(settings.experiment) if found is None else found.experiment_id
            tags = {"run_folder": str(facts.folder.resolve())}
            self.identifier = self._client.create_run(place, run_name=facts.name, tags=tags).info.run_id
            for part in _parts([Param(key, value[:LONGEST_VALUE]) for key, value in facts.flat().items()]):
                self._client.log_batch(self.identifier, params=part)

    def row(self, training: str, step: int, values: Mapping[str, float]) -> None:
        self._log({f"{training}/{key}": value for key, value in values.items()}, step)

    def table(self, table: Table) -> None:
        self._log({f"result/{key}": value for key, value in table.figures().items()}, 0)

    def upload(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self.identifier, str(file))

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.identifier, "FINISHED" if finished else "KILLED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-. :/]", "_", key), value, now, step) for key, value in values.items()]
        for part in _parts(metrics):
            self._client.log_batch(self.identifier, metrics=part)


@contextmanager
def _soon() -> Iterator[None]:
    """A server that is not there is noticed in seconds, before anything is trained; later MLflow tries for minutes, as
    ever, while the training goes on."""
    before = os.environ.get(RETRIES)
    os.environ[RETRIES] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[RETRIES]


def _parts(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]
