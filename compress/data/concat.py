"""Several sets of labelled images as one to train on, all with the same classes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from compress.data.batch import Target
from compress.data.coco import CocoDetection


class TrainingImages(Protocol):
    """Images that `compress.data.loader.train_loader` reads."""

    @property
    def aspect_ratios(self) -> np.ndarray:
        """float32 [len(self)], width / height."""
        ...

    def __len__(self) -> int: ...

    def network_sizes(self) -> list[tuple[int, int]]:
        """(height, width) that each image has after its transform, at most; pixels."""
        ...

    def outcomes(self) -> float:
        """How many different images the transform can make of one; infinity: countless."""
        ...

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]: ...


class ConcatDataset(Dataset[tuple[Tensor, Target]]):
    """The images of all `parts`, one part after the other; keys are those of `CocoDetection`.

    Each target keeps what its own part says: which classes were looked for, scores, uncertain regions.
    """

    def __init__(self, parts: Sequence[CocoDetection]) -> None:
        if len({(part.categories, part.category_ids) for part in parts}) != 1:
            raise ValueError("sets of images to be joined must have the same categories")
        self.parts = list(parts)
        self.aspect_ratios = np.concatenate([part.aspect_ratios for part in parts])
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def network_sizes(self) -> list[tuple[int, int]]:
        return [size for part in self.parts for size in part.network_sizes()]

    def outcomes(self) -> float:
        return max(part.outcomes() for part in self.parts)

    @property
    def num_boxes(self) -> int:
        return sum(part.num_boxes for part in self.parts)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        index = key[0] if isinstance(key, tuple) else key
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        index -= self._ends[number - 1] if number else 0
        return self.parts[number][(index, key[1]) if isinstance(key, tuple) else index]
