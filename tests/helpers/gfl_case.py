"""CASE-G: two images, two levels, three classes; the input of all head-level oracles."""

from __future__ import annotations

import torch

from compress.data.batch import Target
from compress.detectors.backbones import build_backbone
from compress.detectors.base import DensePrediction
from compress.detectors.gfl import GFL
from compress.distill.method import Outputs
from tests.oracles import sine

SIZES = ((16, 16), (8, 8))


def prediction(kind: str, *, shift: float = 0.0) -> DensePrediction:
    """`student` or `teacher` outputs; `shift` is added to the class logits. Leaves that require grad."""
    a_cls, c_cls, d_cls, a_reg, c_reg = (1.5, 0.1, -2.0, 2.0, 0.5) if kind == "student" else (1.8, 0.4, -1.8, 2.2, 0.9)
    logits, distribution = [], []
    for level, (h, w) in enumerate(SIZES):
        z = sine((2, 3, h, w), a_cls, 0.37, c_cls + 0.7 * level, d_cls).float() + shift
        r = sine((2, 68, h, w), a_reg, 0.23, c_reg + 0.7 * level).float()
        logits.append(z.requires_grad_())
        distribution.append(r.requires_grad_())
    return DensePrediction(logits, distribution, (8, 16))


def targets() -> list[Target]:
    def one(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> Target:
        n = len(labels)
        return Target(
            boxes=torch.tensor(boxes), labels=torch.tensor(labels), ignore=torch.zeros(n, dtype=torch.bool),
            scores=None, image_id=0, size=size, original_size=size,
        )  # fmt: skip

    return [
        one([[4.3, 6.1, 84.9, 80.2], [10.7, 20.2, 122.1, 126.9]], [0, 2], (128, 128)),
        one([[8.2, 5.3, 88.9, 58.1]], [1], (60, 96)),
    ]


def detector() -> GFL:
    return GFL(3, build_backbone("nano", weights="none", frozen_stages=-1), neck_channels=32, head_depth=1)


def outputs() -> tuple[Outputs, Outputs]:
    """Student (with targets) and teacher; without feature maps."""
    model, student, teacher = detector(), prediction("student"), prediction("teacher")
    targets_ = model.assign(student, targets())
    return Outputs([], student, model, targets_), Outputs([], teacher.detach(), model)


def close(value: torch.Tensor, expected: object) -> None:
    """Assert what an oracle says; they are printed with six decimals and were made in float32."""
    torch.testing.assert_close(value.detach().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)
