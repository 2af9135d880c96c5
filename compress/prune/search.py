"""Pruning to a budget: the detector that loses as little as the budget allows.

pruned = prune(detector, Cut(gflops=0.5), Means(size=(128, 128)))
pruned.detector, pruned.found, pruned.rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from compress.config.prune import Cut
from compress.detectors.base import Detector
from compress.detectors.build import model_size
from compress.prune.cut import cut, shapes_of
from compress.prune.graph import PruningGraph, pruning_graph
from compress.prune.importance import Losses, importances
from compress.prune.latency import Cuts, LatencySearch
from compress.prune.order import Block, Drops, blocks, fewest, leaving, most_that_fits
from deploy.core.errors import UserError

Figure = Callable[[Detector], float]
MUCH_LESS = 0.9
"""A found share below this part of the asked one is told."""


@dataclass(frozen=True)
class Means:
    """What importances and budgets need to know of the world.

    size: (height, width) of the image whose operations count.
    losses: of training images; may be gone through several times.
    latency: measures files of detectors. mean_ap: measures a detector, percent, on training images.
    drops: measures, by `sensitivity`, where shares are by it: takes the detector's graph and its scores.
    """

    size: tuple[int, int]
    losses: Losses = ()
    latency: LatencySearch | None = None
    mean_ap: Figure | None = None
    drops: Callable[[PruningGraph, Mapping[str, Tensor]], Drops] | None = None


@dataclass(frozen=True)
class Pruned:
    """A detector without some of its channels, its weights inherited and not trained since.

    whole, found: the figure of the budget, before and after (GFLOPs, millions of parameters, milliseconds, mAP).
    rows: name, width and what is left of each group of channels that could leave.
    note: a line on a share that is much smaller than asked for; None: there is nothing to say.
    whole_layers: of `PruningGraph.whole`.
    """

    detector: Detector
    whole: float
    found: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None
    whole_layers: tuple[str, ...] = ()


def prune(detector: Detector, settings: Cut, means: Means, *, seed: int = 0) -> Pruned:
    """Cut a detector, which is not changed, until the budget is met.

    seed: of random importances.

    Raises UserError for a detector that cannot be pruned or was pruned before, names to keep that it does not have or
    that leave nothing to cut, importances without images, a budget that it does not meet even with the fewest channels,
    and one of mAP that is all it has or that the first channels already cost.
    """
    check_whole(detector)
    figure = _figure(settings, means)
    whole = figure(detector)
    if settings.max_map_drop is not None and settings.max_map_drop >= whole:
        raise UserError(
            f"prune.max_map_drop: {settings.max_map_drop:g} may be lost, and the whole detector has {whole:.4g} mAP on "
            "the training images; prune a trained one, or ask for less"
        )
    rounds = settings.rounds if settings.schedule == "iterative" else 1
    current, drops = detector, None
    widths: dict[str, int] = {}
    left: dict[str, int] = {}
    stay: tuple[str, ...] = ()
    for number in range(1, rounds + 1):
        graph = pruning_graph(current, settings.keep)
        scores = importances(graph, settings.importance, losses=means.losses, seed=seed)
        if number == 1:
            widths = {group.name: group.width for group in graph.groups}
            left = dict(widths)
            stay = graph.whole
            if not blocks(graph, scores, round_to=settings.round_to):
                raise UserError(_nothing_to_cut(settings))
            if settings.shares == "sensitivity":
                assert means.drops is not None, "the caller gives what the shares need"
                drops = means.drops(graph, scores)
        order_of = partial(_order, graph, scores, settings, drops, widths)
        limit = _limit(settings, whole, number / rounds)
        if settings.budget == "latency_ms":
            assert means.latency is not None, "the caller gives what the budget needs"
            cuts = Cuts(current, graph, means.size)
            leave = means.latency.meet(limit, cuts, order_of, round_to=settings.round_to, rough=number < rounds)
        else:
            order = order_of(settings.round_to)
            leave = _meet(current, graph, order, figure, limit, settings)
        current = cut(current, graph, leaving(leave, len(leave)))
        left |= {block.group: block.width for block in leave}
    rows = [{"name": name, "width": width, "left": left[name]} for name, width in widths.items()]
    found = figure(current)
    return Pruned(current, whole, found, rows, _gap(settings, whole, found), stay)


def check_whole(detector: Detector) -> None:
    """Raise UserError for a detector that was pruned before."""
    if detector.model is not None and detector.model.widths:
        raise UserError("prune: this detector was pruned before; prune the whole one, with a smaller budget")


# --- details --------------------------------------------------------------------------------------------


def _figure(settings: Cut, means: Means) -> Figure:
    """What the budget limits, of a detector."""
    if settings.budget in ("gflops", "params"):
        key = {"gflops": "gflops", "params": "params_m"}[settings.budget]
        return lambda detector: model_size(detector, means.size)[key]
    if settings.budget == "latency_ms":
        assert means.latency is not None, "the caller gives what the budget needs"
        return means.latency.ms
    figure = means.mean_ap
    assert figure is not None, "the caller gives what the budget needs"
    return figure


def _nothing_to_cut(settings: Cut) -> str:
    if settings.keep:
        return f"prune.keep: {', '.join(settings.keep)} and what depends on them are all that could be cut; keep less"
    return f"prune: no layer can lose channels and stay a multiple of {settings.round_to} wide, so nothing can be cut"


def _gap(settings: Cut, whole: float, found: float) -> str | None:
    """A line on a share of gflops or params that is much smaller than asked for."""
    if settings.budget not in ("gflops", "params"):
        return None
    asked: float = getattr(settings, settings.budget)
    if found >= MUCH_LESS * asked * whole:
        return None
    return (
        f"{found / whole:.0%} of {settings.budget} stay where {asked:.0%} were asked for: channels leave by "
        f"{settings.round_to} or more at once, and no cut that was tried comes nearer"
    )


def _order(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    settings: Cut,
    drops: Drops | None,
    whole: Mapping[str, int],
    round_to: int,
) -> list[Block]:
    return blocks(graph, scores, round_to=round_to, shares=settings.shares, drops=drops, whole=whole)


def _limit(settings: Cut, whole: float, part: float) -> float:
    """What the budget's figure may be after a part of the rounds; shares are reached in equal steps of their
    logarithm."""
    if settings.budget == "max_map_drop":
        assert settings.max_map_drop is not None
        return whole - settings.max_map_drop
    if settings.budget == "latency_ms":
        assert settings.latency_ms is not None
        return float(whole * (settings.latency_ms / whole) ** part)
    share: float = getattr(settings, settings.budget)
    return float(whole * share**part)


def _meet(
    detector: Detector, graph: PruningGraph, order: Sequence[Block], figure: Figure, limit: float, settings: Cut
) -> Sequence[Block]:
    """The blocks that must leave (of max_map_drop: may leave)."""
    subject = detector if settings.budget == "max_map_drop" else shapes_of(detector)

    def figure_of(leave: Sequence[Block]) -> float:
        return figure(cut(subject, graph, leaving(leave, len(leave))))

    if settings.budget == "max_map_drop":  # the most that may leave: one less than the fewest that are too many
        too_many = fewest(len(order), lambda n: figure_of(order[:n]) < limit)
        found = len(order) if too_many is None else max(0, too_many - 1)
        if found == 0:
            raise UserError(
                f"prune.max_map_drop: already the first channels cost more than {settings.max_map_drop:g} mAP on the "
                "training images, so nothing may leave; allow more"
            )
        return order[:found]
    leave = most_that_fits(order, figure_of, limit)
    if leave is None:
        least = figure_of(order)
        raise UserError(
            f"prune.{settings.budget}: {getattr(settings, settings.budget):g} asks for {limit:.4g}, and {least:.4g} "
            f"remain with the fewest channels, {settings.round_to} a layer; ask for more, or keep less"
        )
    return leave
