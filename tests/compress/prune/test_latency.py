"""The search over measured latencies, on machines whose latency is a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from compress.prune.graph import PruningGraph
from compress.prune.groups import ChannelGroup
from compress.prune.latency import LatencySearch, Timing
from compress.prune.order import Block, blocks
from deploy.core.errors import UserError
from deploy.latency.results import Estimate

WIDTHS = {"stem": 32, "one": 48, "two": 96, "three": 192, "four": 192, "neck": 96, "tower": 96, "tower2": 96}
PIXELS = (4096, 1024, 1024, 256, 64, 64, 340, 340)  # of the maps that a layer makes
OVERHEAD_MS = 2.0


class Chain:
    """A detector of convolutions in a row; what is left of it is a dictionary of widths."""

    def __init__(self, widths: Mapping[str, int] = WIDTHS) -> None:
        self.widths = dict(widths)
        groups = tuple(ChannelGroup(name, width, 1, ()) for name, width in widths.items())
        self.graph = PruningGraph(groups, None)  # type: ignore[arg-type]  # nothing is traced
        draw = torch.Generator().manual_seed(0)
        self.scores = {name: torch.rand(width, generator=draw) for name, width in widths.items()}

    def order_of(self, multiple: int) -> list[Block]:
        return blocks(self.graph, self.scores, round_to=multiple)

    def smaller(self, leave: Sequence[Block]) -> Any:
        return self.widths | {block.group: block.width for block in leave}

    def gflops(self, leave: Sequence[Block]) -> float:
        return work(self.smaller(leave))


class Machine:
    """A stopwatch: milliseconds by a formula, times noise of this share. What was asked is in `seen`."""

    def __init__(self, ms: Callable[[Mapping[str, int]], float], whole: Mapping[str, int], noise: float = 0.0) -> None:
        self.ms, self.whole_ms, self.noise = ms, ms(whole), noise
        self.seen: list[dict[str, int]] = []
        self._rng = np.random.default_rng(0)

    def timing(self, detector: Any) -> Timing:
        self.seen.append(dict(detector))
        value = self.ms(detector) / self.whole_ms * (1 + self.noise * float(self._rng.normal()))
        half = 2 * self.noise * value
        return Timing(Estimate(value=value, low=value - half, high=value + half), Estimate(value=1.0))


def work(widths: Mapping[str, int], at_a_time: int = 1) -> float:
    """GFLOPs, with channels that are computed in groups of so many."""
    sides = [3, *(math.ceil(width / at_a_time) * at_a_time for width in widths.values())]
    layers = zip(PIXELS, sides, sides[1:], strict=False)
    return sum(2 * 9 * pixels * before * after for pixels, before, after in layers) / 1e9


def speed(at_a_time: int) -> Callable[[Mapping[str, int]], float]:
    return lambda widths: OVERHEAD_MS + 40 * work(widths, at_a_time)


def search(chain: Chain, machine: Machine) -> tuple[LatencySearch, list[str]]:
    said: list[str] = []
    return LatencySearch(machine, said.append), said


@pytest.mark.parametrize("at_a_time", [8, 16])
@pytest.mark.parametrize("share", [0.92, 0.8, 0.65, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_ends_near_what_was_asked(at_a_time: int, share: float, noise: float) -> None:
    chain = Chain()
    machine = Machine(speed(at_a_time), chain.widths, noise)
    asked = share * machine.whole_ms
    leave = search(chain, machine)[0].meet(asked, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    found = machine.ms(chain.smaller(leave))
    assert 0.97 * asked <= found <= asked * (1.001 if not noise else 1.02)
    assert len(machine.seen) <= 12  # an export each


@pytest.mark.parametrize("at_a_time", [8, 16])
def test_no_detector_with_a_block_more_is_as_fast(at_a_time: int) -> None:
    chain = Chain()
    machine = Machine(speed(at_a_time), chain.widths)
    asked = 0.7 * machine.whole_ms
    found, _ = search(chain, machine)
    leave = list(found.meet(asked, chain, chain.order_of, round_to=8))  # type: ignore[arg-type]
    assert found.multiple == at_a_time
    order = chain.order_of(at_a_time)
    fewest = next(n for n in range(len(order)) if machine.ms(chain.smaller(order[:n])) <= asked * (1 + 1e-9))
    assert len(leave) == fewest and [block.group for block in leave[:-1]] == [b.group for b in order[: fewest - 1]]
    assert chain.gflops(leave) >= chain.gflops(order[:fewest])  # the last block may be a smaller one
    assert chain.smaller(order[: fewest - 1]) in machine.seen  # its neighbour was looked at


def test_channels_that_cost_nothing_stay() -> None:
    """Where 16 channels are computed at a time, more are left at the same latency than in steps of 8."""
    chain = Chain()
    machine = Machine(speed(16), chain.widths, noise=0.004)
    asked = 0.7 * machine.whole_ms
    found, said = search(chain, machine)
    leave = found.meet(asked, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    left = chain.smaller(leave)
    assert all(left[name] in (width, left[name] // 16 * 16) for name, width in WIDTHS.items())
    assert any("multiples of 16" in line for line in said)
    by_eight = chain.order_of(8)
    fewest = next(n for n in range(len(by_eight)) if machine.ms(chain.smaller(by_eight[:n])) <= asked)
    assert chain.gflops(leave) > 1.03 * chain.gflops(by_eight[:fewest])


def test_coarse_steps_are_told() -> None:
    chain = Chain({"stem": 32})
    machine = Machine(lambda widths: 2 + widths["stem"] / 8, chain.widths)
    found, said = search(chain, machine)
    leave = found.meet(4.9, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    assert machine.ms(chain.smaller(leave)) == 4
    assert found.note is not None and found.note.startswith("4 ms are 18% less than asked for: channels leave by 8")
    assert "takes 5 ms" in found.note
    assert f"latency: {found.note}" in said


def test_what_only_finer_steps_reach_is_found() -> None:
    """Nothing is lost by steps of 16, but their fewest channels are too slow."""
    chain = Chain({name: 32 for name in WIDTHS})
    machine = Machine(speed(16), chain.widths)
    floor = machine.ms(dict.fromkeys(WIDTHS, 16))
    machine.ms = lambda widths: speed(16)(widths) - 1e-3 * sum(width == 8 for width in widths.values())
    found, _ = search(chain, machine)
    leave = found.meet(floor - 2e-3, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    assert machine.ms(chain.smaller(leave)) <= floor - 2e-3 + 1e-9
    assert found.multiple == 8


def test_what_cannot_be_met_is_one_line() -> None:
    chain = Chain()
    machine = Machine(speed(8), chain.widths)
    least = machine.ms(dict.fromkeys(WIDTHS, 8))
    with pytest.raises(UserError, match=r"^prune\.latency_ms: 1\.5 ms are asked for, and .* remain") as too_fast:
        found = search(chain, machine)[0]
        found.meet(1.5, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    assert [trial.multiple for trial in found.trials] == [1, 8], "the whole one and the narrowest, no other"
    assert f"{least:.4g} ms remain with the fewest channels, 8 a layer" in str(too_fast.value)
    with pytest.raises(UserError, match=r"^prune\.latency_ms: 50 ms .*: nothing needs to be cut; ask for less$"):
        search(chain, machine)[0].meet(50, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    assert len(machine.seen) <= 12


def test_rough_cuts_follow_the_line() -> None:
    """Early rounds of an iterative cut measure the steps once, and none of the results."""
    chain = Chain()
    machine = Machine(speed(8), chain.widths)
    found, _ = search(chain, machine)
    for share in (0.9, 0.8, 0.7):
        asked = share * machine.whole_ms
        leave = found.meet(asked, chain, chain.order_of, round_to=8, rough=True)  # type: ignore[arg-type]
        assert abs(machine.ms(chain.smaller(leave)) / asked - 1) < 0.03
    assert len(machine.seen) == 3


def test_timings_that_make_no_sense_end() -> None:
    """Latency that has nothing to do with widths: whatever is found, few files are measured."""
    chain = Chain()
    rng = np.random.default_rng(1)
    machine = Machine(lambda widths: 10.0, chain.widths)
    machine.ms = lambda widths: 10.0 if widths == WIDTHS else float(rng.uniform(4, 10))
    leave = search(chain, machine)[0].meet(7.0, chain, chain.order_of, round_to=8)  # type: ignore[arg-type]
    assert leave and len(machine.seen) <= 24
