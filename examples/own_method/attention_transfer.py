"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928): where a network looks, not what it sees.

    A(F) = vec(mean_c F^2),   L = beta * sum_levels mean_images || A(S) / |A(S)| - A(T) / |A(T)| ||

Differs: squared channel means per pyramid level instead of per residual stage. No adapter is needed: the channels are
gone before the two are compared. In a recipe:

    methods:
      "examples.own_method.attention_transfer:AttentionTransfer": {weight: 1.0, options: {beta: 10.0}}
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from compress.data.batch import Batch
from compress.detectors.base import Capability, Detector
from compress.distill.method import Method, Outputs


class AttentionTransfer(Method):
    """The method.

    Args:
        student, teacher: what a recipe hands to a method; this one needs nothing of them before it sees their maps.
        beta: weight of the term.
    """

    needs = frozenset({Capability.FEATURES})

    def __init__(self, student: Detector | None = None, teacher: Detector | None = None, *, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Any]:
        """`attention`, a scalar. The maps of both are compared on the levels that they have in common."""
        pairs = [(s, t) for s, t in zip(student.features, teacher.features, strict=False) if s.shape[2:] == t.shape[2:]]
        distances = [(_attention(s) - _attention(t)).norm(dim=1).mean() for s, t in pairs]
        return {"attention": self.beta * sum(distances)}


def _attention(features: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h * w], of length 1."""
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1)
