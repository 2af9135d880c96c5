"""The pace of the hosts of a training: each step waits for the slowest, so that one is named."""

from __future__ import annotations

import socket
import time
from statistics import median

from lightning.fabric import Fabric

from compress.training.distributed import gather

WINDOW = 50
"""Steps that are looked at together."""
SLOW = 1.5
"""So many times as long as the others' median is slow."""
SHARE = 0.1
"""And so much of a step more than that: what is less is not worth a word."""


class Pace:
    """Watches how long each process takes for what it does alone in a step: waiting for its images, and the forward
    pass. The backward pass is not in it, because there all wait for each other."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._sums, self._steps, self._began = [0.0, 0.0], 0, time.perf_counter()
        self._told: str | None = None
        self._hosts = gather(fabric, socket.gethostname())

    def step(self, waiting: float, forward: float) -> str | None:
        """Take in the seconds of a step. Called on every process in every step; every `WINDOW` steps they compare.

        Returns a line about a host that is slow, once in a row; the same on all processes.
        """
        if self._fabric.world_size == 1:
            return None
        self._sums[0] += waiting
        self._sums[1] += forward
        self._steps += 1
        if self._steps < WINDOW:
            return None
        took, now = [total / self._steps for total in self._sums], time.perf_counter()
        gathered = gather(self._fabric, (took, (now - self._began) / self._steps))
        self._sums, self._steps, self._began = [0.0, 0.0], 0, now
        least = SHARE * median(step for _, step in gathered)
        name, line = slowest([seconds for seconds, _ in gathered], self._hosts, least) or (None, None)
        if name == self._told:
            return None
        self._told = name
        return line


def slowest(seconds: list[list[float]], hosts: list[str], least: float = 0.0) -> tuple[str, str] | None:
    """The process that is slower than the others, and a line about it; None: none is.

    Args:
        seconds: of each process a step: waiting for images, and the forward pass.
        hosts: their names. least: seconds that it must be slower.
    """
    totals = [sum(both) for both in seconds]
    worst = max(range(len(totals)), key=totals.__getitem__)
    others = median(totals[:worst] + totals[worst + 1 :])
    if totals[worst] <= max(SLOW * others, others + least):
        return None
    waiting, forward = seconds[worst]
    reason = "waiting for its images" if waiting > forward else "in the forward pass"
    name = f"{hosts[worst]} (process {worst})"
    return name, (
        f"slow: {name} takes {totals[worst]:.3g} s a step before the others can go on, they {others:.3g} s; "
        f"{max(waiting, forward) / totals[worst]:.0%} of it {reason}"
    )
