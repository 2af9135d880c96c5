"""Maps as rows, for the PyTorch path: elements that lie side by side in memory are worked on side by side.

    contiguous       a row a channel,  its positions side by side: rows [B, C, S]
    channels last    a row a position, its channels side by side:  rows [B, S, C]

Eager code takes a few rows at a time, so that what it makes of them stays in the cache.

Shape letters: B images, C channels, S positions; R rows of L elements, one of them C and the other S.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Elements worked on at a time in eager mode: the temporaries of a chunk stay in the cache."""


def channels_last(x: Tensor) -> bool:
    """Whether channels, and not positions, lie side by side in x [B, C, ...]. Fewer than three dimensions: no."""
    return x.dim() >= 3 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def to_rows(x: Tensor, B: int, C: int, S: int, last: bool) -> Tensor:
    """x, B images of C channels of S positions → [B, C, S], or [B, S, C] if `last`; copied where no view will do."""
    return x.movedim(1, -1).reshape(B, S, C) if last else x.reshape(B, C, S)


def from_rows(rows: Tensor, x: Tensor, last: bool) -> Tensor:
    """Contiguous rows → shape and memory format of x; not copied if x is dense and lies as its rows do."""
    shaped = rows.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1) if last else rows.view(x.shape)
    return shaped if shaped.stride() == x.stride() else torch.empty_like(x).copy_(shaped)


def fits_a_chunk(x: Tensor) -> bool:
    """Whether all of a tensor may be worked on at once; then a few large operations beat many small ones."""
    return x.numel() <= CHUNK


def chunks(B: int, R: int, L: int) -> Iterator[tuple[int, slice]]:
    """Images, and slices of their rows of about CHUNK elements."""
    step = max(1, CHUNK // max(L, 1))
    for image in range(B):
        for row in range(0, R, step):
            yield image, slice(row, min(row + step, R))


@functools.cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function for all shapes; imports the compiler, so only when it is asked for."""
    return torch.compile(function, dynamic=True)
