"""The modulating factor |difference|^beta of focal losses, and its slope, where the difference is 0 as well."""

from __future__ import annotations

import torch
from torch import Tensor


def power(x: Tensor, beta: float) -> Tensor:
    """x^beta for x >= 0 and beta > 0. Autograd gives 0 at x = 0 where beta < 1, as `power_slope` does."""
    if beta >= 1:
        return x.pow(beta)
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).pow(beta), 0.0)


def power_slope(x: Tensor, beta: float) -> Tensor:
    """Derivative of `power`, in new memory; 0 at x = 0 where beta < 1: infinity times the sign of 0 would be NaN."""
    slope = x.pow(beta - 1).mul_(beta)
    return slope if beta >= 1 else slope.masked_fill_(x == 0, 0.0)
