"""MGD: masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529).

For each pyramid level, S the adapted student map and T the teacher's, both [B, C, h, w]:

    m ~ Bernoulli(1 - masked)  [B, 1, h, w],   G = 3×3 convolution, ReLU, 3×3 convolution (C → C → C, with bias)
    L = alpha * sum (G(m * S) - T)^2 / B,  summed over levels

From a part of its locations the student has to generate the whole map of the teacher. The sum runs over channels and
locations and is divided only by the images B of this process. Detached: the teacher. G is trained, one a level, and
thrown away with the adapters.

Published settings: alpha 2e-5 and masked 0.65 on five levels for RetinaNet and RepPoints, 5e-7 and 0.45 on four levels
for Faster and Mask R-CNN; with a student that inherits the teacher's neck and head (one-stage detectors), and
gradients clipped at a norm of 35. Equation and constants are confirmed against the authors' code, which has none for
GFL. Ours: certainty weighs the squared differences; masks are a function of (seed, process, number of passes so far,
level) on a device, so that a resumed run sees the masks that it would have seen.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.config.methods import Mgd
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Adapter, BuildContext, Method, Outputs, weigh


class MGD(Method):
    """Masked generative distillation of pyramid maps.

    Args:
        student_channels, teacher_channels: widths of the two pyramids.
        levels: pyramid maps that take part, the finest first.
        weight: factor on the loss.
        adapter: 1×1 convolutions on the student's maps; auto: only where the widths differ.
        alpha: the published constant.
        masked: share of the locations that are masked (lambda in the paper).
        seed: of the masks.
    """

    needs = frozenset({Capability.FEATURES})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        levels: int,
        adapter: Literal["auto", "always"],
        alpha: float,
        masked: float,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.weight = weight * alpha
        self.masked = masked
        self.seed = seed
        self.passes = 0
        self.adapter = Adapter(student_channels, teacher_channels, levels, always=adapter == "always")
        self.generation = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            )
            for _ in range(levels)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        student_maps = self.adapter(student.features[: self.levels])
        teacher_maps = teacher.features[: self.levels]
        total = student_maps[0].new_zeros(())
        masks = self.masks(student_maps)
        for level, (s, t, m) in enumerate(zip(student_maps, teacher_maps, masks, strict=True)):
            certainty = None if teacher.certainty is None else teacher.certainty[level]
            total = total + generation_distance(self.generation[level](s * m), t.detach().float(), certainty)
        return {"mgd": self.weight * total}

    def masks(self, maps: list[Tensor]) -> list[Tensor]:
        """The masks of this pass, 1 = kept, a level [B, 1, h, w]; the next call gives others."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        generator = torch.Generator(maps[0].device)
        # the CPU's generator reads 32 bits of its seed: these are well mixed
        generator.manual_seed(int(np.random.SeedSequence([self.seed, rank, self.passes]).generate_state(1)[0]))
        self.passes += 1
        shapes = [(x.shape[0], 1, *x.shape[2:]) for x in maps]
        uniform = [torch.rand(shape, generator=generator, device=maps[0].device) for shape in shapes]
        return [(u <= 1 - self.masked).to(x.dtype) for u, x in zip(uniform, maps, strict=True)]

    def get_extra_state(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


def build(settings: Mgd, context: BuildContext) -> MGD:
    """The method of a recipe."""
    return MGD(*context.channels, **settings.constants(), weight=context.weight, seed=context.seed)


def generation_distance(generated: Tensor, teacher: Tensor, certainty: Tensor | None = None) -> Tensor:
    """sum (generated - teacher)^2 / B, a scalar in the dtype of the maps [B, C, h, w]; certainty: [B, h, w] or None."""
    assert generated.shape == teacher.shape, f"maps differ in shape: {tuple(generated.shape)}, {tuple(teacher.shape)}"
    return weigh((generated - teacher).square(), certainty).sum() / generated.shape[0]
