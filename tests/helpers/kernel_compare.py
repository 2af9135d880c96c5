"""A fused operator against its reference in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.common import backend

LOSS = 2e-6  # relative: float32 sums
GRADIENT = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the greatest entry; halves are rounded
SUBNORMAL = 2.0**-24  # the least of float16: below, it has no relative accuracy
UPSTREAM = 3.0  # not 1: backward must multiply


def with_layout(shape: tuple[int, int, int], layout: str, g: torch.Generator, scale: float) -> Tensor:
    """Random [B, C, M]: `rows` is contiguous, `channels` has C inside, `sliced` is neither dense nor copied."""
    B, C, M = shape
    if layout == "channels":
        return (torch.randn(B, M, C, generator=g) * scale).transpose(1, 2)
    if layout == "sliced":
        return (torch.randn(B, C, 2 * M + 1, generator=g) * scale)[..., 1::2]
    return torch.randn(shape, generator=g) * scale


LAYOUTS = ["contiguous", "channels_last", "cropped", "transposed", "sliced"]


def strided(x: Tensor, layout: str) -> Tensor:
    """Return the same values in other memory: `cropped` is a part of a channels-last map, `sliced` has gaps
    everywhere."""
    if layout == "channels_last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last, copy=True)
    if layout == "cropped" and x.dim() == 4:
        larger = torch.nn.functional.pad(x, (1, 2, 2, 1), value=9.0).to(memory_format=torch.channels_last)
        return larger[:, :, 2:-1, 1:-2]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and x.dim():
        return torch.stack((x, x), -1)[..., 0]
    return x.clone()


def check(
    fused: Callable[..., Tensor | tuple[Tensor, Tensor]],
    reference: Callable[..., Tensor | tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    device: torch.device,
    *,
    differentiable: tuple[int, ...] = (0,),
    terms: tuple[float, float] = (1.0, 0.0),
) -> None:
    """Loss (the first result), a second result without a gradient, and the gradients of the `differentiable` inputs.

    terms: size of the terms that the loss and an entry of the gradient are sums of; where they cancel, the tolerance is
    a share of them.
    """
    mine = [x.to(device) for x in inputs]  # keeps strides
    wide = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    for i in differentiable:
        mine[i] = mine[i].detach().requires_grad_()
        wide[i].requires_grad_()
    with backend.use("triton"):
        result = fused(*mine)
    expected = reference(*wide)
    loss, expected_loss = (x[0] if isinstance(x, tuple) else x for x in (result, expected))
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=LOSS, atol=LOSS * terms[0])
    if isinstance(result, tuple):
        assert result[1].dtype == torch.float32 and not result[1].requires_grad
        torch.testing.assert_close(result[1].cpu().double(), expected[1].detach(), rtol=5e-6, atol=5e-6)
    gradients = torch.autograd.grad(loss * UPSTREAM, [mine[i] for i in differentiable])
    expected_gradients = torch.autograd.grad(expected_loss * UPSTREAM, [wide[i] for i in differentiable])
    for i, gradient, wanted in zip(differentiable, gradients, expected_gradients, strict=True):
        assert gradient.dtype == inputs[i].dtype and gradient.shape == inputs[i].shape
        greatest = max(terms[1] * UPSTREAM, float(wanted.abs().max()) if wanted.numel() else 0.0)
        least = SUBNORMAL if inputs[i].dtype == torch.float16 else 0.0
        tolerance = max(GRADIENT[inputs[i].dtype] * greatest, least)
        torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=GRADIENT[inputs[i].dtype], atol=tolerance)


def close(value: Tensor, expected: object) -> None:
    """Assert what an oracle says, to an absolute 2e-6."""
    torch.testing.assert_close(value.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)
