"""Deformable attention by gathering, for exported files; and which form runs where.

transformers samples the maps with GridSample, a level at a time, an operator that many runtimes do slowly. Here the
levels are one list of rows, and a sample is four rows of it (Gather) with their bilinear weights: the same numbers up
to the order of sums. On the CPU, training and evaluation take `row_sums`; on a GPU, what the library has.
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
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    rows = value.reshape(-1, C)
    images = torch.arange(B, device=value.device).view(-1, 1, 1, 1) * S
    heads = torch.arange(N, device=value.device).view(1, 1, -1, 1)
    total = None
    for dx, dy in product((0, 1), (0, 1)):
        column, row = left + dx, top + dy
        inside = (column >= 0) & (column < widths) & (row >= 0) & (row < heights)
        share = (right_share if dx else 1 - right_share) * (bottom_share if dy else 1 - bottom_share)
        share = share * inside * weights.reshape(share.shape)
        column = torch.minimum(column.clamp(min=0), widths - 1).long()
        row = torch.minimum(row.clamp(min=0), heights - 1).long()
        index = (images + starts + row * widths + column) * N + heads
        part = rows[index.flatten()].view(*index.shape, C) * share[..., None]
        total = part if total is None else total + part
    assert total is not None
    return total.sum(3).flatten(2)


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


def _starts(shapes: Sequence[tuple[int, int]]) -> list[int]:
    starts = [0]
    for h, w in shapes[:-1]:
        starts.append(starts[-1] + h * w)
    return starts


def _unchecked(*_: Any, **__: Any) -> None:
    return None
