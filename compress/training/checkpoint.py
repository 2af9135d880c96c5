"""Checkpoints of one training: `last.ckpt` has everything that resuming needs, `best-<step>.ckpt` the weights of the
best evaluation.

Resuming is exact: `last.ckpt` holds model, methods, moving average, optimizer, gradient scaler, position and random
state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from compress.manifest import TrainingFolder
from compress.training.distributed import gather, on_first_process
from deploy.core.errors import UserError
from deploy.core.files import atomic_path
from deploy.core.storage import push
from deploy.validate.coco import CocoMetrics


@dataclass
class State:
    """Position and history of a training; what `last.ckpt` holds besides the modules."""

    step: int = 0  # finished optimizer steps
    seconds: float = 0.0
    evaluated_step: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # metrics of the weights in best-<best_step>.ckpt
    best_step: int = 0


class Checkpoints:
    """Writes and reads the checkpoints of one training; process 0 writes.

    Args:
        modules: whose weights are kept, by name.
        identity: hash of everything that shapes the result; a checkpoint of another identity is not resumed.
        total: length of the training in optimizer steps.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        fabric: Fabric,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        identity: str,
        total: int,
    ) -> None:
        self._folder = folder
        self._fabric = fabric
        self._modules = dict(modules)
        self._optimizer = optimizer
        self._identity = identity
        self._total = total

    def save(self, state: State) -> None:
        """Write `last.ckpt`, then remove the weights of evaluations that are not the best any more."""

        random = gather(self._fabric, torch.get_rng_state())

        def write() -> None:
            content = {
                "modules": {name: module.state_dict() for name, module in self._modules.items()},
                "optimizer": self._optimizer.state_dict(),
                "precision": self._fabric._precision.state_dict(),  # the gradient scaler of fp16
                "random": random,
                "identity": self._identity,
                "finished": state.step >= self._total,
                "state": vars(state),
            }
            with atomic_path(self._folder.last) as temporary:
                torch.save(content, temporary)
            for path in self._folder.bests():  # only now: until here a kill goes back to the older one
                if path != self._folder.best(state.best_step):
                    path.unlink()
            push(self._folder.path, must=False)

        on_first_process(self._fabric, write)

    def restore(self) -> State:
        """Load `last.ckpt` into modules, optimizer and random state. Returns a fresh state where there is no such file,
        or one of an earlier, finished training with other settings.

        Raises UserError when it is damaged, or of an unfinished training with other settings.
        """
        path = self._folder.last
        if not path.is_file():
            return State()
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            identity, finished, state = content["identity"], content["finished"], State(**content["state"])
        except Exception as error:  # a damaged archive raises whatever its reader stumbles over
            raise UserError(f"{path}: damaged ({type(error).__name__}); remove it to start again") from error
        if identity != self._identity:
            if finished:
                return State()
            raise UserError(
                f"{path}: belongs to an unfinished run with other settings or data; remove its folder or give the "
                "recipe another name"
            )
        for name, module in self._modules.items():
            module.load_state_dict(content["modules"][name])
        self._optimizer.load_state_dict(content["optimizer"])
        self._fabric._precision.load_state_dict(content["precision"])
        random = content["random"]  # of each process; in checkpoints of version 0.1 of the first one alone
        torch.set_rng_state(random[self._fabric.global_rank] if isinstance(random, list) else random)
        return state

    def evaluated(self, state: State, metrics: CocoMetrics, weights: nn.Module, *, keep_best: bool) -> None:
        """Record an evaluation of `weights` in `state`, and write them when they are the best so far.

        keep_best: False takes every evaluation for better than the ones before it.
        """
        state.evaluated_step = state.step
        if not keep_best or not state.best or metrics.map > state.best["map"]:
            state.best, state.best_step = metrics.to_dict(), state.step

            def write() -> None:
                with atomic_path(self._folder.best(state.best_step)) as temporary:
                    torch.save(weights.state_dict(), temporary)

            on_first_process(self._fabric, write)

    def load_best(self, state: State) -> dict[str, Tensor]:
        """Read the weights of the best evaluation. Raises UserError when the file is gone."""
        path = self._folder.best(state.best_step)
        if not path.is_file():
            raise UserError(f"{path}: the best weights are gone; remove {self._folder.path} to train again")
        weights: dict[str, Tensor] = torch.load(path, map_location=self._fabric.device, weights_only=True)
        return weights
