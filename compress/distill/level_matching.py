"""Matching of the levels of two pyramids: feature methods between detectors of different strides.

Levels belong together if their strides differ by less than half an octave, each with the nearest. Methods see only
these; the student's map is resized to the teacher's grid (bilinear) where the grids differ. A single level in common of
two pyramids is none to learn from, and is refused; a detector with one map has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from compress.data.batch import Batch
from compress.distill.method import Method, Outputs
from deploy.core.errors import UserError

FEWEST = 2  # levels in common
HALF_OCTAVE = 0.5


def match_levels(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (level of the student, level of the teacher) of two lists of rising strides, the finest first.

    Raises UserError where fewer than two belong together, or none of a model that has but one.
    """
    fewest = min(FEWEST, len(student), len(teacher))
    distance = {
        (i, j): abs(math.log2(ours / theirs)) for i, ours in enumerate(student) for j, theirs in enumerate(teacher)
    }
    pairs: list[tuple[int, int]] = []
    for i, j in sorted(distance, key=lambda pair: distance[pair]):
        if distance[i, j] < HALF_OCTAVE and all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    if len(pairs) < fewest:
        levels = "2 levels" if fewest == FEWEST else "a level"
        raise UserError(
            f"methods: those on features need {levels} of about the same stride: the student's are "
            f"{_listed(student)}, the teacher's {_listed(teacher)}"
        )
    return sorted(pairs)


def describe(student: Sequence[int], teacher: Sequence[int]) -> str | None:
    """A line about levels that are left out or resized; None where both pyramids are alike."""
    if tuple(student) == tuple(teacher):
        return None
    pairs = match_levels(student, teacher)
    compared = ", ".join(
        str(student[i]) if student[i] == teacher[j] else f"{student[i]} resized to {teacher[j]}" for i, j in pairs
    )
    parts = [f"feature methods compare the levels of stride {compared}"]
    for whom, strides, used in (
        ("student's", student, [i for i, _ in pairs]),
        ("teacher's", teacher, [j for _, j in pairs]),
    ):
        left = [stride for level, stride in enumerate(strides) if level not in used]
        if left:
            parts.append(f"the {whom} of stride {_listed(left)} take no part")
    return "; ".join(parts)


class LevelMatched(Method):
    """`host` on the levels that two pyramids have in common.

    Args:
        host: a method on features alone.
        pairs: see `match_levels`.
    """

    def __init__(self, host: Method, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.host = host
        self.needs = host.needs
        self.pairs = tuple(pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        teacher_maps = [teacher.features[j] for _, j in self.pairs]
        student_maps = [_on_grid_of(t, student.features[i]) for (i, _), t in zip(self.pairs, teacher_maps, strict=True)]
        certainty = None if teacher.certainty is None else [teacher.certainty[j] for _, j in self.pairs]
        matched = replace(teacher, features=teacher_maps, certainty=certainty)
        terms: dict[str, Tensor] = self.host(replace(student, features=student_maps), matched, batch)
        return terms

    def observations(self) -> dict[str, Tensor]:
        return self.host.observations()


def _on_grid_of(like: Tensor, x: Tensor) -> Tensor:
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x.float(), like.shape[2:], mode="bilinear", align_corners=False)


def _listed(strides: Sequence[int]) -> str:
    return ", ".join(str(stride) for stride in strides)
