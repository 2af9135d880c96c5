"""What detectors with a decoder of queries say: one box and a score for each class a query (`Capability.QUERIES`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """Where queries start.

    boxes: float [B, Q, 4], centre, width and height in shares of the network image: what the decoder begins to refine.
    places: float [B, Q, 3], the location of the maps whose features they take along: x and y of its centre in shares of
        the network image, and its stride in pixels.
    canvas: (height, width) of the network image in pixels.
    """

    boxes: Tensor
    places: Tensor
    canvas: tuple[int, int]

    def on(self, canvas: tuple[int, int]) -> Queries:
        """The same ones in shares of another model's network image of this (height, width): one of the two models may
        have padded it."""
        if canvas == self.canvas:
            return self
        share = self.boxes.new_tensor([self.canvas[1] / canvas[1], self.canvas[0] / canvas[0]])
        places = torch.cat((self.places[..., :2] * share, self.places[..., 2:]), -1)
        return Queries(self.boxes * share.repeat(2), places, canvas)

    def map(self, function: Callable[[Tensor], Tensor]) -> Queries:
        return Queries(function(self.boxes), function(self.places), self.canvas)


@dataclass
class QueryPrediction:
    """What a layer of the decoder says of its queries.

    logits: float [B, Q, K], before the sigmoid; boxes: float [B, Q, 4], centre, width and height in shares of `canvas`.
    queries: where they started.
    canvas: (height, width) of the network image in pixels.
    edges: of decoders that say boxes as distributions; None: of others.
    learned: in training what the library's loss takes besides, by its names.
    """

    logits: Tensor
    boxes: Tensor
    queries: Queries
    canvas: tuple[int, int]
    edges: EdgeDistributions | None = None
    learned: dict[str, Any] = field(default_factory=dict)

    def boxes_on(self, canvas: tuple[int, int]) -> Tensor:
        """`boxes` in shares of another model's network image; see `Queries.on`."""
        if canvas == self.canvas:
            return self.boxes
        share = self.boxes.new_tensor([self.canvas[1] / canvas[1], self.canvas[0] / canvas[0]])
        return self.boxes * share.repeat(2)

    def float(self) -> QueryPrediction:
        return self._map(Tensor.float)

    def detach(self) -> QueryPrediction:
        return self._map(Tensor.detach)

    def scores(self) -> Tensor:
        """[B, Q, K] in 0..1."""
        return self.logits.sigmoid()

    def scores_by_level(self) -> list[Tensor]:
        """All queries as one level."""
        return [self.scores()]

    def _map(self, function: Callable[[Tensor], Tensor]) -> QueryPrediction:
        learned = {k: function(v) if isinstance(v, Tensor) else v for k, v in self.learned.items()}
        edges = None if self.edges is None else self.edges.map(function)
        logits, boxes = function(self.logits), function(self.boxes)
        queries = self.queries.map(function)
        return replace(self, logits=logits, boxes=boxes, queries=queries, edges=edges, learned=learned)


@dataclass(frozen=True)
class EdgeDistributions:
    """Boxes as distributions of their four edges around a first box (D-FINE).

    logits: float [B, Q, 4, N], before the softmax over N bins; edges in the order left, top, right, bottom.
    around: float [B, Q, 4], the first box: centre, width and height in shares of the network image.
    offsets: float [N], rising: what a bin adds to the distance of an edge from the centre, in units of the first box's
        side / scale.
    scale: float scalar; an edge of the first box itself is scale / 2 such units away.
    """

    logits: Tensor
    around: Tensor
    offsets: Tensor
    scale: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> EdgeDistributions:
        return EdgeDistributions(*(function(x) for x in (self.logits, self.around, self.offsets, self.scale)))


def places_of(shapes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device) -> Tensor:
    """`Queries.places` of all locations of maps of (h, w), [1, S, 3]."""
    levels = []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        levels.append(torch.stack((columns, rows, torch.full_like(rows, stride)), -1).flatten(0, 1))
    return torch.cat(levels)[None]


def nearest_rows(places: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """The location nearest to each of `places` [B, Q, 3], counted level behind level: int64 [B, Q]. It lies on the
    level of the nearest stride, and has the place's centre in it."""
    device = places.device
    octaves = torch.tensor(strides, device=device).log2()
    level = (places[..., 2, None].log2() - octaves).abs().argmin(-1)  # [B, Q]
    heights, widths = (torch.tensor(sides, device=device)[level] for sides in zip(*shapes, strict=True))
    sizes = torch.tensor([h * w for h, w in shapes], device=device)
    x = torch.minimum((places[..., 0] * widths).long().clamp(min=0), widths - 1)
    y = torch.minimum((places[..., 1] * heights).long().clamp(min=0), heights - 1)
    return (sizes.cumsum(0) - sizes)[level] + y * widths + x
