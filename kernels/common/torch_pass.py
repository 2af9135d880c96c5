"""PyTorch path of an operator on maps: compiled, all at once, or a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.common.dropout import Dropout, Stream, stream
from kernels.common.rows import channels_last, compiled_once, fits_a_chunk


def torch_pass(
    x: Tensor,
    dropout: Dropout | None,
    compiled: bool,
    *,
    by_chunks: Callable[..., Any],
    at_once: Callable[..., Any],
    images: int | None = None,
) -> tuple[Callable[..., Any], Stream | None, bool]:
    """Choose one of two functions that compute the same, and make the random numbers that it takes.

    Args:
        x: the operator's main map; its size and memory format decide.
        dropout: the draw; None: none.
        compiled: torch.compile `at_once`.
        by_chunks: for maps that are larger than the cache.
        at_once: for small maps, where a few large operations beat many small ones.
        images: B where it is not x.shape[0].

    Returns:
        The function; the draw; whether rows are positions (channels last).
    """
    whole, last = compiled or fits_a_chunk(x), channels_last(x)
    batch = x.shape[0] if images is None else images
    draw = None if dropout is None else stream(dropout, batch, x.device, whole=whole, last=last)
    run = compiled_once(at_once) if compiled else at_once if whole else by_chunks
    return run, draw, last
