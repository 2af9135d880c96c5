"""What the teachers find in the images, chunk by chunk, in the common label space: here, or on a Ray cluster.

A chunk holds the images that go through a teacher at once, and what is found in it depends on nothing else. So the same
comes out of one process and of many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from compress.config.teacher import Source
from compress.data.digests import PictureDigests
from compress.pseudo.images import Chunk, ImageList, Unreadable, chunk_count, read_chunks
from compress.pseudo.merge import REST, Boxes, class_map, in_union, looked_for, merge, union_of
from compress.pseudo.settings import Settings
from compress.teachers.base import BoxTeacher, Sample
from compress.teachers.load import open_teacher
from deploy.core.errors import UserError
from deploy.core.on_ray import Cluster, map_in_order
from deploy.validate.coco import read_annotations

Union = list[tuple[int, str]]
"""The common label space: (category id, name), the place is the label."""


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher. labels: its classes in the common label space. size: (short, long) of what it is shown."""

    boxes: BoxTeacher
    labels: list[int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Image:
    """An image that was read, and what was found in it. size: (height, width) of its file, pixels."""

    image_id: int
    name: str
    size: tuple[int, int]
    boxes: Boxes


@dataclass(frozen=True)
class Found:
    """Of a chunk: its images, those that cannot be read, and the digests of all its files, in order."""

    images: list[Image]
    unreadable: list[Unreadable]
    pictures: list[str | None]


@dataclass(frozen=True)
class Finder:
    """Teachers at work, in this process.

    counts: teachers that look for each class, int64 [K]. lowest: detections with a lower score are not looked at.
    workers: processes that decode.
    """

    teachers: Sequence[Teacher]
    counts: np.ndarray
    settings: Settings
    lowest: float
    workers: int

    def find(self, images: ImageList, numbers: range) -> Iterator[Found]:
        """What is in the chunks with these numbers, in this order. Raises LocalUserError for an image whose size is not
        the one that the list says."""
        digests, size = PictureDigests(), self.settings.batch_size
        for number, shown in zip(numbers, self._read(images, numbers), strict=True):
            samples = {limits: [item for item in chunk if isinstance(item, Sample)] for limits, chunk in shown.items()}
            found = [
                Image(sample.image_id, sample.name, sample.size.original, boxes)
                for sample, boxes in zip(samples[self.teachers[0].size], self._boxes(samples), strict=True)
            ]
            bad = [item for item in next(iter(shown.values())) if isinstance(item, Unreadable)]  # the same at all sizes
            yield Found(found, bad, digests.of(images.files[number * size : (number + 1) * size]))

    def _read(self, images: ImageList, numbers: Sequence[int]) -> Iterator[dict[tuple[int, int], Chunk]]:
        """The chunks at each size, (short, long), that a teacher sees. Images are decoded anew for each size, which is
        rarely more than one."""
        sizes = list(dict.fromkeys(teacher.size for teacher in self.teachers))
        readers = [
            read_chunks(
                images,
                numbers,
                size=self.settings.batch_size,
                short=short,
                long=long,
                workers=self.workers,
                views={teacher.boxes.view for teacher in self.teachers if teacher.size == (short, long)},
            )
            for short, long in sizes
        ]
        for chunks in zip(*readers, strict=True):
            yield dict(zip(sizes, chunks, strict=True))

    def _boxes(self, samples: Mapping[tuple[int, int], Sequence[Sample]]) -> list[Boxes]:
        """Merged boxes of each image."""
        found: list[list[Boxes]] = [[] for _ in samples[self.teachers[0].size]]
        for teacher in self.teachers:
            detections = teacher.boxes.detect(samples[teacher.size], score_threshold=self.lowest)
            for mine, one in zip(found, detections, strict=True):
                boxes = one.boxes.double().cpu().numpy(), one.scores.double().cpu().numpy(), one.labels.cpu().numpy()
                mine.append(in_union(Boxes(*boxes), teacher.labels))
        settings = self.settings
        return [merge(one, how=settings.how, iou_threshold=settings.iou_threshold, counts=self.counts) for one in found]


@dataclass(frozen=True)
class RayFinder:
    """The same on a Ray cluster, whose nodes see all files under the same names.

    sources: the teachers, which each actor opens. union, table: what they are opened for (`open_teachers`).
    """

    cluster: Cluster
    sources: Sequence[Source | str]
    union: Union
    table: Mapping[str, str | None]
    settings: Settings
    lowest: float
    workers: int

    def find(self, images: ImageList, numbers: range) -> Iterator[Found]:
        """As `Finder.find`, for numbers in steps of one: the cluster divides the work, not shards."""
        assert numbers.step == 1 or len(numbers) < 2
        size = self.settings.batch_size
        together = max(1, self.cluster.images // size)
        firsts = range(numbers.start, numbers.stop, together)
        pieces = [images.part(first * size, (min(first + together, numbers.stop) - first) * size) for first in firsts]
        for found in map_in_order(self.cluster, partial(_Actor, self), pieces):
            yield from found


def open_teachers(
    sources: Sequence[Source | str | BoxTeacher],
    union: Union,
    table: Mapping[str, str | None],
    settings: Settings,
    device: torch.device | None,
) -> tuple[Union, list[Teacher]]:
    """The teachers, and the common label space.

    Args:
        union: the label space, or empty for all classes of all teachers. A teacher that knows its classes by id alone
            gets their names from it.
        table: see `merge.class_map`.
        device: for those that are opened here; None: the first GPU, or the one of LOCAL_RANK, or the CPU.

    Raises UserError: a teacher cannot be opened, or a class has no place.
    """
    device = device or _default_device()
    loaded = []
    for source in sources:
        boxes: BoxTeacher
        if isinstance(source, Source | str):
            boxes = open_teacher(source, device, categories=dict(union) or None)
        else:
            boxes = source
        if boxes.class_names is None:
            raise UserError(f"teacher {boxes.file}: does not name its classes, so they cannot be matched")
        loaded.append((boxes, boxes.class_names))
    known = {name for _, names in loaded for name in names}
    unknown = sorted(set(table) - known - {REST})
    if unknown:
        raise UserError(f"class map: no teacher has a class {unknown[0]!r}; they have {', '.join(sorted(known))}")
    union = union or list(enumerate(union_of([names for _, names in loaded], table), start=1))
    names = [name for _, name in union]
    if not names:
        raise UserError("class map: it drops every class of every teacher, so there is nothing to look for")
    sizes = settings.sizes([boxes for boxes, _ in loaded])
    teachers = [
        Teacher(boxes, class_map(theirs, names, table, teacher=f"teacher {boxes.file}"), size)
        for (boxes, theirs), size in zip(loaded, sizes, strict=True)
    ]
    return union, teachers


def categories_of(file: Path) -> Union:
    """Categories of a COCO file; its images and annotations do not matter. Raises UserError where they name no label
    space."""
    union = sorted((row["id"], row["name"]) for row in read_annotations(file)["categories"])
    if not union:
        raise UserError(f"{file}: categories: the list is empty, so there is no class to look for")
    for what, values in zip(("id", "name"), zip(*union, strict=True), strict=True):
        if len(set(values)) < len(union):
            raise UserError(f"{file}: categories: two have the same {what}; ids and names must differ")
    return union


# --- details --------------------------------------------------------------------------------------------


class _Actor:
    """A `Finder` of its own, for pieces of the list of images."""

    def __init__(self, wanted: RayFinder) -> None:
        union, teachers = open_teachers(wanted.sources, wanted.union, wanted.table, wanted.settings, None)
        counts = looked_for([teacher.labels for teacher in teachers], len(union))
        self._finder = Finder(teachers, counts, wanted.settings, wanted.lowest, wanted.workers)

    def __call__(self, piece: ImageList) -> list[Found]:
        return list(self._finder.find(piece, range(chunk_count(piece, self._finder.settings.batch_size))))


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
