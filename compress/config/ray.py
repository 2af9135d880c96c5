"""Settings of a Ray cluster, which does what many processes can share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from compress.config.base import Positive, Settings, Weight, broken_rule
from deploy.core.on_ray import Cluster


class Ray(Settings):
    """Let actors of a Ray cluster (extra `ray`) label images and validate files. None of it shapes the result. All
    nodes see the files under the same names. Training over nodes is a matter of the command: docs/scaling.md."""

    address: Annotated[str, Field(min_length=1)] | None = None
    """`auto`, the cluster of this machine, or host:port of a head; null: that of RAY_ADDRESS, or a Ray that is started
    here."""
    actors: Positive | None = None
    """Most workers at once; null: as many as the cluster has room for."""
    num_cpus: Weight = 1.0
    """Processors for each."""
    num_gpus: Weight | None = None
    """GPUs for each, which may be a part of one; null: one where the cluster has GPUs, else none."""

    def cluster(self) -> Cluster:
        """The same for those who use it."""
        return Cluster(**self.model_dump())

    @model_validator(mode="after")
    def _rules(self) -> Ray:
        if self.num_cpus == 0 and not self.num_gpus:
            raise broken_rule("num_cpus", "a worker needs a share of a processor or of a GPU; set one of them above 0")
        return self
