"""The clock of a measurement, in one place, so that tests can have another."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds; never goes back."""

    def wait_until(self, second: float) -> None:
        """Return at that time, or at once when it has passed."""


class HostClock:
    """`time.perf_counter`. It sleeps through long waits and spins for the last 0.2 ms, because a sleep ends late."""

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, second: float) -> None:
        while (left := second - time.perf_counter()) > 0:
            if left > 2e-4:
                time.sleep(left - 2e-4)


HOST_CLOCK = HostClock()
