"""Deformable attention by gathering, for exported files; and which form runs where.

transformers samples the maps with GridSample, a level at a time, an operator that many runtimes do slowly. Here the
levels are one list of rows. All samples of a query take their four rows in one Gather, and one product with the
bilinear weights adds them: the same numbers up to the order of sums. On the CPU, training and evaluation take
`row_sums`; on a GPU, what the library has.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from compress.detectors.transformers.row_sums import sum_rows


def sample_rows(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
    method: str = "default",
) -> Tensor:
    """Weighted sums of bilinear samples: [B, Q, N * C].

    Takes the arguments of transformers' `multi_scale_deformable_attention_v2`.

    Args:
        value: [B, S, N, C], the locations of all levels behind each other, N heads of C channels.
        shapes: (h, w) of each level; S is their sum of h * w.
        locations: [B, Q, N, P, 2] x and y in 0..1 of the map; outside of it is zero.
        weights: [B, Q, N, P].
        points: samples at each level; their sum is P.
        method: only "default", which is bilinear.
    """
    assert method == "default", f"sampling {method!r} is not bilinear"
    B, S, N, C = value.shape
    levels = [(h, w, start) for (h, w), start in zip(shapes, _starts(shapes), strict=True)]
    of_points = [level for level, count in zip(levels, points, strict=True) for _ in range(count)]
    heights, widths, starts = (
        torch.tensor(column, device=value.device) for column in zip(*of_points, strict=True)
    )  # [P]
    x = locations[..., 0].reshape(B, -1, N, len(of_points)) * widths - 0.5
    y = locations[..., 1].reshape(B, -1, N, len(of_points)) * heights - 0.5
    columns, column_shares = _neighbours(x, widths)
    rows, row_shares = _neighbours(y, heights)
    row_shares = [share * weights.reshape(share.shape) for share in row_shares]
    corners = list(product((0, 1), (0, 1)))
    images = torch.arange(B, device=value.device).view(-1, 1, 1, 1) * (S * N)
    heads = torch.arange(N, device=value.device).view(1, 1, -1, 1)
    place = torch.cat([starts + rows[i] * widths + columns[j] for i, j in corners], 3)  # [B, Q, N, 4 P]
    place = images + place.long() * N + heads
    shares = torch.cat([row_shares[i] * column_shares[j] for i, j in corners], 3)
    # `index_select` and not brackets: Gather, which ONNX Runtime runs faster than GatherND.
    picked = value.reshape(-1, C).index_select(0, place.flatten()).view(*place.shape, C)
    return (shares[..., None, :] @ picked).flatten(2)


@contextlib.contextmanager
def in_best_form(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Run `network` of transformers as suits what is done with it: for an export with sampling by rows and without
    checks of values, for which there is no ONNX; on the CPU with sums of rows; elsewhere as it is."""
    module = sys.modules[type(network).__module__]
    exporting = torch.compiler.is_exporting()
    sample = sample_rows if exporting else sum_rows
    replaced: list[tuple[Any, str, Any]] = []
    if exporting:
        replaced.append((module, "torch_compilable_check", _unchecked))
    if exporting or device.type == "cpu":
        if hasattr(module, "multi_scale_deformable_attention_v2"):
            replaced.append((module, "multi_scale_deformable_attention_v2", sample))
        else:
            replaced.append((module.MultiScaleDeformableAttention, "forward", _of_levels(sample)))
        parts = (part for part in network.modules() if hasattr(part, "ms_deformable_attn_core"))
        replaced += [(part, "ms_deformable_attn_core", sample) for part in parts]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)


# --- details --------------------------------------------------------------------------------------------


def _of_levels(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`sample` in the form of transformers' `MultiScaleDeformableAttention.forward`: locations [B, Q, N, L, P, 2] and
    weights [B, Q, N, L, P], with as many samples P at each level."""

    def forward(
        _: nn.Module,
        value: Tensor,
        shapes: Tensor,
        shapes_list: Sequence[tuple[int, int]],
        starts: Tensor | None,
        locations: Tensor,
        weights: Tensor,
        step: int,
    ) -> Tensor:
        return sample(value, shapes_list, locations, weights, [int(locations.shape[4])] * len(shapes_list))

    return forward


def _neighbours(x: Tensor, size: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The two whole places around `x` on an axis of `size` places, and the share of each: 0 for one outside."""
    left = x.floor()
    places = (left, left + 1)
    shares = (1 - (x - left), x - left)
    inside = [share * ((place >= 0) & (place < size)) for place, share in zip(places, shares, strict=True)]
    return [torch.minimum(place.clamp(min=0), size - 1) for place in places], inside


def _starts(shapes: Sequence[tuple[int, int]]) -> list[int]:
    starts = [0]
    for h, w in shapes[:-1]:
        starts.append(starts[-1] + h * w)
    return starts


def _unchecked(*_: Any, **__: Any) -> None:
    return None
