"""Made image files about as large as photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_SIZE = (640, 480)  # width, height
CLASSES, BOXES, QUALITY = 80, 7, 90


def write_photographs(folder: Path, count: int) -> float:
    """Shaded, noisy images about as large as photographs, and their boxes. Returns the mean size in KiB."""
    import numpy as np
    from PIL import Image

    width, height = FILE_SIZE
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    total = 0
    for i in range(count):
        random = np.random.default_rng(i)
        coarse = random.uniform(0, 255, (12, 16, 3)).astype(np.uint8)
        shading = np.asarray(Image.fromarray(coarse).resize(FILE_SIZE, Image.Resampling.BICUBIC), np.float32)
        noise = random.normal(0, 7, (height, width, 1)) + random.normal(0, 2, (height, width, 3))
        path = folder / f"{i:06d}.jpg"
        Image.fromarray((shading + noise).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        total += path.stat().st_size
        images.append({"id": i, "width": width, "height": height, "file_name": path.name})
        for _ in range(BOXES):
            w, h = random.uniform(20, 0.6 * width), random.uniform(20, 0.6 * height)
            box = [random.uniform(0, width - w), random.uniform(0, height - h), w, h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1 + len(annotations) % CLASSES,
                    "bbox": [round(float(x), 2) for x in box],
                    "area": float(w * h),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return total / count / 1024
