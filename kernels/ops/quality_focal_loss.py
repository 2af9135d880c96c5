"""Quality focal loss of GFL (Li et al. 2020, equation 2), summed, with the gradient left by the forward pass.

    L = sum_{b,m,c} v[b,m] * BCE(z, y) * |y - sigmoid(z)|^beta

y[b, c, m] is the IoU quality where c is the label of a positive location, 0 everywhere else, and constant;
gradient flows through the modulating factor |y - sigmoid(z)|^beta as well, and is 0 where y = sigmoid(z). Because y is
zero almost everywhere the loss is one dense pass for y = 0 plus a correction at the P positive entries: no target
tensor is built. The loss is a scalar of the batch, so backward is one multiplication by the upstream gradient. On CUDA
both parts are Triton kernels: the logits are read once and the gradient is written once.

Shape letters: B images, K classes, M locations of a level, P positives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.focal import power, power_slope
from kernels.common.left_gradient import kept_dtype, kept_like, register_backward
from kernels.common.logits import dense
from kernels.common.rows import compiled_once


def quality_focal_loss(
    logits: Tensor,
    index: Tensor,
    labels: Tensor,
    quality: Tensor,
    weight: Tensor,
    *,
    beta: float = 2.0,
    compiled: bool = False,
) -> Tensor:
    """Summed quality focal loss; divide it by the number of positives yourself.

    Args:
        logits: float [B, K, M], class-quality logits, with either M or K inside; computed in float32.
        index: int64 [P], flat location b * M + m of every positive; no location twice.
        labels: int64 [P], class of every positive.
        quality: float [P] in 0..1, IoU of the predicted box with its ground truth; no gradient.
        weight: float [B, M], v: 1 for a location that counts, 0 for one that does not.
        beta: exponent of the modulating factor, > 0.
        compiled: run the dense PyTorch pass through torch.compile.

    Returns:
        Scalar float32 tensor. Gradient reaches `logits` only.

    Raises:
        ValueError: the shapes do not agree.
        IndexError: a location or a class is out of range, on the CPU. On a GPU nothing waits to look: there the Triton
            kernel gives the loss NaN, and the entries of the logits that are named rightly their gradients.
    """
    B, K, M = logits.shape
    if weight.shape != (B, M):
        raise ValueError(f"weight must be {[B, M]} for logits {[B, K, M]}, got {list(weight.shape)}")
    if not index.shape == labels.shape == quality.shape:
        raise ValueError(f"index, labels, quality differ: {index.shape}, {labels.shape}, {quality.shape}")
    backend = backends.chosen(logits)
    if backend == "triton":
        logits = dense(logits)
    elif logits.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(index, B * M, "index")
        _check_range(labels, K, "labels")
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    positives = index.contiguous(), labels.contiguous(), quality.detach().contiguous()
    weight = weight.detach().contiguous()
    return _quality_focal_loss(logits, *positives, weight, beta, with_gradient, compiled, backend)[0]


def reference(
    logits: Tensor, index: Tensor, labels: Tensor, quality: Tensor, weight: Tensor, beta: float = 2.0
) -> Tensor:
    """The specification: dense targets and autograd. Same arguments and result as `quality_focal_loss`."""
    B, K, M = logits.shape
    target = torch.zeros_like(logits).transpose(1, 2).reshape(B * M, K)
    target[index, labels] = quality.to(target.dtype)
    target = target.reshape(B, M, K).transpose(1, 2)
    factor = power((target - logits.sigmoid()).abs(), beta)
    rows = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * factor).sum(1)  # [B, M]
    return (rows * weight).sum()


def _check_range(places: Tensor, size: int, name: str) -> None:
    """Negative ones, too, which PyTorch would count from the end."""
    if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < size):
        raise IndexError(f"{name} must be in 0..{size - 1}, got {int(places.min())}..{int(places.max())}")


def _negative(logits: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient with y = 0 everywhere: BCE = softplus(z), factor = s^beta."""
    s = logits.sigmoid()
    bce = F.softplus(logits)
    factor = s.square() if beta == 2.0 else s.pow(beta)
    v = weight.unsqueeze(1)
    loss = (bce * factor).sum(1).mul_(weight).sum()
    # d/dz = s * s^beta + softplus * beta * s^(beta-1) * s * (1 - s) = s^beta * (s + beta * softplus * (1 - s))
    grad = factor * (s + beta * bce * (1 - s)) * v
    return loss, grad


def _negative_beta2(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`_negative` for beta 2 with as few passes over memory as eager mode allows."""
    s = z.sigmoid()
    bce = F.softplus(z)
    grad = (1 - s).mul_(bce).mul_(2).add_(s)  # s + 2 * bce * (1 - s)
    factor = s.square_()
    grad.mul_(factor).mul_(weight.unsqueeze(1))
    loss = torch.dot(bce.mul_(factor).sum(1).flatten(), weight.flatten())
    return loss, grad


def _loss_and_gradient(
    z: Tensor, index: Tensor, labels: Tensor, y: Tensor, weight: Tensor, beta: float, compiled: bool
) -> tuple[Tensor, Tensor]:
    """The dense pass with y = 0, then the positives put right."""
    if compiled:
        loss, grad = compiled_once(_negative)(z, weight, beta)
    elif beta == 2.0:
        loss, grad = _negative_beta2(z, weight)
    else:
        loss, grad = _negative(z, weight, beta)
    M = z.shape[2]
    b, m = index // M, index % M
    z_p, v_p = z[b, labels, m], weight[b, m]
    s = z_p.sigmoid()
    bce = F.softplus(z_p) - y * z_p
    difference = (s - y).abs()
    factor = difference.pow(beta)
    slope = power_slope(difference, beta) * (s - y).sign() * s * (1 - s)
    negative = F.softplus(z_p) * s.pow(beta)
    loss = loss + (v_p * (bce * factor - negative)).sum()
    grad[b, labels, m] = v_p * ((s - y) * factor + bce * slope)
    return loss, grad


# --- registration ------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::quality_focal_loss", mutates_args=())
def _quality_focal_loss(
    logits: Tensor,
    index: Tensor,
    labels: Tensor,
    quality: Tensor,
    weight: Tensor,
    beta: float,
    with_gradient: bool,
    compiled: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss, gradient."""
    if backend == "triton":
        from kernels.triton import quality_focal_loss as kernel

        return kernel.quality_focal_loss(logits, index, labels, quality, weight, beta, with_gradient)
    z, y = logits.float(), quality.float()
    loss, grad = _loss_and_gradient(z, index, labels, y, weight.float(), beta, compiled)
    return loss, grad.to(kept_dtype(logits.dtype)) if with_gradient else logits.new_empty(0)


@_quality_focal_loss.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), kept_like(logits, others[5])


register_backward(_quality_focal_loss, {1: 0})
