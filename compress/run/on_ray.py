"""A training whose processes Ray Train starts on the nodes of a cluster: the same entry point, another launcher."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.training.distributed import LAUNCHER
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import import_extra
from deploy.core.on_ray import Cluster, connected, place, room, take_place

RESTARTS = 3
"""So often are all processes started again where one fails, of a run that may resume."""


def train_on_ray(cluster: Cluster, work: Callable[[], Any], processes: int, runs: Path, *, restarts: bool) -> None:
    """Call `work` in so many processes of a cluster, which train together.

    Args:
        cluster: its `num_cpus` and `num_gpus` are for a process.
        work: picklable; a function of `compress.run.pipeline` with its recipe, whose files all nodes see under the same
            names, from the same working directory.
        runs: the folder of run folders, for what Ray Train records.
        restarts: start the processes again where one of them, or its node, fails; `work` resumes then.

    Raises UserError: Ray is not installed or not reached, or what `work` raised.
    """
    train = import_extra("ray.train", "ray", "ray[train]")
    torch = import_extra("ray.train.torch", "ray", "ray[train]")
    with connected(cluster, show=True) as ray:
        gpus, _ = room(ray, cluster, processes, all_at_once=True)
        trainer = torch.TorchTrainer(
            _process,
            train_loop_config={"work": ray.cloudpickle.dumps(work), "there": place()},
            scaling_config=train.ScalingConfig(
                num_workers=processes,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cluster.num_cpus, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=train.RunConfig(
                storage_path=str(runs.absolute() / ".ray"),
                failure_config=train.FailureConfig(max_failures=RESTARTS if restarts else 0),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # its own kind of error around whatever happened in a process
            mistakes = [failure for failure in _failures(error) if isinstance(failure, UserError)]
            if not mistakes:
                raise
            raise UserError(first_line(mistakes[0])) from None


# --- details --------------------------------------------------------------------------------------------


def _process(config: dict[str, Any]) -> None:
    """In each process: what torchrun would have set, then the work."""
    try:
        take_place(**config["there"])
    except OSError as error:
        raise UserError(
            f"ray: node {os.uname().nodename} cannot enter {config['there']['folder']}, this command's working "
            f"directory ({error.strerror}); start it from a folder that all nodes share"
        ) from None
    os.environ |= {"TORCHELASTIC_RUN_ID": "ray", LAUNCHER: "Ray Train"}
    pickle.loads(config["work"])()


def _failures(error: BaseException) -> list[BaseException]:
    """What happened in the processes, of an error of Ray Train."""
    found: list[BaseException] = []
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            found += [cause, *filter(None, [getattr(cause, "cause", None)])]
            cause = cause.__cause__
    return found
