"""Blocks of training steps, in turn: what a step costs beside another one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.lib.measure import MAX_FOREIGN, ForeignCpu, quartiles
from benchmarks.lib.results import Row


@dataclass(frozen=True)
class Block:
    """Milliseconds a step. foreign: share of the CPUs that other processes used."""

    cpu: float
    wall: float
    foreign: float


def in_turn(steps: Mapping[str, Callable[[], None]], repeats: int, count: int) -> dict[str, list[Block]]:
    """Blocks of `count` steps of each case, in turn; the first round, which allocates, does not count."""
    found: dict[str, list[Block]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            with ForeignCpu() as other:
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(count):
                    step()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                found[name].append(Block(1e3 * cpu / count, 1e3 * wall / count, other.share))
    return found


def rows(found: Mapping[str, list[Block]], base: str, bars: Mapping[str, str]) -> list[Row]:
    """Times of a step, and ratios to that of `base` in the same round, with the bars of cases."""
    made = []
    for name, blocks in found.items():
        foreign = statistics.median(block.foreign for block in blocks)
        notes = f"busy: others used {foreign:.0%} of the CPUs" if foreign > MAX_FOREIGN else ""
        for metric, times in (("CPU time", [b.cpu for b in blocks]), ("wall time", [b.wall for b in blocks])):
            low, median, high = quartiles(times)
            made.append(Row(name, metric, median, "ms", low, high, "quartiles", len(times), notes=notes))
        if name == base:
            continue
        for kind, key in (("CPU time", "cpu"), ("wall time", "wall")):
            ratios = [getattr(b, key) / getattr(p, key) for b, p in zip(blocks, found[base], strict=True)]
            low, median, high = quartiles(ratios)
            metric, bar = f"{kind} of {base}", bars.get(name, "")
            made.append(Row(name, metric, median, "×", low, high, "quartiles", len(ratios), bar=bar, notes=notes))
    return made
