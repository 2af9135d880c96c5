"""COCO detection files: reading with errors that name the place, and a dataset over them.

The annotations become a few flat tensors at once: a file with a million boxes costs tens of megabytes, not
gigabytes of dictionaries in every worker.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from compress.data.batch import Target
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.validate.coco import read_annotations
from deploy.validate.labels import MOST_OBJECTS, WHILE_TRAINING, label_notes

Transform = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(image uint8 [3, h, w], boxes float32 [n, 4] xyxy pixels, ignore bool [n]) to the same, as many boxes.

A box that has left the image comes back empty; the dataset drops it.
"""


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images uint8 RGB [3, h, w] with their `Target`, both through `transform`.

    A key is an index, or a pair `(index, seed)`: with a seed the random choices of the transform depend on
    nothing else, and the global random state is left as it was. So worker count and order do not matter.

    Annotations that cannot be learned are left out and counted in `dropped`: width or height below one
    pixel, area of zero, outside the image, unknown category or image, a category that `info.coverage` does not
    have. Crowd regions are kept as `ignore`, those of pseudo labels (`iscrowd` and `ignore`) also as `uncertain`.

    Args:
        annotations: a COCO detection file.
        images: the folder that its `file_name`s are relative to.
        transform: see `compress.data.transforms`.
        cache: decode all images now and keep them in memory. Forked workers share that memory.
        drop_empty: leave out images with no box to learn, and images with a side below 32 px.
        drop_uncertain: leave out images with no box to learn where something may be: images with an uncertain region,
            and all of a file whose `info.coverage` does not have all categories.
        scores: give the targets the annotations' `score`; one without has 1.
        max_detections: what an exported file gives of an image; for `label_notes` alone.

    Raises:
        UserError: as `read_annotations`; no images left; with `cache`, too little memory; on access, an image
            that is missing, unreadable or not of the size that the file says.
    """

    categories: tuple[str, ...]
    """Names in ascending category-id order; the place in this tuple is the label."""
    category_ids: tuple[int, ...]
    image_ids: tuple[int, ...]
    sizes: list[tuple[int, int]]
    """(height, width) of every image file, as the annotations say."""
    aspect_ratios: np.ndarray
    """float32 [len(self)], width / height."""
    dropped: Counter[str]
    """Counts of annotations that were left out, by reason."""
    label_notes: list[str]
    """Lines about labels that are usable, but cost accuracy: see `deploy.validate.labels`."""

    def __init__(
        self,
        annotations: Path,
        images: Path,
        transform: Transform,
        *,
        cache: bool = False,
        drop_empty: bool = False,
        drop_uncertain: bool = False,
        scores: bool = False,
        max_detections: int = MOST_OBJECTS,
    ) -> None:
        self.annotations, self.folder, self.transform = Path(annotations), Path(images), transform
        document = read_annotations(self.annotations, sizes=True, images=self.folder)
        if not document["categories"]:
            raise UserError(f"{annotations}: categories: the list is empty, there is nothing to detect")
        names = {category["id"]: category["name"] for category in document["categories"]}
        self.category_ids = tuple(sorted(names))
        self.categories = tuple(names[identifier] for identifier in self.category_ids)

        entries = document["images"]
        repeated = [key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1]
        if repeated:
            raise UserError(f"{annotations}: images: id {repeated[0]} is used more than once; ids must be unique")
        labels = {value: i for i, value in enumerate(self.category_ids)}
        self._unlabeled_classes = _unlabeled_classes(document, labels, self.annotations)
        kept, self.dropped = _usable(document, labels, self._unlabeled_classes, self.annotations)
        self.label_notes = label_notes(document, kinds=WHILE_TRAINING, max_detections=max_detections)
        self._with_scores = scores
        if drop_empty:
            entries = [
                entry
                for entry in entries
                if min(entry["width"], entry["height"]) >= 32
                and any(not row.crowd for row in kept.get(entry["id"], ()))
            ]
        if drop_uncertain:
            rows = {entry["id"]: kept.get(entry["id"], []) for entry in entries}
            entries = [
                entry
                for entry in entries
                if any(not row.crowd for row in rows[entry["id"]])
                or (self._unlabeled_classes is None and not any(row.uncertain for row in rows[entry["id"]]))
            ]
        if not entries:
            raise UserError(f"{annotations}: no usable image in it")
        self._load_tables(entries, kept)
        self._cache = self._decode_all() if cache else None

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """Boxes to learn or to find; crowd regions do not count."""
        return int((~self._crowd).sum())

    @property
    def boxes_by_class(self) -> list[int]:
        """Boxes of each class, in the order of `categories`."""
        return torch.bincount(self._labels[~self._crowd], minlength=len(self.categories)).tolist()

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        if isinstance(key, tuple):
            index, seed = key
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
                return self._sample(index)
        return self._sample(key)

    def _sample(self, index: int) -> tuple[Tensor, Target]:
        first, last = self._offsets[index], self._offsets[index + 1]
        image, boxes, ignore = self.transform(
            self.image(index), self._boxes[first:last].clone(), self._crowd[first:last].clone()
        )
        labels = self._labels[first:last].clone()
        scores = None if self._scores is None else self._scores[first:last].clone()
        uncertain = None if self._uncertain is None else self._uncertain[first:last].clone()
        keep = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])) if len(boxes) else None
        if keep is not None and not bool(keep.all()):
            boxes, labels, ignore = boxes[keep], labels[keep], ignore[keep]
            scores = None if scores is None else scores[keep]
            uncertain = None if uncertain is None else uncertain[keep]
        size = (image.shape[1], image.shape[2])
        target = Target(
            boxes,
            labels,
            ignore,
            scores,
            self.image_ids[index],
            size,
            self.sizes[index],
            uncertain=uncertain,
            unlabeled_classes=self._unlabeled_classes,
        )
        return image, target

    def subset(self, indices: Sequence[int], *, cache: bool = False) -> CocoDetection:
        """Some of the images, in this order. cache: decode them now, as the whole set does."""
        part = copy.copy(self)
        part.image_ids = tuple(self.image_ids[index] for index in indices)
        part._names = [self._names[index] for index in indices]
        part.sizes = [self.sizes[index] for index in indices]
        part.aspect_ratios = self.aspect_ratios[list(indices)]
        rows = [torch.arange(*self._offsets[index : index + 2]) for index in indices]
        part._offsets = np.cumsum([0] + [len(row) for row in rows]).tolist()
        chosen = torch.cat(rows)
        part._boxes, part._labels, part._crowd = self._boxes[chosen], self._labels[chosen], self._crowd[chosen]
        part._scores = None if self._scores is None else self._scores[chosen]
        part._uncertain = None if self._uncertain is None else self._uncertain[chosen]
        part._cache = part._decode_all() if cache else None
        return part

    def network_sizes(self) -> list[tuple[int, int]]:
        """(height, width) that each image has after `transform`, at most; pixels."""
        largest: dict[tuple[int, int], tuple[int, int]] = {
            size: self.transform.largest(*size)  # type: ignore[attr-defined]  # those of compress.data.transforms
            for size in set(self.sizes)
        }
        return [largest[size] for size in self.sizes]

    def outcomes(self) -> float:
        """How many different images `transform` can make of one; infinity: countless."""
        return self.transform.outcomes()  # type: ignore[attr-defined]

    def name(self, index: int) -> str:
        """The image's `file_name`."""
        return self._names[index]

    def path(self, index: int) -> Path:
        """The image's file."""
        return self.folder / self._names[index]

    def image(self, index: int) -> Tensor:
        """The image as in its file, turned as its EXIF data say: uint8 [3, h, w] RGB."""
        if self._cache is None:
            return self._decode(index)
        height, width = self.sizes[index]
        start = self._cache_offsets[index]
        flat = self._cache[start : start + height * width * 3]
        return flat.view(height, width, 3).permute(2, 0, 1)

    def _load_tables(self, entries: list[dict[str, Any]], kept: dict[int, list[_Row]]) -> None:
        self.image_ids = tuple(entry["id"] for entry in entries)
        self._names = [entry["file_name"] for entry in entries]
        self.sizes = [(entry["height"], entry["width"]) for entry in entries]
        self.aspect_ratios = np.array([width / height for height, width in self.sizes], np.float32)
        rows = [kept.get(identifier, []) for identifier in self.image_ids]
        self._offsets = np.cumsum([0] + [len(row) for row in rows]).tolist()
        flat = [item for row in rows for item in row]
        self._boxes = torch.tensor([row.box for row in flat], dtype=torch.float32).reshape(-1, 4)
        self._labels = torch.tensor([row.label for row in flat], dtype=torch.int64)
        self._crowd = torch.tensor([row.crowd for row in flat], dtype=torch.bool)
        scores = torch.tensor([row.score for row in flat], dtype=torch.float32)
        self._scores = scores if self._with_scores else None
        uncertain = torch.tensor([row.uncertain for row in flat], dtype=torch.bool)
        self._uncertain = uncertain if bool(uncertain.any()) else None

    def _decode(self, index: int) -> Tensor:
        path = self.folder / self._names[index]
        entry = f"image id {self.image_ids[index]} of {self.annotations}"
        try:
            image = load_tensor(path)
        except UserError as error:
            raise UserError(f"{error} ({entry})") from None
        height, width = self.sizes[index]
        if image.shape[1:] != (height, width):
            found = f"{image.shape[2]}x{image.shape[1]}"
            raise UserError(f"{path}: the file is {found} pixels, the annotations say {width}x{height} ({entry})")
        return image

    def _decode_all(self) -> Tensor:
        ends = np.cumsum([0] + [height * width * 3 for height, width in self.sizes])
        self._cache_offsets: list[int] = ends[:-1].tolist()
        total = int(ends[-1])
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if total > 0.8 * memory:
            raise UserError(
                f"{self.annotations}: cache needs {total / 2**30:.1f} GiB for the decoded images, "
                f"this machine has {memory / 2**30:.1f} GiB; set cache: false"
            )
        cache = torch.empty(total, dtype=torch.uint8)

        def fill(index: int) -> None:
            image = self._decode(index).permute(1, 2, 0)
            start = self._cache_offsets[index]
            cache[start : start + image.numel()].view(image.shape).copy_(image)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        return cache


def load_tensor(path: Path) -> Tensor:
    """`deploy.core.image.load_image` as uint8 [3, h, w], channels last in memory."""
    return torch.from_numpy(load_image(path)).permute(2, 0, 1)


# --- details --------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """An annotation: box xyxy in pixels; uncertain: a crowd region that is to be ignored (of pseudo labels)."""

    box: list[float]
    label: int
    crowd: bool
    uncertain: bool
    score: float


def _unlabeled_classes(document: dict[str, Any], labels: dict[int, int], path: Path) -> Tensor | None:
    """Labels that `info.coverage`, a list of category ids, does not have; None without it or when it has all."""
    info = document.get("info")
    coverage = info.get("coverage") if isinstance(info, dict) else None
    if coverage is None:
        return None
    if not isinstance(coverage, list) or not all(type(value) is int and value in labels for value in coverage):
        raise UserError(f"{path}: info.coverage: must be a list of ids of its categories, those that were looked for")
    missing = sorted(set(labels.values()) - {labels[value] for value in coverage})
    return torch.tensor(missing, dtype=torch.int64) if missing else None


def _usable(
    document: dict[str, Any], labels: dict[int, int], unlabeled_classes: Tensor | None, where: Path
) -> tuple[dict[int, list[_Row]], Counter[str]]:
    """Per image id the annotations to learn from; and how many fell out, and why."""
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in document["images"]}
    kept: dict[int, list[_Row]] = {}
    dropped: Counter[str] = Counter()
    nobody_looked_for = set() if unlabeled_classes is None else set(unlabeled_classes.tolist())
    for index, annotation in enumerate(document["annotations"]):
        x, y, w, h = annotation["bbox"]
        size = sizes.get(annotation["image_id"])
        label = labels.get(annotation["category_id"])
        if size is None:
            dropped["unknown image"] += 1
        elif label is None:
            dropped["unknown category"] += 1
        elif label in nobody_looked_for:
            dropped["category not in info.coverage"] += 1
        elif not (w >= 1 and h >= 1) or annotation.get("area", 1) <= 0:  # not (…): NaN counts as empty
            dropped["empty box"] += 1
        elif min(x + w, size[0]) <= max(x, 0) or min(y + h, size[1]) <= max(y, 0):
            dropped["outside the image"] += 1
        else:
            crowd = bool(annotation.get("iscrowd", 0))
            uncertain = crowd and bool(annotation.get("ignore", 0))
            score = annotation.get("score", 1.0)
            if type(score) not in (int, float) or not 0 <= score <= 1:
                raise UserError(f"{where}: annotations[{index}]: score must be a number from 0 to 1, found {score!r}")
            row = _Row([x, y, x + w, y + h], label, crowd, uncertain, score)
            kept.setdefault(annotation["image_id"], []).append(row)
    return kept, dropped
