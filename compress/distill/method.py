"""The contract of a distillation method: student and teacher outputs in, named loss terms out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from compress.data.batch import Batch
from compress.detectors.base import Capability, DensePrediction
from compress.detectors.gfl import Targets


@dataclass
class Outputs:
    """What a model made of a batch: pyramid maps, dense prediction, and (for the student) its targets."""

    features: list[Tensor]
    prediction: DensePrediction
    targets: Targets | None = None


class Method(nn.Module, ABC):
    """One way of learning from a teacher. Several methods add up.

    A method owns what it has to train (adapters); its parameters go to the optimizer and to the checkpoint for
    resuming, and never into the student that ships.
    """

    needs: frozenset[Capability] = frozenset()

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Weighted scalar terms, float32. The names appear in the logs; the sum is added to the detection loss.

        The teacher's tensors carry no gradient.
        """
