"""Losses that keep their gradient from the forward pass: what loss scaling finds in float16, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.common import backend
from kernels.ops import binary_kd_loss as kd
from kernels.ops import distribution_iou_loss as dist_iou
from kernels.ops import iou_loss as iou
from kernels.ops import quality_focal_loss as qfl

SCALE = 65536.0  # where GradScaler starts; greater than float16 can hold
SMALLEST = 2.0**-24  # of float16

Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]


def cases() -> dict[str, Case]:
    """Operator, its reference, and inputs in float16 whose gradients are below what float16 can hold."""
    g = torch.Generator().manual_seed(0)
    corner, side = torch.randint(0, 30, (5, 2), generator=g), torch.randint(20, 50, (2, 5, 2), generator=g)
    boxes = torch.cat((corner, corner + side[0]), 1)
    logits = torch.randn(2, 8, 3, generator=g)
    index, labels = torch.tensor([1, 4]), torch.tensor([0, 7])
    made: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
        "iou_loss": (iou.iou_loss, iou.reference, (boxes, torch.cat((corner + 3, corner + side[1]), 1))),
        "binary_kd_loss": (kd.binary_kd_loss, kd.reference, (logits - 7, logits.flip(2) - 7)),
        "quality_focal_loss": (qfl.quality_focal_loss, qfl.reference, (logits - 8, index, labels, index / 5)),
        "distribution_iou_loss": (
            dist_iou.distribution_iou_loss,
            dist_iou.reference,
            (logits.reshape(6, 4, 2), *(torch.tensor([x]).expand(6, -1) for x in ([0.5, 1.5], [0.2, 0.9, 1.5, 2.0]))),
        ),
        "distribution_iou_kd_loss": (
            dist_iou.distribution_iou_kd_loss,
            dist_iou.kd_reference,
            (logits, logits.flip(2)),
        ),
    }
    rows = {"iou_loss": (5,), "distribution_iou_loss": (6,)}
    weights = {"binary_kd_loss": 1e-3, "quality_focal_loss": 1.0}
    found = {}
    for name, (function, reference, inputs) in made.items():
        weight = torch.rand(rows.get(name, (2, 3)), generator=g).add(0.5) * weights.get(name, 5e-8)
        if name == "quality_focal_loss":
            weight.view(-1)[index] *= 1e-7  # positives have large gradients
        halves = [x.half() if x.is_floating_point() or name == "iou_loss" else x for x in inputs]
        found[name] = (function, reference, [*halves, weight])
    return found


CASES = cases()


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_small_gradients_of_float16_outlive_the_scale(name: str, path: backend.Backend, device: torch.device) -> None:
    function, reference, inputs = CASES[name]
    leaf, *others = (x.to(device) for x in inputs)
    wide, *wide_others = (x.double() if x.is_floating_point() else x for x in inputs)
    leaf, wide = leaf.clone().requires_grad_(), wide.requires_grad_()
    with backend.use(path):
        loss = function(leaf, *others)
    loss, expected = (x[0] if isinstance(x, tuple) else x for x in (loss, reference(wide, *wide_others)))
    (gradient,), (wanted,) = torch.autograd.grad(loss * SCALE, leaf), torch.autograd.grad(expected * SCALE, wide)
    assert gradient.dtype == torch.float16
    below = (wanted / SCALE).abs() < SMALLEST / 2
    assert below.double().mean() > 0.5 and wanted[below].abs().max() > 100 * SMALLEST, "nothing is tested"
    torch.testing.assert_close(gradient.cpu().double(), wanted, rtol=2e-3, atol=2 * SMALLEST)


def test_the_number_that_was_lost(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for path in ("torch", "triton"):
        z = torch.full((1, 1, 1), -7.0, dtype=torch.float16, device=device).requires_grad_()
        with backend.use(path):  # type: ignore[arg-type]
            loss = qfl.quality_focal_loss(z, none, none, none.float(), torch.ones(1, 1, device=device))
        (loss * SCALE).backward()
        assert z.grad is not None and float(z.grad) == pytest.approx(1.486e-4, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name: str, device: torch.device) -> None:
    function, _, inputs = CASES[name]
    leaf, *others = (x.to(device) for x in inputs)
    leaf = leaf.float().requires_grad_()
    others = [x.float() if x.is_floating_point() else x for x in others]
    for path in ("triton", "torch") if name in ("binary_kd_loss", "quality_focal_loss") else ("triton",):
        with backend.use(path):  # type: ignore[arg-type]
            loss = function(leaf, *others)
        loss = loss[0] if isinstance(loss, tuple) else loss
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, leaf, create_graph=True, retain_graph=True)
        torch.autograd.grad(loss, leaf)
