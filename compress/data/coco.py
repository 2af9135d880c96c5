"""Images with the labels of a COCO detection file, as a dataset.

The labels stay in the columns of `compress.data.label_tables`, of which a loader's workers share one copy.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from compress.data.batch import Target
from compress.data.index import label_tables
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.validate.labels import MOST_OBJECTS

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
        tables = self._tables = label_tables(self.annotations, self.folder)
        self.categories, self.category_ids = tables.categories, tables.category_ids
        self.dropped, self.label_notes = tables.dropped, tables.label_notes(max_detections)
        self._unlabeled_classes = torch.tensor(tables.unlabeled, dtype=torch.int64) if tables.unlabeled else None
        self._with_scores = scores
        chosen = np.ones(len(tables.image_ids), bool)
        doubtful = np.zeros(len(chosen), bool) if tables.uncertain is None else tables.counts(tables.uncertain) > 0
        if drop_empty:
            chosen &= (tables.sizes.min(1) >= 32) & (tables.objects > 0)
        if drop_uncertain:
            chosen &= (tables.objects > 0) | (~doubtful & (not tables.unlabeled))
        self._rows = np.flatnonzero(chosen).astype(np.int32)
        if not len(self._rows):
            raise UserError(f"{annotations}: no usable image in it")
        self._with_uncertain = bool(doubtful[self._rows].any())
        self._cache = self._decode_all() if cache else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Made anew at every look, as `sizes` is."""
        return tuple(self._tables.image_ids[self._rows].tolist())

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image file, as the annotations say."""
        return [(height, width) for height, width in self._tables.sizes[self._rows].tolist()]

    @property
    def aspect_ratios(self) -> np.ndarray:
        """float32 [len(self)], width / height."""
        height, width = self._tables.sizes[self._rows].T
        return (width / height).astype(np.float32)

    @property
    def num_boxes(self) -> int:
        """Boxes to learn or to find; crowd regions do not count."""
        return int(self._tables.objects[self._rows].sum())

    @property
    def boxes_by_class(self) -> list[int]:
        """Boxes of each class, in the order of `categories`."""
        tables = self._tables
        times = np.bincount(self._rows, minlength=len(tables.image_ids))  # that an image is in this set
        of_box = np.repeat(times, np.diff(tables.ends, prepend=0)) * ~tables.crowd
        return np.bincount(tables.labels, of_box, len(self.categories)).astype(int).tolist()

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        if isinstance(key, tuple):
            index, seed = key
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
                return self._sample(index)
        return self._sample(key)

    def _sample(self, index: int) -> tuple[Tensor, Target]:
        tables, row = self._tables, self._rows[index]
        found = tables.rows_of(row)
        image, boxes, ignore = self.transform(
            self.image(index), torch.tensor(tables.boxes[found]), torch.tensor(tables.crowd[found])
        )
        labels = torch.tensor(tables.labels[found], dtype=torch.int64)
        scores = uncertain = None
        if self._with_scores:
            scores = torch.ones(len(labels)) if tables.scores is None else torch.tensor(tables.scores[found])
        if self._with_uncertain and tables.uncertain is not None:
            uncertain = torch.tensor(tables.uncertain[found])
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
            int(tables.image_ids[row]),
            size,
            self._size(index),
            uncertain=uncertain,
            unlabeled_classes=self._unlabeled_classes,
        )
        return image, target

    def subset(self, indices: Sequence[int], *, cache: bool = False) -> CocoDetection:
        """Some of the images, in this order. cache: decode them now, as the whole set does."""
        part = copy.copy(self)
        part._rows = self._rows[np.asarray(indices, np.int64)]
        part._cache = part._decode_all() if cache else None
        return part

    def network_sizes(self) -> list[tuple[int, int]]:
        """(height, width) that each image has after `transform`, at most; pixels."""
        sizes = self.sizes
        largest: dict[tuple[int, int], tuple[int, int]] = {
            size: self.transform.largest(*size)  # type: ignore[attr-defined]  # those of compress.data.transforms
            for size in set(sizes)
        }
        return [largest[size] for size in sizes]

    def outcomes(self) -> float:
        """How many different images `transform` can make of one; infinity: countless."""
        return self.transform.outcomes()  # type: ignore[attr-defined]

    def name(self, index: int) -> str:
        """The image's `file_name`."""
        return self._tables.name(self._rows[index])

    def path(self, index: int) -> Path:
        """The image's file."""
        return self.folder / self.name(index)

    def image(self, index: int) -> Tensor:
        """The image as in its file, turned as its EXIF data say: uint8 [3, h, w] RGB."""
        if self._cache is None:
            return self._decode(index)
        height, width = self._size(index)
        start = self._cache_offsets[index]
        flat = self._cache[start : start + height * width * 3]
        return flat.view(height, width, 3).permute(2, 0, 1)

    def _size(self, index: int) -> tuple[int, int]:
        height, width = self._tables.sizes[self._rows[index]].tolist()
        return height, width

    def _decode(self, index: int) -> Tensor:
        path = self.path(index)
        entry = f"image id {self._tables.image_ids[self._rows[index]]} of {self.annotations}"
        try:
            image = load_tensor(path)
        except UserError as error:
            raise UserError(f"{error} ({entry})") from None
        height, width = self._size(index)
        if image.shape[1:] != (height, width):
            found = f"{image.shape[2]}x{image.shape[1]}"
            raise UserError(f"{path}: the file is {found} pixels, the annotations say {width}x{height} ({entry})")
        return image

    def _decode_all(self) -> Tensor:
        ends = np.cumsum([0] + [height * width * 3 for height, width in self.sizes])
        self._cache_offsets = ends[:-1]
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
