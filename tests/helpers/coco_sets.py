"""Small sets of objects and detections in which COCO evaluators are known to differ, and what pycocotools says of them.

`SETS` maps what is special to (COCO document, result rows). `pycocotools_figures` gives the twelve figures.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deploy.validate.coco import CocoMetrics

Rows = list[dict[str, Any]]
Set = tuple[dict[str, Any], Rows]

A, B, C = [20.0, 30.0, 40.0, 40.0], [200.0, 30.0, 40.0, 40.0], [20.0, 200.0, 40.0, 60.0]
BIG = 2**31


def truth(*boxes: dict[str, Any], images: Iterable[int] = (0,), categories: Iterable[int] = (0,)) -> dict[str, Any]:
    """A document; a box is of the first image and category unless it says otherwise."""
    images, categories = list(images), list(categories)
    usual = {"image_id": images[0], "category_id": categories[0]}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 640} for i in images],
        "categories": [{"id": k, "name": f"class {k}"} for k in categories],
        "annotations": [{"id": n, **usual, **box} for n, box in enumerate(boxes)],
    }


def row(box: Sequence[float], score: float = 0.9, image: int = 0, category: int = 0) -> dict[str, Any]:
    """A detection."""
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def grid(count: int, side: float = 16.0) -> list[list[float]]:
    """Boxes beside each other."""
    return [[20.0 * (n % 40), 20.0 * (n // 40), side, side] for n in range(count)]


def objects(*boxes: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    """Objects of the first image and category."""
    return [{"bbox": list(box), **more} for box in boxes]


def random_set(seed: int, images: Sequence[int] = (4, 0, 9), categories: Sequence[int] = (0, 1)) -> Set:
    """Boxes on a coarse grid, so that overlaps tie, and scores of one digit; crowds; areas that are not the box's."""
    rng = np.random.default_rng(seed)
    boxes: list[dict[str, Any]] = []
    rows = []
    for image in images:
        for _ in range(int(rng.integers(1, 9))):
            box = (rng.integers([0, 0, 1, 1], [8, 8, 12, 12]) * 8).tolist()
            boxes.append({"image_id": image, "category_id": categories[int(rng.integers(len(categories)))]})
            boxes[-1] |= {"bbox": box, "iscrowd": int(rng.random() < 0.15)}
            boxes[-1] |= {"area": box[2] * box[3] * float(rng.choice([0.5, 1]))}
        for _ in range(int(rng.integers(1, 14))):
            near = boxes[int(rng.integers(len(boxes)))]["bbox"]
            shifted = (np.array(near) + rng.integers(-1, 2, 4) * 4).clip(0).tolist()
            kind = categories[int(rng.integers(len(categories)))]
            rows.append(row(shifted, float(rng.integers(1, 6)) / 10, image, kind))
    return truth(*boxes, images=images, categories=categories), rows


def varied_set(seed: int, images: int = 25, classes: int = 4) -> Set:
    """Boxes of any size, some classes mixed up, scores of two digits; the last class has no object."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(images):
        for _ in range(int(rng.integers(0, 8))):
            x, y = rng.uniform(0, 400, 2)
            w, h = np.exp(rng.uniform(np.log(5), np.log(250), 2))
            category = int(rng.integers(0, classes - 1)) * 7 + 3  # the last class has no ground truth
            annotations.append(
                {
                    "id": len(annotations),  # from zero: an id that pycocotools would take for "no match"
                    "image_id": image * 11,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                noise = rng.normal(0, 0.08, 4) * [w, h, w, h]
                box = [x + noise[0], y + noise[1], max(w + noise[2], 1), max(h + noise[3], 1)]
                wrong = rng.random() < 0.2
                results.append(
                    {
                        "image_id": image * 11,
                        "category_id": int(rng.integers(0, classes)) * 7 + 3 if wrong else category,
                        "bbox": [float(v) for v in box],
                        "score": float(np.round(rng.random(), 2)),  # ties
                    }
                )
    dataset = {
        "images": [{"id": i * 11, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(images)],
        "categories": [{"id": k * 7 + 3, "name": f"class {k}"} for k in reversed(range(classes))],
        "annotations": annotations,
    }
    return dataset, results


def _moved(box: Sequence[float], share: float) -> list[float]:
    """The box, moved right by a share of its width."""
    return [box[0] + share * box[2], *box[1:]]


def _two(x: list[float], y: list[float], **more: Any) -> dict[str, Any]:
    return truth({"bbox": x}, {"bbox": y, **more})


def _sizes() -> Set:
    """Objects just below, at and just above each border, by area; detections likewise."""
    sides = [31.999, 32, 32.001, 95.999, 96, 96.001]
    boxes = [[150.0 * n, 10.0, side, side] for n, side in enumerate(sides)]
    return truth(*objects(*boxes)), [row(box, 0.9 - 0.1 * n) for n, box in enumerate(boxes)]


RLE = {"counts": "0", "size": [300, 300]}
POLYGON = [[200.0, 30.0, 240.0, 30.0, 240.0, 70.0]]
FOUND = [row(A, 0.5), row(B, 0.95), row(B, 0.99), row([210, 40, 9, 9], 0.7)]
TIED = [row(A, 0.5, n) if n % 2 else row(B, 0.5, n) for n in range(6)]
BORDER = 0.9 - 1e-16

SETS: dict[str, Set] = {
    # ids
    "ids from 0": (_two(A, B), [row(A), row(B)]),
    "ids that repeat": (truth({"bbox": A, "id": 7}, {"bbox": B, "id": 7}), [row(A), row(B)]),
    "ids that are text": (truth({"bbox": A, "id": "a"}), [row(A)]),
    "no ids": (truth({"bbox": A, "id": None}, {"bbox": B, "id": None}), [row(A), row(B, 0.5)]),
    "negative ids": (truth({"bbox": A, "id": -1}, images=[-5], categories=[-3]), [row(A, 0.9, -5, -3)]),
    "ids above 2^31": (
        truth({"bbox": A, "id": BIG + 1}, {"bbox": B, "id": BIG}, images=[BIG + 7, 3], categories=[BIG + 9, 1]),
        [row(A, 0.9, BIG + 7, BIG + 9), row(A, 0.95, 3, 1), row(B, 0.3, BIG + 7, BIG + 9)],
    ),
    "images that float32 takes for one": (
        truth({"bbox": A}, images=[2**24, 2**24 + 1], categories=[0]), [row(A, 0.5, 2**24), row(A, 0.9, 2**24 + 1)],
    ),
    "images that float64 takes for one": (
        truth({"bbox": A}, images=[2**53, 2**53 + 1], categories=[0]), [row(A, 0.5, 2**53), row(A, 0.9, 2**53 + 1)],
    ),
    "ids of 62 bits": (truth({"bbox": A, "id": 2**62}, images=[2**62], categories=[2**62 + 1]),
                       [row(B, 0.95, 2**62, 2**62 + 1), row(A, 0.9, 2**62, 2**62 + 1)]),
    "images out of order": (truth({"bbox": A, "image_id": 9}, {"bbox": B, "image_id": 2}, images=[9, 2, 5]),
                            [row(A, 0.5, 9), row(A, 0.5, 2), row(B, 0.5, 2), row(B, 0.5, 5)]),
    "categories out of order": (
        truth({"bbox": A, "category_id": 8}, {"bbox": B, "category_id": 1}, categories=[8, 1]),
        [row(A, 0.5, 0, 8), row(A, 0.9, 0, 1), row(B, 0.4, 0, 1)],
    ),
    # ties
    "equal scores, right first": (truth({"bbox": A}), [row(A), row(B)]),
    "equal scores, wrong first": (truth({"bbox": A}), [row(B), row(A)]),
    "ties over images": (truth(*({"bbox": A, "image_id": n} for n in range(6)), images=range(6)), TIED),
    "ties over images in another order": (
        truth(*({"bbox": A, "image_id": n} for n in range(6)), images=range(6)), TIED[::-1],
    ),
    "rows of images mixed": (truth(*({"bbox": A, "image_id": n} for n in range(3)), images=range(3)),
                             [row(B, 0.5, 2), row(A, 0.5, 0), row(A, 0.5, 2), row(B, 0.5, 0), row(A, 0.5, 1)]),
    "two objects overlap alike": (_two([0, 0, 40, 40], [20, 0, 40, 40]), [row([10, 0, 40, 40]), row([20, 0, 40, 40])]),
    "every copy is another object": (_two(A, A), [row(A)]),
    "two for one object": (_two(A, B), [row(A), row(A, 0.8), row(B, 0.7)]),
    "the better box comes later": (_two(A, B), [row(_moved(A, 0.2), 0.9), row(A, 0.8), row(B, 0.1)]),
    "scores of one float32": (truth({"bbox": A}), [row(A, 0.3), row(B, 0.3 + 1e-9)]),
    "scores of one float64": (truth({"bbox": A}), [row(B, BORDER), row(A, 0.9)]),
    "scores that are negative or above 1": (_two(A, B), [row(A, -5.0), row(B, 7.0), row(C, 2.0)]),
    "scores of 0": (_two(A, B), [row(C, -0.0), row(A, 0.0), row(B, 0.0)]),
    # crowds
    "crowd with a box": (_two(A, B, iscrowd=1), FOUND),
    "crowd with a mask": (_two(A, B, iscrowd=1, segmentation=RLE), FOUND),
    "crowd with a polygon": (_two(A, B, iscrowd=1, segmentation=POLYGON), FOUND),
    "crowd first": (truth({"bbox": B, "iscrowd": 1}, {"bbox": A}), FOUND),
    "only a crowd": (truth({"bbox": A, "iscrowd": 1}), [row(A)]),
    "wrong beside a crowd": (_two(A, B, iscrowd=1), [row([200, 30, 90, 90]), row(A, 0.5)]),
    "an object inside of a crowd": (_two([0, 0, 40, 40], [0, 0, 200, 200], iscrowd=1),
                                    [row([0, 0, 40, 40]), row([0, 0, 44, 40], 0.95), row([60, 60, 20, 20], 0.99)]),
    "crowd of another class": (truth({"bbox": A}, {"bbox": B, "iscrowd": 1, "category_id": 1}, categories=[0, 1]),
                               [row(B, 0.95), row(A, 0.5)]),
    "half of a box in a crowd": (_two(A, [0, 200, 100, 100], iscrowd=1), [row([50, 200, 100, 100], 0.95), row(A, 0.5)]),
    "two crowds": (truth({"bbox": A, "iscrowd": 1}, {"bbox": A, "iscrowd": 1}, {"bbox": B}), FOUND),
    # area and size
    "no area": (_two(A, B), [row(A), row(_moved(B, 0.1))]),
    "area of a mask": (truth({"bbox": [0, 0, 100, 100], "area": 1000.0}), [row([0, 0, 100, 100])]),
    "area of 32 squared": (truth({"bbox": [0, 0, 32, 32]}), [row([0, 0, 32, 32])]),
    "area of 96 squared": (truth({"bbox": [0, 0, 96, 96]}), [row([0, 0, 96, 96])]),
    "areas around the borders": _sizes(),
    "detection of another size": (
        truth({"bbox": [0, 0, 33, 33]}), [row([0, 0, 31, 31]), row([300, 300, 20, 20], 0.95)],
    ),
    "large object of a small area": (truth({"bbox": [0, 0, 200, 200], "area": 500}), [row([0, 0, 200, 200])]),
    "area of 0": (truth({"bbox": A, "area": 0}), [row(A)]),
    "negative area": (_two(A, B, area=-1), [row(A, 0.5), row(B)]),
    "huge area": (_two(A, B, area=1e11), [row(A, 0.5), row(B)]),
    "all of one size": (truth(*objects(*grid(5))), [row(box, 0.1 * n) for n, box in enumerate(grid(5))]),
    # boxes
    "no width": (_two(A, [60, 60, 0, 9]), [row(A), row([60, 60, 0, 9])]),
    "no height": (_two(A, [60, 60, 9, 0]), [row(A), row([60, 60, 9, 0])]),
    "only a point": (truth({"bbox": [5, 5, 0, 0]}), [row([5, 5, 0, 0])]),
    "detection without width": (truth({"bbox": A}), [row([20, 30, 0, 40], 0.95), row(A)]),
    "detection of negative width": (truth({"bbox": A}), [row([60, 30, -40, 40], 0.95), row(A)]),
    "detection turned over": (truth({"bbox": A}), [row([60, 70, -40, -40], 0.95), row(A)]),
    "less than a pixel": (_two(A, [7.25, 7.5, 0.5, 0.25]), [row([7.25, 7.5, 0.5, 0.25]), row(A, 0.5)]),
    "outside of the image": (_two([-50, -50, 80, 80], [630, 630, 80, 80]),
                             [row([-50, -50, 80, 80]), row([0, 0, 30, 30], 0.95), row([630, 630, 80, 80])]),
    "touching": (truth({"bbox": [0, 0, 10, 10]}), [row([10, 0, 10, 10], 0.95), row([0, 0, 10, 10])]),
    "overlap of exactly one half": (truth({"bbox": [0, 0, 10, 20]}), [row([0, 0, 10, 10])]),
    "overlap of every threshold": (
        truth(*({"bbox": [0, 30 * n, 100, 20]} for n in range(10))),
        [row([0, 30 * n, 50 + 5 * n, 20], 0.9 - n / 20) for n in range(10)],
    ),
    "overlap just below a threshold": (truth({"bbox": [0, 0, 10, 20]}), [row([0, 0, 10, 10 - 1e-12])]),
    "one inside of the other": (
        _two([0, 0, 100, 100], [10, 10, 80, 80]), [row([5, 5, 90, 90]), row([10, 10, 80, 80])],
    ),
    "large coordinates": (truth({"bbox": [1e6, 1e6, 1e3, 1e3]}), [row([1e6 + 0.1, 1e6, 1e3, 1e3])]),
    "fractions": (
        _two([0.1, 0.2, 0.3, 0.7], [10.1, 3.3, 7.7, 9.9]), [row([0.1, 0.2, 0.3, 0.6]), row([10.2, 3, 8, 10])],
    ),
    # number of detections
    "no detection": (_two(A, B), []),
    "no object": (truth(), [row(A)]),
    "no object and no detection": (truth(), []),
    "the first counts": (_two(A, B), [row(A), row(B)]),
    "the tenth counts": (truth({"bbox": A}), [*[row(B)] * 9, row(A, 0.1)]),
    "the eleventh counts among 100": (truth({"bbox": A}), [*[row(B)] * 10, row(A, 0.1)]),
    "the hundredth counts": (truth({"bbox": A}), [*[row(B)] * 99, row(A, 0.1)]),
    "the hundred and first does not": (truth({"bbox": A}), [*[row(B)] * 100, row(A, 0.1)]),
    "120 objects are found": (
        truth(*objects(*grid(120))), [row(box, 0.9 - n / 200) for n, box in enumerate(grid(120))],
    ),
    "the limit is of a class": (
        truth({"bbox": A}, {"bbox": B, "category_id": 1}, categories=[0, 1]),
        [*[row(C, 0.95)] * 99, row(A, 0.1), *[row(C, 0.95, 0, 1)] * 99, row(B, 0.1, 0, 1)],
    ),
    "a hundred and one ties": (truth({"bbox": A}), [row(A, 0.5), *[row(B, 0.5)] * 100]),
    # images and classes without
    "images without objects": (truth({"bbox": A}, images=range(3)), [row(A), row(B, 0.95, 1), row(B, 0.99, 2)]),
    "images without detections": (truth(*({"bbox": A, "image_id": n} for n in range(3)), images=range(3)), [row(A)]),
    "a class without objects": (truth({"bbox": A}, categories=[0, 1]), [row(A), row(A, 0.95, category=1)]),
    "a class without detections": (truth({"bbox": A}, {"bbox": B, "category_id": 1}, categories=[0, 1]), [row(A)]),
    "the right box, another class": (truth({"bbox": A}, categories=[0, 1]), [row(A, category=1)]),
    "many classes": (
        truth(*({"bbox": A, "category_id": 3 * n} for n in range(12)), categories=range(0, 60, 3)),
        [row(A, 0.5, 0, 3 * n) for n in range(0, 16, 2)],
    ),
    "ignore is not read": (_two(A, B, ignore=1), [row(A)]),
    **{f"random {seed}": random_set(seed) for seed in range(8)},
    **{f"varied {seed}": varied_set(seed) for seed in range(4)},
    "random, many images": random_set(8, tuple(range(40, 0, -1)), (5, 3, 11)),
}  # fmt: skip
"""What is special → (document, rows)."""


def pycocotools_figures(document: Mapping[str, Any], rows: Rows) -> list[float]:
    """The twelve figures of COCO's summary in percent, NaN where pycocotools says -1.

    Objects are numbered from 1 on and have an area, a detection or none is alike: without that pycocotools loses
    objects, or stops.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry, "id": number}
        for number, entry in enumerate(document["annotations"], start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = COCO(), COCO()
        objects.dataset = {"info": {}, **document, "annotations": labels}
        objects.createIndex()
        if rows:
            found = objects.loadRes([dict(entry) for entry in rows])
        evaluation = COCOeval(objects, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value == -1 else float(100 * value) for value in evaluation.stats]


def figures(metrics: CocoMetrics) -> list[float]:
    """Those of an evaluation of ours, in the same order."""
    from deploy.validate.coco import FIGURES

    return [getattr(metrics, name) for name in FIGURES]
