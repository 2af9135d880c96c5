"""A clock that only goes when told, runners whose delays are known, and images that cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.core.card import ModelCard
from deploy.runtimes.base import DetectionBatch

TINY_CARD = ModelCard(name="fake", class_names=["a"], category_ids=[1], input_size=(32, 32))


class FakeClock:
    """Seconds since it was made; `wait_until` takes no time of ours."""

    def __init__(self) -> None:
        self.second = 0.0

    def now(self) -> float:
        return self.second

    def wait_until(self, second: float) -> None:
        self.second = max(self.second, second)


class FakeRunner:
    """Takes `delay_ms(images)` of the fake clock."""

    card = TINY_CARD
    backend = "fake cpu"
    on_cpu = True

    def __init__(self, clock: FakeClock, delay_ms: Callable[[int], float]) -> None:
        self.clock, self.delay_ms, self.batches = clock, delay_ms, list[int]()

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        self.batches.append(len(images))
        self.clock.second += self.delay_ms(len(images)) / 1e3
        n = len(images)
        return DetectionBatch(
            np.zeros((n, 1, 4), np.float32),
            np.zeros((n, 1), np.float32),
            np.zeros((n, 1), np.int64),
            np.ones(n, np.int32),
        )


class StagedFake(FakeRunner):
    """Runner on a device: 2 ms to get there, `delay_ms`, and 1 ms back. `device_clock`: whether it has one of its own,
    which sees 0.5 ms less than the host."""

    backend = "fake device"
    on_cpu = False

    def __init__(self, clock: FakeClock, delay_ms: Callable[[int], float], *, device_clock: bool) -> None:
        super().__init__(clock, delay_ms)
        self.device_clock = device_clock

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        self.upload(images)
        self.compute()
        return self.fetch()

    def upload(self, images: np.ndarray) -> None:
        self.images = images
        self.clock.second += 2e-3

    def compute(self) -> None:
        self.found = super().__call__(self.images)

    def fetch(self) -> DetectionBatch:
        self.clock.second += 1e-3
        return self.found

    def compute_ms(self) -> float | None:
        if not self.device_clock:
            return None
        before = self.clock.second
        self.compute()
        return (self.clock.second - before) * 1e3 - 0.5


def small_images(folder: Path, count: int = 5) -> list[Path]:
    """Files a little larger than the fake canvas, each of another height."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 255, (36 + i, 40, 3), np.uint8)).save(path)
    return paths


def correlated(rng: np.random.Generator, count: int, strength: float) -> np.ndarray:
    """A stationary AR(1) series of unit variance."""
    noise = rng.normal(size=count)
    out = np.empty(count)
    out[0] = noise[0]
    for i in range(1, count):
        out[i] = strength * out[i - 1] + np.sqrt(1 - strength**2) * noise[i]
    return out
