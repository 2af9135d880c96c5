"""In which order channels leave, and how many: properties, and brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.detectors.base import Detector
from compress.prune.graph import PruningGraph
from compress.prune.groups import ChannelGroup
from compress.prune.order import Block, blocks, fewest, leaving, most_that_fits

NOTHING = Detector()


@st.composite
def graphs(draw: st.DrawFn) -> PruningGraph:
    """Groups of 1 to 6 norm groups of 1, 4, 8 or 12 channels."""
    groups = []
    for number in range(draw(st.integers(1, 4))):
        together = draw(st.sampled_from([1, 1, 4, 8, 12]))
        width = together * draw(st.integers(1, 48 if together == 1 else 6))
        groups.append(ChannelGroup(f"layer{number}", width, together, ()))
    return PruningGraph(tuple(groups), NOTHING)


def scores_of(graph: PruningGraph, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.width, generator=generator) for group in graph.groups}


@given(
    graphs(), st.integers(0, 99), st.sampled_from([8, 16, 32]), st.sampled_from(["uniform", "global", "sensitivity"])
)
def test_an_order(graph: PruningGraph, seed: int, round_to: int, shares: str) -> None:
    scores = scores_of(graph, seed)
    points = {group.name: [(0.25, seed % 7 / 2), (0.5, 1.0), (0.9, 4.0)] for group in graph.groups}
    order = blocks(graph, scores, round_to=round_to, shares=shares, drops=points)
    keys = [block.key for block in order]
    assert keys == sorted(keys) and all(math.isfinite(key) for key in keys)
    for group in graph.groups:
        own = [block for block in order if block.group == group.name]
        assert [block.key for block in own] == sorted(block.key for block in own)
        step = math.lcm(round_to, group.together)
        assert [block.width for block in own] == list(range((group.width - 1) // step * step, 0, -step))
        gone = torch.cat([block.channels for block in own]) if own else torch.zeros(0, dtype=torch.int64)
        assert len(gone.unique()) == len(gone) == group.width - (own[-1].width if own else group.width)
        for n in range(len(own) + 1):  # norm groups leave as a whole, after any number of blocks
            left = torch.ones(group.width, dtype=torch.bool)
            left[[channel for block in own[:n] for channel in block.channels.tolist()]] = False
            whole = left.view(-1, group.together)
            assert bool((whole == whole[:, :1]).all())
            assert n == 0 or int(left.sum()) == own[n - 1].width
        if own:  # who stays is at least as important, norm group by norm group, as who leaves
            mean = scores[group.name].view(-1, group.together).mean(1)
            assert mean[left.view(-1, group.together)[:, 0]].min() >= mean[~left.view(-1, group.together)[:, 0]].max()


@given(graphs(), st.integers(0, 9))
def test_the_first_blocks_are_nested(graph: PruningGraph, seed: int) -> None:
    order = blocks(graph, scores_of(graph, seed), shares="global")
    before: dict[str, set[int]] = {}
    for n in range(len(order) + 1):
        now = {name: set(channels.tolist()) for name, channels in leaving(order, n).items()}
        assert sum(map(len, now.values())) == sum(len(block.channels) for block in order[:n])
        assert all(before[name] <= now[name] for name in before)
        before = now


def test_uniform_shares_are_equal() -> None:
    """At any point of the order no group has lost a block more than its share."""
    graph = PruningGraph(tuple(ChannelGroup(f"layer{n}", n, 1, ()) for n in (16, 24, 32, 64, 128)), NOTHING)
    order = blocks(graph, scores_of(graph, 0))
    for n in range(1, len(order) + 1):
        reached = order[n - 1].key
        for group in graph.groups:
            lost = sum(len(block.channels) for block in order[:n] if block.group == group.name) / group.width
            assert lost <= reached < lost + 8 / group.width + 1e-9 or lost == 1 - 8 / group.width


def test_sensitivities_are_interpolated() -> None:
    """By hand: a group of 32 loses 8, 16, 24; its mAP falls by 1 at a quarter and by 5 at three quarters."""
    groups = (ChannelGroup("a", 32, 1, ()), ChannelGroup("b", 16, 1, ()))
    graph = PruningGraph(groups, NOTHING)
    drops = {"a": [(0.25, 1.0), (0.75, 5.0)], "b": [(1.0, 4.4)]}
    order = blocks(graph, scores_of(graph, 0), shares="sensitivity", drops=drops)
    assert [(block.group, block.width, round(block.key, 6)) for block in order] == [
        ("a", 24, 1.0), ("b", 8, 2.2), ("a", 16, 3.0), ("a", 8, 5.0)
    ]  # fmt: skip


def test_a_drop_that_rises_again_does_not_bring_channels_back() -> None:
    """Measured mAP goes up and down; the order within a group is kept."""
    graph = PruningGraph((ChannelGroup("a", 32, 1, ()),), NOTHING)
    order = blocks(
        graph, scores_of(graph, 0), shares="sensitivity", drops={"a": [(0.25, 3.0), (0.5, 1.0), (0.75, 2.0)]}
    )
    assert [(block.width, block.key) for block in order] == [(24, 3.0), (16, 3.0), (8, 3.0)]


@given(st.integers(0, 60), st.integers(-1, 61))
def test_fewest_is_the_first_that_fits(most: int, first: int) -> None:
    asked = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n >= first

    wanted = next((n for n in range(most + 1) if n >= first), None)
    assert fewest(most, fits) == wanted
    assert len(asked) <= 2 + math.log2(most + 2) and len(set(asked)) == len(asked) and asked[0] == most


@pytest.mark.parametrize("n", [0, 1, 2])
def test_channels_of_the_first_blocks(n: int) -> None:
    order = [Block("a", torch.tensor([3, 1]), 2, 0.1), Block("a", torch.tensor([0]), 1, 0.2)]
    found = leaving(order, n)
    assert {name: channels.tolist() for name, channels in found.items()} == [{}, {"a": [3, 1]}, {"a": [3, 1, 0]}][n]


@pytest.mark.parametrize(
    ("costs", "limit", "left", "cost"),
    [
        ("a6 c10 b40 a6 c10", 50, "c10 b40", 50),  # a's 6 are given back
        ("b60 a10 c10 a20 c15", 50, "a10 c10 a20 c15", 45),  # instead of b, whose 60 leave 40
        ("b60 a10 c10 a20 c15", 41, "b60", 40),  # near enough
        ("a30 b60 a5", 30, "a30 b60", 10),  # nothing comes nearer: with a's 30, 40 are too many
        ("a5 b5", 80, None, None),
    ],
)
def test_a_wide_block_does_not_waste_the_budget(costs: str, limit: float, left: str | None, cost: float | None) -> None:
    """By hand, of blocks that cost 100 together with what always stays; each letter is a group."""
    order = [Block(word[0], torch.tensor([place]), 0, 0.0) for place, word in enumerate(costs.split())]
    words = {int(block.channels): word for block, word in zip(order, costs.split(), strict=True)}

    def figure(leave: Sequence[Block]) -> float:
        return 100.0 - sum(int(words[int(block.channels)][1:]) for block in leave)

    found = most_that_fits(order, figure, limit)
    if left is None:
        assert found is None
    else:
        assert found is not None and figure(found) == cost
        assert [words[int(block.channels)] for block in found] == left.split()
