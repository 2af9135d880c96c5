"""Processes that another program has started: torchrun, Ray Train, SLURM."""

from __future__ import annotations

import pytest

from compress.config.train import Train
from compress.training.distributed import LAUNCHER, Launched, launch, launched
from deploy.core.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "train"}
CASES = {
    "nothing": ({}, None),
    "torchrun": (TORCHRUN, Launched("torchrun", 8, 2)),
    "Ray Train": (TORCHRUN | {LAUNCHER: "Ray Train"}, Launched("Ray Train", 8, 2)),
    "srun": (SRUN, Launched("srun", 8, 2)),
    "srun on a node": (SRUN | {"SLURM_NNODES": "1"}, Launched("srun", 8, 1)),
    "a batch script of one task": (SRUN | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, None),
    "a shell of an allocation": (SRUN | {"SLURM_JOB_NAME": "interactive"}, None),
}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*TORCHRUN, *SRUN, LAUNCHER}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", CASES)
def test_who_started_this_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, wanted = CASES[name]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert launched() == wanted


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (SRUN | {"SLURM_NNODES": "3"}, "srun: 8 processes on 3 nodes; start as many on each"),
        (SRUN, "train.devices is 1, and srun started 8 processes; add --devices 8"),
        (TORCHRUN, "train.devices is 1, and torchrun started 8 processes; add --devices 8"),
    ],
)
def test_numbers_that_do_not_fit(environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError) as error:
        launch(Train(epochs=1, batch_size=8))
    assert str(error.value) == line
