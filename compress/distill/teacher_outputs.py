"""One pass through the teacher for all methods of a step, no further than they look.

A method says what it looks at (`Method.looks_at`): the pyramid maps, the predictions of the head, or both. The backbone
runs once a batch, and the head only where an active method looks at its predictions. UET looks at the maps, and draws
the predictions of its hosts from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from compress.detectors.base import Capability, DensePrediction, Detector
from compress.distill.method import Method, Outputs
from deploy.core.errors import UserError

Parts = frozenset[Capability]
"""Of a teacher's outputs: FEATURES for the maps, DENSE for the predictions."""


def looked_at(methods: Iterable[Method]) -> Parts:
    """What some of the methods look at; see `Method.looks_at`."""
    return Parts().union(*(method.looks_at for method in methods))


@torch.no_grad()
def run_teacher(teacher: Detector, images: Tensor, parts: Parts) -> Outputs:
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
    return cast(DensePrediction, _Unasked("predictions", Capability.DENSE, teacher.strides))


def unasked_features() -> list[Tensor]:
    """Stands for maps that no method asked for; looking at them is a UserError."""
    return cast(list[Tensor], _Unasked("features", Capability.FEATURES))


# --- details --------------------------------------------------------------------------------------------


class _Unasked:
    def __init__(self, what: str, need: Capability, strides: tuple[int, ...] = ()) -> None:
        self._what, self._need, self.strides = what, need, strides

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        raise UserError(
            f"methods: one looks at the teacher's {self._what} and does not say so; add Capability.{self._need.name} "
            "to its `needs`"
        )

    def __getitem__(self, key: Any) -> NoReturn:
        self.__getattr__("items")

    def __iter__(self) -> NoReturn:
        self.__getattr__("items")

    def __len__(self) -> NoReturn:
        self.__getattr__("items")
