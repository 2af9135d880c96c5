"""How long a run still takes: an estimate from the steps that were measured, and a list of what cannot be estimated."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass

MEASURED = 1000  # steps that count, the last ones
ENOUGH = 3  # steps before which nothing is said; the first one is not among them


@dataclass(frozen=True)
class Later:
    """What a run does after a training.

    pictures: that its later trainings look at, every pass counted. stages: names of what has no such number, in order.
    """

    pictures: int = 0
    stages: tuple[str, ...] = ()


NOTHING_LATER = Later()


class TimeLeft:
    """Estimates from the median of a training's steps: a machine that is busy for a while does not make it jump.

    Args:
        steps: still to do. batch: pictures of a step. later: of the run. Later trainings count at this one's pace, a
            picture.
    """

    def __init__(self, steps: int, batch: int, later: Later) -> None:
        self._steps, self._batch, self._later = steps, batch, later
        self._seconds: deque[float] = deque(maxlen=MEASURED)
        self._began = self._last = time.perf_counter()
        self._done = 0

    def step(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        if self._done:
            self._seconds.append(now - self._last)
        else:
            self._began = now  # the first one waits for the loader and for compilers
        self._done += 1
        self._last = now

    def pause(self) -> None:
        """What came since the last step, an evaluation, was none."""
        self._last = time.perf_counter()

    def __str__(self) -> str:
        if self._done <= ENOUGH:
            return "time left not known yet"
        median = statistics.median(self._seconds)
        pauses = max(0.0, (self._last - self._began) - statistics.mean(self._seconds) * (self._done - 1))
        each = median + pauses / (self._done - 1)
        here = each * (self._steps - self._done)
        text = f"about {in_words(here)} left"
        if self._later.pictures:
            text += f", {in_words(here + each / self._batch * self._later.pictures)} in all at this pace"
        if self._later.stages:
            text += f", then {', '.join(self._later.stages)}"
        return text


def in_words(seconds: float) -> str:
    """A duration as exact as an estimate is: `40 s`, `7 min`, `3.5 h`, `2.3 days`."""
    if seconds <= 55:
        return f"{5 * math.ceil(seconds / 5)} s"
    if seconds < 5370:
        return f"{max(1, round(seconds / 60))} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
