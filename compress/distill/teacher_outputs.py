"""One pass through the teacher for all methods of a step, no further than they look.

A method says what it looks at (`Method.looks_at`): the pyramid maps, the predictions of the head, or both. The backbone
runs once a batch, and the head only where an active method looks at its predictions. UET looks at the maps, and draws
the predictions of its hosts from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn, cast

import torch
from torch import Tensor

from compress.detectors.base import Capability, DensePrediction, Detector
from compress.distill.method import Method, Outputs
from deploy.core.errors import UserError


def looked_at(methods: Iterable[Method]) -> frozenset[Capability]:
    """What some of the methods look at; see `Method.looks_at`."""
    return frozenset[Capability]().union(*(method.looks_at for method in methods))


@torch.no_grad()
def run_teacher(teacher: Detector, images: Tensor, parts: frozenset[Capability]) -> Outputs:
    """Features and predictions of `teacher`, without gradient.

    Args:
        images: uint8 RGB [B, 3, H, W] on the teacher's device.
        parts: the head runs only if DENSE is among them.
    """
    features = teacher.features(images)
    prediction = teacher.predict(features) if Capability.DENSE in parts else unasked_prediction(teacher)
    return Outputs(features, prediction, teacher)


def unasked_prediction(teacher: Detector) -> DensePrediction:
    """Stands for predictions that no method asked for: it knows its strides, and looking at more is a UserError."""
    return cast(DensePrediction, _Unasked(teacher.strides))


# --- details --------------------------------------------------------------------------------------------


class _Unasked:
    def __init__(self, strides: tuple[int, ...]) -> None:
        self.strides = strides

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        raise UserError(
            "methods: one looks at the teacher's predictions, for which its head did not run; add Capability.DENSE to "
            "the method's `needs`"
        )
