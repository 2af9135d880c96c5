"""Much to label: images that are drawn by arithmetic, a small teacher, and the memory that it took."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compress.config.model import Model
from compress.detectors.checkpoints import ModelRecord, save_detector

SIDE = 64
"""Of the images, pixels."""


def teacher(path: Path) -> None:
    """Random, with scores high enough that there is something to write for every image."""
    record = ModelRecord(
        model=Model(backbone="nano", neck_channels=32, head_depth=0),
        num_classes=2,
        class_names=("cat", "dog"),
        category_ids=(1, 2),
    )
    torch.manual_seed(0)
    detector = record.build()
    with torch.no_grad():
        detector.head.gfl_cls.weight.normal_(std=0.2)
        detector.head.gfl_cls.bias.zero_()
    save_detector(path, detector, metadata=record)


def draw(folder: Path, count: int) -> None:
    """Images 0 to `count`; those that are there stay."""
    for index in range(count):
        path = folder / f"{index // 1000:03}" / f"{index:06}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            cells = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(cells.repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)).save(path, compress_level=1)


def peak_mb() -> float:
    """The largest resident set of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)
