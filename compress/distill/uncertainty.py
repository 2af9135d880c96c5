"""Uncertainty of a teacher: Monte Carlo dropout on its pyramid maps (Gal and Ghahramani 2016, on features as UET).

    s_n = sigmoid(head(Dropout_n(F)))            n = 1..N, F the pyramid maps, scores of every location and class
    u   = std_n s_n[k*],   k* = argmax_k mean_n s_n[k]       a level; population standard deviation, 0 to 0.5
    map = max over levels of u, each level interpolated to the locations of the finest one

The maximum, because an object lives on one or two levels: a mean over five would show it at a fraction of its value.
The class is fixed before the deviation is taken: scores that swap between two classes count as uncertain.

The teachers were not trained with dropout, so this is how far the scores move when a part of the features is missing.
It is no probability of an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.detectors.base import Detector
from kernels.ops.mc_dropout import Dropout, mc_dropout

SAMPLES = 10
RATE = 0.15


@dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of a teacher on B images.

    maps: float32 [B, h, w]; value (x, y) belongs to pixel (x * stride, y * stride) of the network image.
    stride: pixels.
    variance: float32 [B, L], variance of the dropout copies of each level's map, mean over channels and locations.
    """

    maps: Tensor
    stride: int
    variance: Tensor


@torch.no_grad()
def predictive_uncertainty(
    teacher: Detector, images: Tensor, *, samples: int = SAMPLES, rate: float = RATE, seed: int = 0
) -> Uncertainty:
    """Measure how much predictions scatter under dropout: the backbone runs once, the head `samples` times.

    Args:
        teacher: in eval mode; nothing of it is changed.
        images: uint8 RGB [B, 3, H, W] as the loader pads them, on the teacher's device.
        samples: N, at least 2.
        rate: probability to drop an element of a map, in [0, 1).
        seed: of the masks. They depend on seed, sample, level and place of the image in the batch.

    Raises:
        ValueError: the teacher is in training mode, too few samples, or a rate outside of the range.
    """
    if teacher.training:
        raise ValueError("the teacher must be in eval mode: its normalisation would learn from these images")
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    features = teacher.features(images)
    copies = [_Running() for _ in features]
    scores = [_Running() for _ in features]
    for sample in range(samples):
        dropped = []
        for level, x in enumerate(features):
            copy, _ = mc_dropout(x, Dropout((rate,), seed, sample * len(features) + level), variance=False)
            copies[level].add(copy.float())
            dropped.append(copy)
        for running, logits in zip(scores, teacher.predict(dropped).logits, strict=True):
            running.add(logits.float().sigmoid())

    stride = teacher.strides[0]
    height, width = scores[0].mean.shape[2:]
    deviations = [
        _at_locations(_best_class_deviation(running), level_stride / stride, height, width)
        for running, level_stride in zip(scores, teacher.strides, strict=True)
    ]
    variance = torch.stack([running.variance().mean((1, 2, 3)) for running in copies], 1)
    return Uncertainty(torch.stack(deviations).amax(0), stride, variance)


class _Running:
    """Mean and population variance of tensors that come one by one (Welford 1962): equal tensors give exactly 0."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.mean, self._squares = x.clone(), torch.zeros_like(x)
            return
        delta = x - self.mean
        self.mean += delta / self.count
        self._squares += delta * (x - self.mean)

    def variance(self) -> Tensor:
        return self._squares / self.count


def _best_class_deviation(scores: _Running) -> Tensor:
    """[B, K, h, w] → [B, h, w]."""
    best = scores.mean.argmax(1, keepdim=True)
    return scores.variance().gather(1, best).squeeze(1).sqrt()


def _at_locations(values: Tensor, ratio: float, height: int, width: int) -> Tensor:
    """values [B, h, w] at multiples of `ratio` → [B, height, width] at whole numbers; constant beyond the last one."""
    rows = torch.arange(height, device=values.device, dtype=values.dtype) / ratio
    columns = torch.arange(width, device=values.device, dtype=values.dtype) / ratio
    # grid_sample counts from -1 to 1 between the outer edges of the cells: centre i of n lies at (2 i + 1) / n - 1
    y, x = torch.meshgrid((2 * rows + 1) / values.shape[1] - 1, (2 * columns + 1) / values.shape[2] - 1, indexing="ij")
    grid = torch.stack((x, y), -1).expand(values.shape[0], -1, -1, -1)
    return F.grid_sample(values[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
