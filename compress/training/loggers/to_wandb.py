"""Weights & Biases. Each training has its own steps, so that charts of several begin at 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.config.loggers import Wandb
from compress.training.loggers.base import RunFacts, RunLogger, Table


class WandbLogger(RunLogger):
    """The constructor raises what wandb raises where there is no key or server."""

    def __init__(self, settings: Wandb, facts: RunFacts, identifier: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            dir=str(facts.folder),
            name=facts.name,
            id=identifier,
            resume=None if identifier is None else "allow",
            config=None if identifier is not None else {**facts.settings, "run_folder": str(facts.folder.resolve())},
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        self.identifier = self._run.id
        self._known: set[str] = set()

    def row(self, training: str, step: int, values: Mapping[str, float]) -> None:
        if training not in self._known:
            self._known.add(training)
            self._run.define_metric(f"{training}/step", hidden=True)
            self._run.define_metric(f"{training}/*", step_metric=f"{training}/step")
        self._run.log({f"{training}/step": step, **{f"{training}/{key}": value for key, value in values.items()}})

    def table(self, table: Table) -> None:
        import wandb

        self._run.summary.update({f"result/{key}": value for key, value in table.figures().items()})
        self._run.log({"result": wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])})

    def upload(self, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"run-{self.identifier}", type="run")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
