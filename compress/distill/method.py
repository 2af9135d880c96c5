"""The contract of a distillation method: student and teacher outputs in, named loss terms out.

Shape letters of this package: see `compress.detectors.base`; C_s and C_t are the widths of the two pyramids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from compress.data.batch import Batch
from compress.detectors.base import Capability, DensePrediction, Detector, Targets, decode_level
from compress.detectors.queries import Queries, QueryPrediction

BOTH = frozenset({Capability.FEATURES, Capability.DENSE})
"""All that a teacher's `Outputs` have."""


@dataclass
class Outputs:
    """Features and predictions of a model for a batch.

    features: pyramid maps, a level each [B, C, h, w].
    prediction: of the dense head, or a `QueryPrediction`; without either (Faster R-CNN), nothing that a method can use.
        Of the teacher only where a method looks at it (`Method.looks_at`).
    detector: the model itself, for methods that run parts of it again.
    targets: the student's assignment and normalisers (None for the teacher).
    certainty: of the teacher, weights [B, h, w] a level with mean 1 over the batch, constant; a method multiplies
        what it asks at a location by it. None: 1 everywhere. (UET's MC-dropout variance sets it.)
    """

    features: list[Tensor]
    prediction: DensePrediction
    detector: Detector
    targets: Targets | None = None
    certainty: list[Tensor] | None = None
    _layers: dict[int, tuple[Queries, list[QueryPrediction]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def queries(self) -> QueryPrediction:
        """The prediction of a model with Capability.QUERIES."""
        return cast(QueryPrediction, self.prediction)

    def at(self, queries: Queries) -> list[QueryPrediction]:
        """What each layer of the decoder says of queries that begin where those do, the last one last; methods that ask
        for the same ones share one pass."""
        if id(queries) not in self._layers:
            self._layers[id(queries)] = queries, self.detector.predict_at(self.features, queries)
        return self._layers[id(queries)][1]


class Method(nn.Module, ABC):
    """One way of learning from a teacher, or from another model that it brings. Several methods add up.

    A method owns what it has to train (adapters); its parameters go to the optimizer and to the checkpoint for
    resuming, and never into the student that ships.
    """

    needs: frozenset[Capability] = frozenset()
    needs_teacher: ClassVar[bool] = True
    """Whether it compares with the teacher. One that does not is given None in its place, asks what it `needs` of the
    student alone, and works where there is no teacher."""

    @property
    def looks_at(self) -> frozenset[Capability]:
        """What it reads of the teacher's outputs: FEATURES for the maps, DENSE for all that the head gives. A method
        that says nothing about its needs is given both."""
        if not self.needs_teacher:
            return frozenset()
        head = frozenset({Capability.DENSE}) if self.needs - {Capability.FEATURES} else frozenset()
        return self.needs & {Capability.FEATURES} | head or BOTH

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Weighted scalar terms, float32. The names appear in the logs; the sum is added to the detection loss.

        The teacher's tensors carry no gradient.
        """

    def observations(self) -> dict[str, Tensor]:
        """Scalars for the logs that are no loss terms; of the last forward pass that made them."""
        return {}


@dataclass(frozen=True)
class BuildContext:
    """Models and circumstances that a method is built with, besides its settings.

    student, teacher: the models; teacher None: the method needs none. weight: factor on all terms. seed: of what the
    method draws at random. compiled: run dense passes through torch.compile, where the method can.
    """

    student: Detector
    teacher: Detector | None
    weight: float
    seed: int
    compiled: bool

    @property
    def channels(self) -> tuple[int, int]:
        """C_s and C_t."""
        assert self.teacher is not None, "asked by methods that need one"
        return self.student.feature_channels, self.teacher.feature_channels


class Adapter(nn.Module):
    """Student features → the teacher's width: one 1×1 convolution a level, or nothing where the widths agree.

    Args:
        student_channels, teacher_channels: C_s and C_t.
        levels: number of pyramid levels.
        always: convolve even where the widths agree. UET with `combine: sum` asks for features twice as large as
            the teacher's head knows; a convolution takes up that factor.
    """

    def __init__(self, student_channels: int, teacher_channels: int, levels: int, *, always: bool = False) -> None:
        super().__init__()
        self.convs: nn.ModuleList | None = None
        if always or student_channels != teacher_channels:
            self.convs = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 1) for _ in range(levels))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[B, C_s, h, w] a level → float32 [B, C_t, h, w]."""
        features = [x.float() for x in features]
        return features if self.convs is None else [conv(x) for conv, x in zip(self.convs, features, strict=True)]


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor without gradient over all processes; in a single one itself."""
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def processes() -> int:
    """How many processes share the global batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def boxes_in_strides(model: Outputs, prediction: DensePrediction) -> list[Tensor]:
    """The boxes of a prediction of `model` in units of the stride: [B, M, 4] xyxy a level."""
    if prediction.distribution:
        return [decode_level(x) for x in prediction.distribution]
    levels = model.detector.decode_boxes(prediction).split(prediction.counts, 1)
    return [boxes / stride for boxes, stride in zip(levels, prediction.strides, strict=True)]


def at_places(certainty: Tensor, anchors: int) -> Tensor:
    """[B, h, w] → [B, M]: every prediction of a location has the location's certainty."""
    values = certainty.flatten(1)
    return values if anchors == 1 else values.repeat_interleave(anchors, 1)


def weigh(values: Tensor, certainty: Tensor | None) -> Tensor:
    """Multiply `values` [B, h, w] or [B, C, h, w] by the certainty [B, h, w] of their locations."""
    if certainty is None:
        return values
    return values * (certainty.unsqueeze(1) if values.dim() == 4 else certainty)
