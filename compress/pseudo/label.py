"""Teachers and images → a COCO file of pseudo labels (`pseudo_label`).

Every annotation has a `score`. One with `iscrowd` and `ignore` is a region where something may be: too uncertain to
learn, too likely to call background. `info.coverage` lists the category ids that were looked for. `info.pseudo_labels`
tells how the file came about: hashes of the teachers, thresholds, settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import __version__
from compress.config.teacher import Source
from compress.console import progress
from compress.data.digests import PictureDigests, together
from compress.pseudo import parts
from compress.pseudo.images import Chunk, ImageList, Unreadable, chunk_count, images_in, read_chunks
from compress.pseudo.merge import REST, Boxes, Merging, class_map, in_union, looked_for, merge, split, union_of
from compress.pseudo.parts import Shard, Summary
from compress.teachers.base import BoxTeacher, Sample, View
from compress.teachers.check import class_lines, described
from compress.teachers.load import open_teacher
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import LocalUserError, UserError
from deploy.core.files import naming, need_place, sha256_of
from deploy.core.lock import locked
from deploy.validate.coco import load_annotations, read_annotations
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import score_curves

LOWEST_SCORE = 0.05
"""Detections below it are never looked at, unless a region to ignore may have a lower score."""
LARGEST = 8192
"""Side of a resized image, pixels. Far above what detectors are trained with, and far below what a machine holds."""


@dataclass(frozen=True)
class Settings:
    """Settings of labelling.

    tau: lowest score of a label. tau_ignore: lowest score of a region to ignore, at most tau.
    how, iou_threshold: see `merge.merge`.
    short, long: limits of the keep-ratio resize, pixels; those that the teachers were trained with.
    batch_size: images that go through a teacher at once, at most.
    """

    tau: float = 0.4
    tau_ignore: float = 0.2
    how: Merging = "nms"
    iou_threshold: float = 0.6
    short: int = 800
    long: int = 1333
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.tau_ignore <= self.tau <= 1:
            raise UserError(
                f"thresholds: 0 < tau_ignore <= tau <= 1 is needed, got tau {self.tau}, tau_ignore {self.tau_ignore}"
            )
        if not 0 <= self.iou_threshold < 1:
            raise UserError(f"IoU threshold of the merge: must be at least 0 and below 1, got {self.iou_threshold}")
        if not 1 <= self.short <= self.long <= LARGEST:
            raise UserError(f"image size: 1 <= short <= long <= {LARGEST} is needed, got {self.short} and {self.long}")


@dataclass(frozen=True)
class Labelled:
    """A COCO file with labels, and the folder of its images (None: the file's own)."""

    annotations: Path
    root: Path | None


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher. labels: its classes in the common label space."""

    boxes: BoxTeacher
    labels: list[int]


def pseudo_label(
    sources: Sequence[Source | str | BoxTeacher],
    images: ImageList,
    out: Path,
    settings: Settings,
    *,
    categories: Path | None = None,
    table: Mapping[str, str | None] | None = None,
    thresholds_from: Labelled | None = None,
    shard: Shard = Shard(0, 1),
    device: torch.device | None = None,
    workers: int = 0,
    skip_unreadable: bool = False,
    resume: bool = False,
    replace: bool = False,
    quiet: bool = False,
) -> Summary | None:
    """Label this shard's images, and write `out` if all other shards have done theirs.

    The file is the same for any number of shards and for runs that were interrupted and resumed, on machines that
    compute the same numbers. Memory does not grow with the number of images, but for their names.

    Args:
        sources: the teachers, as `open_teacher` takes them, or open. What those that are opened here look for, and
            what they see, is printed.
        categories: a COCO file whose categories the labels get; default: all classes of all teachers, from 1. A
            teacher that knows its classes by id alone gets their names from it.
        table: see `merge.class_map`.
        thresholds_from: a labelled split; per class the threshold is the one with the best F1 there, and `tau_ignore`
            keeps its ratio to it. A class without a labelled object that a teacher found keeps `settings.tau`.
        device: default: the first GPU, or the one of LOCAL_RANK, or the CPU.
        workers: processes that decode images.
        skip_unreadable: leave out images that cannot be read, and list them in `skipped`; else they are an error.
        resume: go on with what an interrupted run left; pictures that were exchanged since are labelled anew.
        replace: an `out` of other pictures or settings stays until it is replaced; else it is an error.
        quiet: print nothing.

    Returns:
        None while other shards are unfinished.

    Raises:
        UserError: a teacher, a class, an image or a setting is not usable; `out` is there; parts of another run are.
            LocalUserError for what belongs to this shard.
    """
    _check_place(out, shard, resume=resume or replace)
    table = table or {}
    union, teachers = _load(sources, categories, table, device or _default_device())
    for source, teacher in zip(sources, teachers, strict=True):
        if isinstance(source, Source | str) and not quiet:
            for line in _about(teacher, [name for _, name in union], settings):
                print(line)
        note = teacher.boxes.covers(images.ids if images.listed else None, images.names, images.folder)
        if note is not None and not quiet:
            print(note)
    counts = looked_for([teacher.labels for teacher in teachers], len(union))
    tau, tau_ignore = np.full(len(union), settings.tau), np.full(len(union), settings.tau_ignore)
    if thresholds_from is not None:
        tau = _measured(teachers, union, counts, settings, thresholds_from, workers, quiet=quiet)
        tau_ignore = tau * (settings.tau_ignore / settings.tau)
    labeller = _Labeller(images, settings, teachers, union, counts, tau, tau_ignore, workers, skip_unreadable)
    info = labeller.info(table, None if thresholds_from is None else sha256_of(thresholds_from.annotations))
    if out.exists():
        if _is_of(parts.header_of(out), info, images):
            parts.remove(out)
            return None
        if not replace:
            raise UserError(
                f"{out}: already exists, made with other settings or of other pictures; delete it, or name another file"
            )
    document = {"info": info, "categories": [{"id": number, "name": name} for number, name in union]}
    place = parts.parts_folder(out)
    with _of_this_shard(), locked(place / f"{shard.index + 1}-of-{shard.count}.lock", str(out)):
        labeller.write_part(out, shard, document, quiet=quiet)
        summary = parts.join(out, shard.count, chunk_count(images, settings.batch_size))
    parts.remove_empty(out)
    return summary


# --- details --------------------------------------------------------------------------------------------

Union = list[tuple[int, str]]
"""The common label space: (category id, name), the place is the label."""


@dataclass(frozen=True)
class _Labeller:
    """Labelling of one shard, with everything decided.

    union: the common label space. counts: teachers that look for each class, int64 [K].
    tau, tau_ignore: lowest score of a label and of a region, a class, float64 [K].
    """

    images: ImageList
    settings: Settings
    teachers: Sequence[Teacher]
    union: Union
    counts: np.ndarray
    tau: np.ndarray
    tau_ignore: np.ndarray
    workers: int
    skip_unreadable: bool

    def info(self, table: Mapping[str, str | None], thresholds_sha256: str | None) -> dict[str, Any]:
        """Describe which classes were looked for and how the file was made."""
        names = [name for _, name in self.union]
        return {
            "description": "pseudo labels",
            "coverage": [self.union[label][0] for label in np.flatnonzero(self.counts)],
            "pseudo_labels": {
                "version": __version__,
                "teachers": [_provenance(teacher.boxes) for teacher in self.teachers],
                "table": dict(sorted(table.items())),
                **{key: value for key, value in asdict(self.settings).items() if not key.startswith("tau")},
                "thresholds_from": thresholds_sha256,
                "tau": {name: float(value) for name, value in zip(names, self.tau, strict=True)},
                "tau_ignore": {name: float(value) for name, value in zip(names, self.tau_ignore, strict=True)},
                "images_sha256": self.images.sha256(),
            },
        }

    def write_part(self, out: Path, shard: Shard, document: dict[str, Any], *, quiet: bool) -> None:
        """Label the chunks of a shard that are not labelled yet, a line of its part file each."""
        numbers = shard.chunks(chunk_count(self.images, self.settings.batch_size))
        name = "pseudo labels" if shard.count == 1 else f"pseudo labels, shard {shard}"
        files, size, digests = self.images.files, self.settings.batch_size, PictureDigests()

        def pictures(number: int) -> list[str | None]:
            return digests.of(files[number * size : (number + 1) * size])

        done = parts.begin(out, shard, {"document": document}, pictures)
        chunks = _read(self.images, numbers[done:], self.settings, self.teachers, self.workers)
        part = parts.part_file(out, shard)
        with naming(part), open(part, "a", encoding="utf-8") as file, _telling(name, quiet) as advance:
            for number, chunk in zip(numbers[done:], chunks, strict=True):
                parts.append(file, {"number": number, "pictures": pictures(number), **self._labelled(chunk)})
                advance(number // shard.count + 1, len(numbers))

    def _labelled(self, chunk: Chunk) -> dict[str, Any]:
        """COCO rows of a chunk. Raises UserError for an image that cannot be read and is not to be skipped."""
        samples, bad = _sorted_out(chunk)
        if bad and not self.skip_unreadable:
            raise UserError(
                f"{bad[0].reason}; --skip-unreadable, or pseudo_labels.skip_unreadable in a recipe, leaves such images "
                "out"
            )
        lowest = min(LOWEST_SCORE, float(self.tau_ignore.min()))
        merged = _find(self.teachers, samples, self.settings, self.counts, lowest)
        return {
            "images": [_image_row(sample) for sample in samples],
            "annotations": [
                annotation
                for sample, boxes in zip(samples, merged, strict=True)
                for annotation in _annotations(sample, *split(boxes, self.tau, self.tau_ignore), self.union)
            ],
            "skipped": [item.name for item in bad],
        }


def _check_place(out: Path, shard: Shard, *, resume: bool) -> None:
    """Raises UserError where `out` or this shard's part of it cannot be written."""
    if out.suffix != ".json":
        raise UserError(f"{out}: pseudo labels are COCO JSON; name a file that ends in .json")
    need_place(out)
    if out.exists() and not resume:
        raise UserError(f"{out}: already exists; delete it, or name another file")
    with _of_this_shard():
        parts.need_fresh(out, shard, resume=resume)


def _is_of(written: Any, info: Mapping[str, Any], images: ImageList) -> bool:
    """Whether a finished file (its `info`) was made with these settings, of the images as they are now."""
    try:
        settings = dict(written["pseudo_labels"])
        pictures = settings.pop(parts.PICTURES)
    except (TypeError, KeyError, ValueError):
        return False
    same = {**written, "pseudo_labels": settings} == info
    return same and bool(pictures == together(PictureDigests().of(images.files)))


@contextmanager
def _of_this_shard() -> Iterator[None]:
    """A mistake found in here may be this shard's alone, so it is told by the process that has it."""
    try:
        yield
    except UserError as error:
        raise LocalUserError(str(error)) from error


def _about(teacher: Teacher, categories: Sequence[str], settings: Settings) -> Iterator[str]:
    """List in lines what a teacher looks for, and at which size."""
    boxes = teacher.boxes
    yield from class_lines(boxes, teacher.labels, categories)
    if boxes.view is View.RESIZED:
        yield (
            f"teacher {boxes.file} sees images: short side {settings.short}, long side {settings.long}; "
            "--short and --long should be those of its training"
        )
    elif boxes.preprocessing is not None:
        yield f"teacher {boxes.file} sees images: {described(boxes.preprocessing)}"


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _load(
    sources: Sequence[Source | str | BoxTeacher],
    categories: Path | None,
    table: Mapping[str, str | None],
    device: torch.device,
) -> tuple[Union, list[Teacher]]:
    union: Union = []
    if categories is not None:
        union = _categories(categories)
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
    if categories is None:
        union = list(enumerate(union_of([names for _, names in loaded], table), start=1))
    names = [name for _, name in union]
    if not names:
        raise UserError("class map: it drops every class of every teacher, so there is nothing to look for")
    teachers = [
        Teacher(boxes, class_map(theirs, names, table, teacher=f"teacher {boxes.file}")) for boxes, theirs in loaded
    ]
    return union, teachers


def _categories(file: Path) -> Union:
    """Categories of a COCO file; its images and annotations do not matter."""
    union = sorted((row["id"], row["name"]) for row in read_annotations(file)["categories"])
    if not union:
        raise UserError(f"{file}: categories: the list is empty, so there is no class to look for")
    for what, values in zip(("id", "name"), zip(*union, strict=True), strict=True):
        if len(set(values)) < len(union):
            raise UserError(f"{file}: categories: two have the same {what}; ids and names must differ")
    return union


def _measured(
    teachers: Sequence[Teacher],
    union: Union,
    counts: np.ndarray,
    settings: Settings,
    split_: Labelled,
    workers: int,
    *,
    quiet: bool,
) -> np.ndarray:
    """Per class the threshold with the best F1 on a labelled split: float64 [K]. Prints them."""
    images = images_in(split_.annotations, split_.root)
    truth = _truth(split_.annotations, [name for _, name in union])
    for teacher in teachers:
        teacher.boxes.covers(images.ids, images.names, images.folder)
    tables = []
    total = chunk_count(images, settings.batch_size)
    chunks = _read(images, range(total), settings, teachers, workers)
    with _telling("thresholds", quiet) as advance:
        for number, chunk in enumerate(chunks, start=1):
            samples, bad = _sorted_out(chunk)
            if bad:
                raise UserError(bad[0].reason)
            for sample, found in zip(samples, _find(teachers, samples, settings, counts, LOWEST_SCORE), strict=True):
                image = np.full(len(found), sample.image_id, np.int64)
                tables.append(DetectionTable(image, found.labels, found.boxes, found.scores, corners=True))
            advance(number, total)
    tau = np.full(len(union), settings.tau)
    curves = score_curves(truth, DetectionTable.join(tables), range(len(union))).of_each
    for label, ((_, name), curve) in enumerate(zip(union, curves, strict=True)):
        best = curve.best()
        what = f"no labelled object was found, so {settings.tau:g} as given"
        if best is not None:
            tau[label] = curve.scores[best]
            what = f"{tau[label]:.3f}, F1 {curve.f1[best]:.3f}"
        if not quiet and counts[label]:
            print(f"threshold of {name}: {what}")
    return tau


def _truth(annotations: Path, names: list[str]) -> GroundTruth:
    """Labels of a class in `names`, with its place there as the category."""
    document = load_annotations(annotations)
    known = sorted((row for row in document["categories"] if row["name"] in names), key=lambda row: row["id"])
    if not known:
        raise UserError(f"{annotations}: categories: none has the name of a class that the teachers know")
    truth = GroundTruth.of({**document, "categories": known})
    labels = np.array([names.index(row["name"]) for row in known], np.int32)
    ids = np.arange(len(names), dtype=np.int64)
    return replace(truth, category_ids=ids, names=names, categories=labels[truth.categories])


def _provenance(teacher: BoxTeacher) -> dict[str, Any]:
    settings = {"settings": dict(teacher.settings)} if teacher.settings else {}
    return {"file": teacher.file, "sha256": teacher.sha256} | settings


def _read(
    images: ImageList, numbers: Sequence[int], settings: Settings, teachers: Sequence[Teacher], workers: int
) -> Iterator[Chunk]:
    return read_chunks(
        images,
        numbers,
        size=settings.batch_size,
        short=settings.short,
        long=settings.long,
        workers=workers,
        views={teacher.boxes.view for teacher in teachers},
    )


def _find(
    teachers: Sequence[Teacher], samples: Sequence[Sample], settings: Settings, counts: np.ndarray, lowest: float
) -> list[Boxes]:
    """Merged boxes of each image."""
    found: list[list[Boxes]] = [[] for _ in samples]
    for teacher in teachers:
        detections = teacher.boxes.detect(samples, score_threshold=lowest)
        for mine, one in zip(found, detections, strict=True):
            boxes = one.boxes.double().cpu().numpy(), one.scores.double().cpu().numpy(), one.labels.cpu().numpy()
            mine.append(in_union(Boxes(*boxes), teacher.labels))
    return [merge(one, how=settings.how, iou_threshold=settings.iou_threshold, counts=counts) for one in found]


def _sorted_out(chunk: Chunk) -> tuple[list[Sample], list[Unreadable]]:
    return [item for item in chunk if isinstance(item, Sample)], [
        item for item in chunk if isinstance(item, Unreadable)
    ]


def _image_row(sample: Sample) -> dict[str, Any]:
    height, width = sample.size.original
    return {"id": sample.image_id, "file_name": sample.name, "width": width, "height": height}


def _annotations(sample: Sample, labels: Boxes, regions: Boxes, union: Union) -> Iterator[dict[str, Any]]:
    """COCO rows without id, rounded to a hundredth of a pixel: what lies below is noise of the arithmetic."""
    for found, ignore in ((labels, 0), (regions, 1)):
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (round(float(side), 2) for side in box)
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            if width > 0 and height > 0:
                yield {
                    "image_id": sample.image_id,
                    "category_id": union[label][0],
                    "bbox": [x1, y1, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": ignore,
                    "ignore": ignore,
                    "score": round(float(score), 4),
                }


def _telling(what: str, quiet: bool) -> Any:
    return nullcontext(lambda done, total: None) if quiet else progress(what)
