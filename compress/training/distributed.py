"""Training on one process or several: starting them, sums over them, and work that one of them does for all."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
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
LAUNCHER = "COMPRESS_LAUNCHER"
"""Name for messages of a launcher that sets torchrun's variables."""
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
    there = launched()
    if there is not None and there.processes != train.devices:
        raise UserError(
            f"train.devices is {train.devices}, and {there.launcher} started {there.processes} processes; "
            f"add --devices {there.processes}"
        )
    nodes = 1 if there is None else there.nodes
    several = DDPStrategy(timeout=LONGEST_WAIT, find_unused_parameters=unused_parameters)
    try:
        fabric = Fabric(
            accelerator=train.accelerator,
            devices=train.devices // nodes,
            num_nodes=nodes,
            precision=PRECISIONS[train.precision],
            strategy="auto" if train.devices == 1 else several,
            plugins=LightningEnvironment() if there is None and _is_slurm() else None,
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


class Launched(NamedTuple):
    """Processes of a training that something else has started, as many on each of its nodes."""

    launcher: str
    processes: int
    nodes: int


def launched() -> Launched | None:
    """What torchrun, Ray Train or SLURM has started, this process among it; None: nothing has.

    Raises UserError where the nodes have different numbers of processes.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        processes, here = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        found = Launched(env.get(LAUNCHER, "torchrun"), processes, processes // here)
    elif _is_slurm() and env["SLURM_NTASKS"] != "1":
        found = Launched("srun", int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1")))
        here = found.processes // found.nodes
    else:
        return None
    if here * found.nodes != found.processes:
        raise UserError(f"{found.launcher}: {found.processes} processes on {found.nodes} nodes; start as many on each")
    return found


def need_common_folder(fabric: Fabric, folder: Path) -> None:
    """Find out before long work whether all nodes see `folder`, which process 0 has made.

    Raises UserError on all processes, naming the nodes that do not.
    """
    if fabric.world_size == 1:
        return
    name = fabric.broadcast(f".seen-by-all-{os.getpid()}")
    token = folder / name
    on_first_process(fabric, token.touch)
    found = gather(fabric, (socket.gethostname(), token.exists()))
    on_first_process(fabric, token.unlink)
    first, blind = found[0][0], sorted({host for host, sees in found if not sees})
    if blind:
        raise UserError(
            f"{folder}: {', '.join(blind)} cannot see this folder of {first}; put runs on a file system that all nodes "
            "share"
        )


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


def gather(fabric: Fabric, value: Result) -> list[Result]:
    """The value of every process, in the order of their ranks. Every process calls it."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(values, value)
    return values


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


# --- details --------------------------------------------------------------------------------------------


def _is_slurm() -> bool:
    """Whether Fabric would take this process for one that srun has started. A batch script with one task may start its
    processes itself."""
    return SLURMEnvironment.detect()
