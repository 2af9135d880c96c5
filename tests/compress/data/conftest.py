from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIZES = [(64, 48), (40, 60), (90, 50), (32, 80), (64, 64), (70, 41), (48, 64)]
"""(width, height), wide and tall."""


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """A sound COCO document with its images in tmp_path/images: noise, three boxes each, ids with a gap."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (width, height) in enumerate(SIZES):
        name = f"{index}.png"
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": 10 + index, "file_name": name, "width": width, "height": height})
        for number in range(3):
            w, h = (int(value) for value in rng.integers(5, 20, 2))
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + index,
                    "category_id": (7, 3)[number % 2],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def write(value: Any) -> Path:
        path = tmp_path / "annotations.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write
