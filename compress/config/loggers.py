"""Settings of loggers: where the figures of a run go besides its own folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compress.config.base import Settings

Name = Annotated[str, Field(min_length=1)]


class Mlflow(Settings):
    """MLflow (extra `mlflow`). Names and passwords of a server are read where MLflow itself reads them."""

    tracking_uri: Name | None = None
    """A server, such as http://localhost:5000, or sqlite:///mlflow.db; null: MLFLOW_TRACKING_URI, or MLflow's
    default."""
    experiment: Name = "compress"
    """The experiment; created where it is not there."""
    upload: bool = False
    """Also store recipe, checkpoint, exported files and report as artifacts."""


class Wandb(Settings):
    """Weights & Biases (extra `wandb`). The key is read where wandb itself reads it."""

    project: Name = "compress"
    """The project."""
    entity: Name | None = None
    """User or team; null: the default of the key."""
    mode: Literal["online", "offline"] = "online"
    """offline: write files below the run folder, which `wandb sync` sends later."""
    upload: bool = False
    """Also store recipe, checkpoint, exported files and report as an artifact."""


class Clearml(Settings):
    """ClearML (extra `clearml`). Server and keys are read where ClearML itself reads them."""

    project: Name = "compress"
    """The project."""
    mode: Literal["online", "offline"] = "online"
    """offline: write a session into ClearML's cache, which `Task.import_offline_session` sends later."""
    upload: bool = False
    """Also store recipe, checkpoint, exported files and report as artifacts."""


class Loggers(Settings):
    """Where figures go besides metrics.csv, TensorBoard's files and the report. None of it shapes the result."""

    mlflow: Mlflow | None = None
    """MLflow; {} for the defaults."""
    wandb: Wandb | None = None
    """Weights & Biases; {} for the defaults."""
    clearml: Clearml | None = None
    """ClearML; {} for the defaults."""
