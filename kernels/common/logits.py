"""Memory layouts of [B, C, M] logits that the fused kernels read as they are: M inside, or C inside (the flattened maps
of a channels-last network)."""

from __future__ import annotations

from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x [B, C, M] itself where it is dense with M or C inside, else a contiguous copy."""
    return x if x.transpose(1, 2).is_contiguous() else x.contiguous()


def same_layout(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`dense` x, and y in the layout of x."""
    x = dense(x)
    if x.is_contiguous():
        return x, y.contiguous()
    return x, y.transpose(1, 2).contiguous().transpose(1, 2)
