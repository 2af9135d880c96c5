"""In which order channels leave, and how many must: a list of blocks, of which the first n leave.

    order = blocks(graph, scores, round_to=8, shares="uniform")
    n = fewest(len(order), lambda n: cost(leaving(order, n)) <= limit)

Whatever the budget is (operations, parameters, measured latency, accuracy), the detectors to choose from are the same:
those without the first n blocks. So a budget is a bisection, and all budgets agree on what they cut first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from compress.prune.graph import PruningGraph
from compress.prune.groups import ChannelGroup


@dataclass(frozen=True)
class Block:
    """Channels that leave at once.

    group: its name. channels: int64, which. width: of the group afterwards. key: place in the order, least first.
    """

    group: str
    channels: Tensor
    width: int
    key: float


NEAR = 0.95
"""What costs this part of a limit, or more, is near enough to look no further."""

Drops = Mapping[str, Sequence[tuple[float, float]]]
"""For a group: shares of its channels that leave, ascending, and the mAP lost by each alone."""


def blocks(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    *,
    round_to: int = 8,
    shares: str = "uniform",
    drops: Drops | None = None,
    whole: Mapping[str, int] | None = None,
) -> list[Block]:
    """Order what can leave. The least important channels of a group go first; a group keeps at least one block.

    Args:
        scores: of `importances`.
        round_to: widths of groups that lose channels are multiples of this. Groups of no more stay whole.
        shares: uniform: all groups lose the same share. global: the least important channels of all groups go first.
            sensitivity: the group goes first that loses the least mAP by it, by `drops`.
        whole: widths of the groups of which shares are counted, before any cut; None: those of the graph.
    """
    widths = {group.name: group.width for group in graph.groups} | dict(whole or {})
    order: list[Block] = []
    for group in graph.groups:
        points = (drops or {}).get(group.name, ())
        order += _of_group(group, scores[group.name], round_to, shares, points, widths[group.name])
    # Of equal keys the smaller share goes first. Within a group neither falls, and the sorting is stable.
    return sorted(order, key=lambda block: (block.key, 1 - block.width / widths[block.group]))


def leaving(order: Sequence[Block], n: int) -> dict[str, Tensor]:
    """The channels of the first n blocks, by group."""
    found: dict[str, list[Tensor]] = {}
    for block in order[:n]:
        found.setdefault(block.group, []).append(block.channels)
    return {group: torch.cat(channels) for group, channels in found.items()}


def fewest(most: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest n of 0..most that fits, where all above one that fits do; None if `most` does not.

    Asks about log2(most) of them, `most` first.
    """
    if not fits(most):
        return None
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def most_that_fits(
    order: Sequence[Block], cost: Callable[[Sequence[Block]], float], limit: float
) -> Sequence[Block] | None:
    """The blocks that leave so that what stays costs at most `limit`, and little less; None if all are too few.

    The first n of the order, n as small as fits. Where one block of a wide group takes that far below the limit, two
    others are tried: blocks that left are given back, the last ones first, each that fits; and blocks of other groups
    leave in the place of that one. The one that costs most is taken.
    """
    n = fewest(len(order), lambda n: cost(order[:n]) <= limit)
    if n is None or n == 0 or cost(order[:n]) >= limit * NEAR:
        return None if n is None else order[:n]
    others = [*order[: n - 1], *(block for block in order[n:] if block.group != order[n - 1].group)]
    m = fewest(len(others), lambda m: cost(others[:m]) <= limit)
    found = [_given_back(order[:n], cost, limit)]
    if m is not None:
        found.append(_given_back(others[:m], cost, limit))
    return max(found, key=cost)  # the first of equal ones


# --- details --------------------------------------------------------------------------------------------


def _given_back(leave: Sequence[Block], cost: Callable[[Sequence[Block]], float], limit: float) -> Sequence[Block]:
    """What still has to leave after all that fits was given back, of each group the last blocks."""
    needed, stays = set[str](), list(leave)
    for block in reversed(leave):
        if block.group in needed:
            continue
        less = [other for other in stays if other is not block]
        if cost(less) <= limit:
            stays = less
        else:
            needed.add(block.group)
    return stays


def _of_group(
    group: ChannelGroup, score: Tensor, round_to: int, shares: str, drops: Sequence[tuple[float, float]], whole: int
) -> list[Block]:
    step, width = lcm(round_to, group.together), group.width
    # Norm groups leave as a whole: by the mean score of their channels.
    by_norm_group = score.reshape(-1, group.together)
    order = by_norm_group.mean(1).argsort(stable=True)
    channels = (order[:, None] * group.together + torch.arange(group.together)).flatten()
    found, gone, least = [], 0, 0.0
    for left in range((width - 1) // step * step, 0, -step):
        leave = channels[gone : width - left]
        share = 1 - left / whole
        key = {
            "uniform": share,
            "global": float(score[leave].mean()),
            "sensitivity": _interpolated(drops, share),
        }[shares]
        least = max(least, key)
        found.append(Block(group.name, leave, left, least))
        gone = width - left
    return found


def _interpolated(points: Sequence[tuple[float, float]], share: float) -> float:
    """Value at `share` of the line through (0, 0) and the points, level beyond the last."""
    before = (0.0, 0.0)
    for point in points:
        if share <= point[0]:
            part = (share - before[0]) / (point[0] - before[0])
            return before[1] + part * (point[1] - before[1])
        before = point
    return before[1]
