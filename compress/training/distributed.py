"""Training on one process or several: starting them, sums over them, and work that one of them does for all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from compress.config.train import Train
from compress.detectors.base import Reduce
from deploy.core.errors import UserError, first_line
from kernels.common.backend import chosen, set_backend

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}
"""train.precision → Fabric's name for it."""
LONGEST_WAIT = timedelta(hours=24)
"""How long processes wait for each other before they give up: process 0 alone measures what a cut costs, which may take
hours, where torch's own limit is 10 or 30 minutes. So one that hangs, rather than ends, is noticed as late."""
Result = TypeVar("Result")


def launch(train: Train, *, unused_parameters: bool = False) -> Fabric:
    """Start the processes of a training and choose what computes its kernels.

    unused_parameters: some parameters get no gradient in some steps; only several processes must know it.

    Raises UserError for a device, precision or kernel backend that is not available here.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # its banner would mix with our lines
    started = int(os.environ.get("WORLD_SIZE", train.devices))
    if started != train.devices and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            f"train.devices is {train.devices}, and torchrun started {started} processes; add --devices {started}"
        )
    several = DDPStrategy(timeout=LONGEST_WAIT, find_unused_parameters=unused_parameters)
    try:
        fabric = Fabric(
            accelerator=train.accelerator,
            devices=train.devices,
            precision=PRECISIONS[train.precision],
            strategy="auto" if train.devices == 1 else several,
        )
    except Exception as error:
        raise UserError(
            f"train.accelerator {train.accelerator}, train.devices {train.devices}: not available here "
            f"({first_line(error)})"
        ) from error
    if train.precision == "fp16" and fabric.device.type == "cpu":
        raise UserError("train.precision fp16 needs a GPU and there is none here; use bf16 or 32")
    try:
        set_backend(train.kernels)
        chosen(torch.empty(0, device=fabric.device), has_cuda=True)  # `cuda` is compiled now, or refused
    except ValueError as error:
        raise UserError(f"train.kernels {train.kernels}: {error}") from None
    fabric.launch()
    return fabric


def is_first_process() -> bool:
    """Whether this is process 0 of those that `launch` started, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def on_first_process(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """Run `work` on process 0 while the others wait, and return what it returned on all of them. What goes wrong is
    raised on all of them, so that none hangs."""
    message = result = None
    if fabric.is_global_zero:
        try:
            result = work()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'file'}: {error.strerror or error}"
    message, result = fabric.broadcast((message, result))
    if message is not None:
        raise UserError(message)
    return cast(Result, result)


def on_every_process(fabric: Fabric, work: Callable[[], Any]) -> None:
    """Run `work` on every process; what goes wrong on one is raised on all of them, so that none waits for it."""
    message = None
    try:
        work()
    except UserError as error:
        message = str(error)
    messages = [fabric.broadcast(message, src=rank) for rank in range(fabric.world_size)]
    first = next((text for text in messages if text is not None), None)
    if first is not None:
        raise UserError(first)


def sum_over_processes(fabric: Fabric) -> Reduce | None:
    """A function that sums a tensor over the processes; None where there is one process."""
    if fabric.world_size == 1:
        return None

    def reduce(value: Tensor) -> Tensor:
        total = fabric.all_reduce(value, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    return reduce


def mean_over_processes(values: dict[str, Tensor], reduce: Reduce | None, world_size: int) -> dict[str, float]:
    """Means of scalars over the processes."""
    stacked = torch.stack(list(values.values()))
    if reduce is not None:
        stacked = reduce(stacked) / world_size
    return dict(zip(values, stacked.tolist(), strict=True))


def share_buffers(module: nn.Module, fabric: Fabric) -> None:
    """Give every process the buffers of process 0: each has seen its own share of the images, so that BatchNorm's
    statistics differ."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
