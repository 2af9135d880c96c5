"""Binary classification distillation of BCKD (Yang et al., ICCV 2023, section 3.2), summed.

    t = sigmoid(z_t), constant;  s = sigmoid(z_s)
    L = sum_{b,m} v[b,m] * sum_c BCE(z_s, t) * |t - s|^beta

over positive and negative locations alike; gradient flows through the modulating factor |t - s|^beta and is 0 where
t = s (with beta < 1 it is infinite beside that).
The same pass emits d[b, m] = max_c |t - s|, which weighs BCKD's localisation term. As in
`quality_focal_loss`, forward leaves the gradient behind and backward is one multiplication. On CUDA one Triton kernel
does all of it: it reads both logits once and writes the gradient once.

Shape letters: B images, K classes, M locations of a level.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common import backend as backends
from kernels.common.focal import power, power_slope
from kernels.common.left_gradient import kept_dtype, kept_like, register_backward
from kernels.common.logits import same_layout
from kernels.common.rows import compiled_once


def binary_kd_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, *, beta: float = 1.0, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Summed binary distillation loss, and how far the two models disagree.

    Args:
        student: float [B, K, M] logits, with either M or K inside (maps that are channels last); computed in float32.
        teacher: float [B, K, M] logits; no gradient.
        weight: float [B, M], v: 1 for a location that counts, 0 for one that does not.
        beta: exponent of the modulating factor, > 0; the paper's is 1.
        compiled: run the PyTorch pass through torch.compile.

    Returns:
        Scalar float32 loss (gradient reaches `student` only), and the disagreement max_c |t - s| as float32
        [B, M] without gradient, not multiplied by `weight`.

    Raises:
        ValueError: the shapes do not agree.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} logits differ in shape")
    if weight.shape != (student.shape[0], student.shape[2]):
        raise ValueError(f"weight must be [B, M] of {list(student.shape)}, got {list(weight.shape)}")
    backend = backends.chosen(student)
    if backend == "triton":
        student, teacher = same_layout(student, teacher)
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    inputs = student, teacher.detach(), weight.detach().contiguous()
    loss, disagreement, _ = _binary_kd_loss(*inputs, beta, with_gradient, compiled, backend)
    return loss, disagreement.detach()


def reference(student: Tensor, teacher: Tensor, weight: Tensor, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """The specification, by autograd. Same arguments and results as `binary_kd_loss`."""
    t = teacher.detach().sigmoid()
    difference = (t - student.sigmoid()).abs()
    rows = F.binary_cross_entropy_with_logits(student, t, reduction="none") * power(difference, beta)
    return (rows.sum(1) * weight).sum(), difference.detach().amax(1)


def _loss_and_gradient(z: Tensor, teacher: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    s, t = z.sigmoid(), teacher.sigmoid()
    signed = s - t
    difference = signed.abs()
    bce = F.softplus(z) - t * z
    if beta == 1.0:
        factor, slope = difference, signed.sign()
    else:
        factor, slope = difference.pow(beta), power_slope(difference, beta) * signed.sign()
    v = weight.unsqueeze(1)
    loss = ((bce * factor).sum(1) * weight).sum()
    grad = (signed * factor + bce * slope * s * (1 - s)) * v
    return loss, difference.amax(1), grad


def _loss_and_gradient_eager(z: Tensor, teacher: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_loss_and_gradient` in few maps: fresh memory costs eager code on a CPU more than arithmetic."""
    s, t = z.sigmoid(), teacher.sigmoid()
    bce = F.softplus(z).addcmul_(t, z, value=-1)
    signed = torch.sub(s, t, out=t)
    difference = signed.abs()
    disagreement = difference.amax(1)
    slope = signed.sign()
    if beta != 1.0:
        slope.mul_(power_slope(difference, beta))
        difference.pow_(beta)
    loss = (torch.mul(bce, difference).sum(1) * weight).sum()
    steepness = s.addcmul_(s, s, value=-1)
    grad = signed.mul_(difference).addcmul_(bce.mul_(slope), steepness).mul_(weight.unsqueeze(1))
    return loss, disagreement, grad


# --- registration ------------------------------------------------------------------------------------------------


@torch.library.custom_op("detector_kernels::binary_kd_loss", mutates_args=())
def _binary_kd_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, beta: float, with_gradient: bool, compiled: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, disagreement, gradient."""
    if backend == "triton":
        from kernels.triton import binary_kd_loss as kernel

        return kernel.binary_kd_loss(student, teacher, weight, beta, with_gradient)
    run = compiled_once(_loss_and_gradient) if compiled else _loss_and_gradient_eager
    loss, disagreement, grad = run(student.float(), teacher.float(), weight.float(), beta)
    return loss, disagreement, grad.to(kept_dtype(student.dtype)) if with_gradient else student.new_empty(0)


@_binary_kd_loss.register_fake
def _(student: Tensor, teacher: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, _, M = student.shape
    loss, disagreement = student.new_empty((), dtype=torch.float32), student.new_empty(B, M, dtype=torch.float32)
    return loss, disagreement, kept_like(student, settings[1])


register_backward(_binary_kd_loss, {2: 0})
