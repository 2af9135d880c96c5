"""The latency budget: of the detectors of an order, the one that keeps most while its exported file is fast enough.

    search = LatencySearch(stopwatch)
    leave = search.meet(5.0, Cuts(detector, graph, size=(128, 128)), order_of, round_to=8)

A latency is measured, which takes an export and seconds of timing, so few detectors are asked about. The line through
those that were measured, milliseconds over GFLOPs, gives the next one, until one is as slow as was asked for and its
neighbour, which keeps one block more, is slower.

GFLOPs do not say what a channel costs: ONNX Runtime's convolutions on AVX-512 compute 16 channels at a time, and
72 channels take as long as 80. So two detectors are compared, one whose widths are multiples of 2 x `round_to`, and the
same one with one step less in every layer that was cut. Where that step costs nothing it stays: all widths are then
multiples of 2 x `round_to`, and more channels are left at the same latency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compress.detectors.base import Detector
from compress.detectors.build import model_size
from compress.prune.cut import cut, shapes_of
from compress.prune.graph import PruningGraph
from compress.prune.order import Block, fewest, leaving
from deploy.core.errors import UserError
from deploy.latency.results import Estimate

OrderOf = Callable[[int], Sequence[Block]]
"""For a number that widths are multiples of, what can leave, in order: `compress.prune.order.blocks`."""

WITHIN = 0.03
"""Share of the asked latency that the found one may differ by."""
WIDEST = 32
"""The largest number that widths become multiples of."""
_NOISE = 0.01  # a share; a file that is slower than asked by less, and by no more than its own interval, is fast enough
_MOST, _SWAPS, _CHOICE = 8, 2, 16  # detectors of an order that are measured; of those between two; what is looked at


@dataclass(frozen=True)
class Timing:
    """Latency of a detector's file at batch 1.

    ratio: its median over that of the whole detector's file, both measured in turn.
    again: the same file, opened twice, against itself in the same rounds: what noise alone does.
    """

    ratio: Estimate
    again: Estimate


class Stopwatch(Protocol):
    """Measures files of a detector, the whole one's beside each."""

    @property
    def whole_ms(self) -> float:
        """Median milliseconds of the whole detector's file, over all that was measured so far."""

    def timing(self, detector: Detector) -> Timing:
        """Of a detector without some of the channels of the whole one; measured once for each set of widths."""


@dataclass(frozen=True)
class Trial:
    """A detector that was measured: blocks that left, widths that are multiples of what, what it computes."""

    blocks: int
    multiple: int
    gflops: float
    timing: Timing


class Cuts:
    """What is left of a detector without some blocks, and its GFLOPs for an image of `size` (height, width)."""

    def __init__(self, detector: Detector, graph: PruningGraph, size: tuple[int, int]) -> None:
        self._detector, self._graph, self._size = detector, graph, size
        self._counted = shapes_of(detector)

    def smaller(self, blocks: Sequence[Block]) -> Detector:
        return cut(self._detector, self._graph, leaving(blocks, len(blocks)))

    def gflops(self, blocks: Sequence[Block]) -> float:
        return model_size(cut(self._counted, self._graph, leaving(blocks, len(blocks))), self._size)["gflops"]


@dataclass
class LatencySearch:
    """Finds detectors by the latency of their files; what was measured for one helps to find the next.

    say: takes a line about each file that was measured.
    multiple: what widths are multiples of; None: nothing was measured yet.
    note: about the last detector that was found; None: there is nothing to say.
    """

    stopwatch: Stopwatch
    say: Callable[[str], None] = print
    multiple: int | None = None
    note: str | None = None
    trials: list[Trial] = field(default_factory=list)

    def ms(self, detector: Detector) -> float:
        """Median milliseconds of a detector's file."""
        return self.stopwatch.timing(detector).ratio.value * self.stopwatch.whole_ms

    def meet(
        self,
        asked: float,
        cuts: Cuts,
        order_of: OrderOf,
        *,
        round_to: int,
        rough: bool = False,
    ) -> Sequence[Block]:
        """The blocks that must leave a detector so that its file takes `asked` milliseconds.

        Args:
            cuts: of the whole detector, or of what an earlier call left of it.
            order_of: what can leave it, in order.
            round_to: widths are multiples of this or of twice this.
            rough: by the line through what was measured, without measuring the result.

        Raises UserError where nothing needs to leave, and where the file is slower even with the fewest channels.
        """
        known = _Known(self, cuts)
        if not self.trials:
            self.trials.append(Trial(0, 1, cuts.gflops(()), self.stopwatch.timing(cuts.smaller(()))))
            whole = self.stopwatch.whole_ms
            if whole <= asked:
                raise UserError(
                    f"prune.latency_ms: {asked:g} ms are asked for, and the file of the whole detector takes "
                    f"{whole:.4g} ms: nothing needs to be cut; ask for less"
                )
            self.say(f"latency: the file of the whole detector takes {whole:.4g} ms")
        if self.multiple is None:
            self._check_reach(asked, known, order_of(round_to), round_to)
            self.multiple = self._multiple(asked, known, order_of, round_to)
        for multiple in dict.fromkeys((self.multiple, round_to)):
            self.multiple, order = multiple, order_of(multiple)
            if rough:
                return order[: known.guess(order, asked, 0, len(order) + 1)]
            found = self._fewest(asked, known, order, multiple)
            if found is not None:
                self.note = self._gap(asked, known.measure(found, multiple), multiple)
                return found
        raise self._too_slow(asked, known.measure(order_of(round_to), round_to), round_to)

    # --- details ----------------------------------------------------------------------------------------

    def _ms(self, trial: Trial) -> float:
        return trial.timing.ratio.value * self.stopwatch.whole_ms

    def _fits(self, trial: Trial, asked: float) -> bool:
        ratio = trial.timing.ratio
        noise = 0.0 if ratio.low is None else min(_NOISE, 1 - ratio.low / ratio.value)
        return self._ms(trial) <= asked * (1 + noise)

    def _check_reach(self, asked: float, known: _Known, order: Sequence[Block], round_to: int) -> None:
        """Measure the detector with the fewest channels first, where much is asked of it: if it is not fast enough,
        nothing is, and if it is, the line to it is known at both ends."""
        if asked < self.stopwatch.whole_ms / 2:
            least = known.measure(order, round_to)
            if not self._fits(least, asked):
                raise self._too_slow(asked, least, round_to)

    def _too_slow(self, asked: float, least: Trial, round_to: int) -> UserError:
        return UserError(
            f"prune.latency_ms: {asked:g} ms are asked for, and {self._ms(least):.4g} ms remain with the fewest "
            f"channels, {round_to} a layer; ask for more, or keep less"
        )

    def _multiple(self, asked: float, known: _Known, order_of: OrderOf, round_to: int) -> int:
        """2 x round_to, if a step of round_to costs less than half of what its operations cost elsewhere."""
        if 2 * round_to > WIDEST or not order_of(2 * round_to):
            return round_to
        wider = order_of(2 * round_to)
        wider = wider[: known.guess(wider, asked, 0, len(wider) + 1)]
        whole, more = self.trials[0], known.measure(wider, 2 * round_to)
        less = known.measure(_one_less(order_of(round_to), wider), round_to)
        expected = (self._ms(whole) - self._ms(more)) / (whole.gflops - more.gflops) * (more.gflops - less.gflops)
        if self._ms(more) - self._ms(less) >= expected / 2:
            return round_to
        self.say(f"latency: widths are multiples of {2 * round_to}, which are as fast as {round_to} less")
        return 2 * round_to

    def _fewest(self, asked: float, known: _Known, order: Sequence[Block], multiple: int) -> Sequence[Block] | None:
        """The fewest blocks of an order that must leave, of those that were tried; None: all are too few."""
        tried: dict[int, Trial] = {}
        while True:
            # Anew each time, since the whole detector's time is known better with each measurement.
            fast = min((n for n in tried if self._fits(tried[n], asked)), default=len(order) + 1)
            slow = max((n for n in tried if n < fast), default=0)
            if fast - slow == 1 or len(tried) == _MOST:
                break
            if fast in tried and self._ms(tried[fast]) >= asked * (1 - _NOISE):
                n = fast - 1  # does one block more fit?
            elif len(tried) < _MOST // 2:
                n = known.guess(order, asked, slow, fast)
            else:
                n = len(order) if fast > len(order) else (slow + fast) // 2
            tried[n] = known.measure(order[:n], multiple)
        if fast > len(order):
            return None
        if slow in tried and fast - slow == 1:
            return self._between(asked, known, order, fast, multiple)
        return order[:fast]

    def _between(self, asked: float, known: _Known, order: Sequence[Block], n: int, multiple: int) -> Sequence[Block]:
        """What leaves where n - 1 blocks are too few and n may be more than needed: another block in the place of the
        nth, one that computes less, if that is fast enough."""
        fewer, best = order[: n - 1], order[:n]
        slow, fast = known.measure(fewer, multiple), known.measure(best, multiple)
        for _ in range(_SWAPS):
            if self._ms(fast) >= asked * (1 - _NOISE):
                break
            # The line between the two says what another block in the place of the nth would give.
            slope = (self._ms(slow) - self._ms(fast)) / max(slow.gflops - fast.gflops, 1e-9)
            limit = fast.gflops + (asked - self._ms(fast)) / slope if slope > 0 else fast.gflops
            others = [[*fewer, block] for block in _next_of_each(order[n - 1 :])[:_CHOICE]]
            fitting = [blocks for blocks in others if fast.gflops < known.gflops(blocks) <= limit]
            if not fitting:
                break
            blocks = max(fitting, key=known.gflops)
            trial = known.measure(blocks, multiple)
            if self._fits(trial, asked):
                best, fast = blocks, trial
            else:
                slow = trial
        return best

    def _gap(self, asked: float, found: Trial, multiple: int) -> str | None:
        """A line on a file that is much faster than asked for."""
        if self._ms(found) >= asked * (1 - WITHIN):
            return None
        slower = [self._ms(trial) for trial in self.trials if self._ms(trial) > asked and trial.blocks]
        next_one = f"; the nearest slower one that was measured takes {min(slower):.4g} ms" if slower else ""
        note = (
            f"{self._ms(found):.4g} ms are {1 - self._ms(found) / asked:.0%} less than asked for: channels leave by "
            f"{multiple}, and none of these steps comes nearer{next_one}"
        )
        self.say(f"latency: {note}")
        return note


class _Known:
    """What is known of the cuts of a detector: each is counted and measured once."""

    def __init__(self, search: LatencySearch, cuts: Cuts) -> None:
        self._search, self._cuts = search, cuts
        self._gflops: dict[frozenset[tuple[str, int]], float] = {}
        self._trials: dict[frozenset[tuple[str, int]], Trial] = {}

    def gflops(self, blocks: Sequence[Block]) -> float:
        key = frozenset(_left(blocks).items())
        if key not in self._gflops:
            self._gflops[key] = self._cuts.gflops(blocks)
        return self._gflops[key]

    def measure(self, blocks: Sequence[Block], multiple: int) -> Trial:
        key = frozenset(_left(blocks).items())
        if key not in self._trials:
            timing = self._search.stopwatch.timing(self._cuts.smaller(blocks))
            trial = self._trials[key] = Trial(len(blocks), multiple, self.gflops(blocks), timing)
            self._search.trials.append(trial)
            self._search.say(
                f"latency: {in_words(timing, self._search.stopwatch.whole_ms)} with {trial.gflops:.4g} GFLOPs, widths "
                f"multiples of {multiple}"
            )
        return self._trials[key]

    def guess(self, order: Sequence[Block], asked: float, slow: int, fast: int) -> int:
        """A number of blocks between `slow` and `fast`, both excluded, by the line through what was measured: the two
        around `asked`, or the two next to it, or the whole detector's and nothing at all."""
        multiple = self._search.multiple or 1
        points = sorted(
            (trial.timing.ratio.value, trial.gflops)
            for trial in self._search.trials
            if not trial.blocks or trial.multiple % multiple == 0
        )
        wanted = min(asked / self._search.stopwatch.whole_ms, 1.0)
        above = next(index for index, point in enumerate(points) if point[0] >= wanted or point == points[-1])
        first, second = points[max(above - 1, 0) : max(above + 1, 2)] if len(points) > 1 else ((0.0, 0.0), points[0])
        slope = (second[1] - first[1]) / (second[0] - first[0]) if second[0] > first[0] else 0.0
        gflops = second[1] + (wanted - second[0]) * (slope if slope > 0 else second[1] / second[0])
        n = fewest(len(order), lambda n: self.gflops(order[:n]) <= gflops)
        return min(max(len(order) if n is None else n, slow + 1), fast - 1)


def in_words(timing: Timing, whole_ms: float) -> str:
    """`5.02 ms (4.97 to 5.06)`."""
    ratio = timing.ratio
    interval = (
        ""
        if ratio.low is None or ratio.high is None
        else f" ({ratio.low * whole_ms:.4g} to {ratio.high * whole_ms:.4g})"
    )
    return f"{ratio.value * whole_ms:.4g} ms{interval}"


def _left(blocks: Sequence[Block]) -> Mapping[str, int]:
    """Widths of the groups that lose blocks."""
    return {block.group: block.width for block in blocks}  # the last of a group is the narrowest


def _next_of_each(order: Sequence[Block]) -> list[Block]:
    """The first block of each group."""
    found: dict[str, Block] = {}
    for block in order:
        found.setdefault(block.group, block)
    return list(found.values())


def _one_less(fine: Sequence[Block], blocks: Sequence[Block]) -> list[Block]:
    """The blocks of `fine` that leave what `blocks` leave, and one more from each of their groups."""
    found, left = list[Block](), dict(_left(blocks))
    for block in fine:
        if block.group in left:
            found.append(block)
            if block.width < left[block.group]:
                del left[block.group]
    return found
