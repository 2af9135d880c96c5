"""Equality within 1e-4, and the largest difference seen of every quantity."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-4

LARGEST: dict[tuple[str, str], float] = {}
"""(model, quantity) → largest absolute difference of this run."""


def same(model: str, quantity: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, no NaN, and absolute differences of at most `tolerance`."""
    assert ours.shape == theirs.shape, f"{model} {quantity}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    key = (model, quantity)
    LARGEST[key] = max(LARGEST.get(key, 0.0), difference)
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all(), f"{model} {quantity}: not finite"
    assert difference <= tolerance, f"{model} {quantity}: differs by {difference:.2e}, allowed {tolerance:.0e}"
