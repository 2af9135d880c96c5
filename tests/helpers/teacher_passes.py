"""Count what of a teacher runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.detectors.base import Detector


class Passes:
    """Calls of a teacher's parts while the context lasts. features: of the backbone and neck. head: of `predict`."""

    def __init__(self, teacher: Detector) -> None:
        self.features = self.head = 0
        self._teacher = teacher

    def __enter__(self) -> Passes:
        features, predict = self._teacher.features, self._teacher.predict

        def counted_features(images: Tensor) -> list[Tensor]:
            self.features += 1
            return features(images)

        def counted_head(maps: list[Tensor]) -> Any:
            self.head += 1
            return predict(maps)

        self._teacher.features, self._teacher.predict = counted_features, counted_head  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._teacher.features, self._teacher.predict
