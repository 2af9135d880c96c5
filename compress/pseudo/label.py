"""Teachers and images → a COCO file of pseudo labels (`pseudo_label`).

Every annotation has a `score`. One with `iscrowd` and `ignore` is a region where something may be: too uncertain to
learn, too likely to call background. `info.coverage` lists the category ids that were looked for. `info.pseudo_labels`
tells how the file came about: hashes of the teachers, thresholds, settings.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from compress.pseudo.merge import REST, Boxes, class_map, in_union, looked_for, merge, split, union_of
from compress.pseudo.parts import Shard, Summary
from compress.pseudo.settings import Settings, unlike
from compress.teachers.base import BoxTeacher, Sample, View
from compress.teachers.check import class_lines
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


@dataclass(frozen=True)
class Labelled:
    """A COCO file with labels, and the folder of its images (None: the file's own)."""

    annotations: Path
    root: Path | None


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher. labels: its classes in the common label space. size: (short, long) of what it is shown."""

    boxes: BoxTeacher
    labels: list[int]
    size: tuple[int, int]


def pseudo_label(
    sources: Sequence[Source | str | BoxTeacher],
    images: ImageList,
    out: Path,
    settings: Settings,
    *,
    categories: Path | None = None,
    table: Mapping[str, str | None] | None = None,
    thresholds_from: Labelled | None = None,
    like: Labelled | None = None,
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
            keeps its ratio to it. A class without a labelled object that a teacher found keeps the threshold that there
            is without the split.
        like: labelled images of the same kind, `thresholds_from` unless given: where their number of boxes a picture is
            far from that of the labels, the process that writes `out` prints a warning, even if `quiet`.
        device: default: the first GPU, or the one of LOCAL_RANK, or the CPU.
        workers: processes that decode images.
        skip_unreadable: leave out images that cannot be read, and list them in `skipped`; else they are an error.
        resume: go on with what an interrupted run left; pictures that were exchanged since are labelled anew.
        replace: an `out` of other pictures or settings stays until it is replaced; else it is an error.
        quiet: print nothing else.

    Returns:
        None while other shards are unfinished.

    Raises:
        UserError: a teacher, a class, an image or a setting is not usable; `out` is there; parts of another run are.
            LocalUserError for what belongs to this shard.
    """
    _check_place(out, shard, resume=resume or replace)
    table = table or {}
    union, teachers = _load(sources, categories, table, device or _default_device(), settings)
    for source, teacher in zip(sources, teachers, strict=True):
        if isinstance(source, Source | str) and not quiet:
            of_classes = class_lines(teacher.boxes, teacher.labels, [name for _, name in union])
            print(*of_classes, *settings.size_lines(teacher.boxes), sep="\n")
        note = teacher.boxes.covers(images.ids if images.listed else None, images.names, images.folder)
        if note is not None and not quiet:
            print(note)
    counts = looked_for([teacher.labels for teacher in teachers], len(union))
    tau, tau_ignore = _thresholds(teachers, union, counts, settings, thresholds_from, workers, quiet=quiet)
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
    like = like or thresholds_from
    if summary is not None and summary.images and like is not None:
        _compare(summary, like.annotations, {name for (_, name), count in zip(union, counts, strict=True) if count})
    return summary


# --- details --------------------------------------------------------------------------------------------

Union = list[tuple[int, str]]
"""The common label space: (category id, name), the place is the label."""


Shown = dict[tuple[int, int], Chunk]
"""One chunk of images at each size, (short, long), that a teacher sees."""


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
                "teachers": [_provenance(teacher, self.settings) for teacher in self.teachers],
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

    def _labelled(self, chunk: Shown) -> dict[str, Any]:
        """COCO rows of a chunk. Raises UserError for an image that cannot be read and is not to be skipped."""
        samples, bad = _sorted_out(chunk)
        if bad and not self.skip_unreadable:
            raise UserError(
                f"{bad[0].reason}; --skip-unreadable, or pseudo_labels.skip_unreadable in a recipe, leaves such images "
                "out"
            )
        lowest = min(LOWEST_SCORE, float(self.tau_ignore.min()))
        merged = _find(self.teachers, samples, self.settings, self.counts, lowest)
        listed = samples[self.teachers[0].size]
        return {
            "images": [_image_row(sample) for sample in listed],
            "annotations": [
                annotation
                for sample, boxes in zip(listed, merged, strict=True)
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


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _load(
    sources: Sequence[Source | str | BoxTeacher],
    categories: Path | None,
    table: Mapping[str, str | None],
    device: torch.device,
    settings: Settings,
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
    sizes = settings.sizes([boxes for boxes, _ in loaded])
    teachers = [
        Teacher(boxes, class_map(theirs, names, table, teacher=f"teacher {boxes.file}"), size)
        for (boxes, theirs), size in zip(loaded, sizes, strict=True)
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


def _thresholds(
    teachers: Sequence[Teacher],
    union: Union,
    counts: np.ndarray,
    settings: Settings,
    split_: Labelled | None,
    workers: int,
    *,
    quiet: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Per class the lowest score of a label and of a region: float64 [K] each. Says where they come from."""
    label_from, region_from, why = settings.thresholds([teacher.boxes for teacher in teachers])
    if split_ is not None:
        tau = _measured(teachers, union, counts, settings, label_from, split_, workers, quiet=quiet)
        return tau, tau * (region_from / label_from)
    if settings.tau is None and not quiet:
        print(f"threshold: {label_from:.3g} ({region_from:.3g} for regions to ignore), {why}")
    return np.full(len(union), label_from), np.full(len(union), region_from)


def _measured(
    teachers: Sequence[Teacher],
    union: Union,
    counts: np.ndarray,
    settings: Settings,
    otherwise: float,
    split_: Labelled,
    workers: int,
    *,
    quiet: bool,
) -> np.ndarray:
    """Per class the threshold with the best F1 on a labelled split, or `otherwise`: float64 [K]. Prints them."""
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
            merged = _find(teachers, samples, settings, counts, LOWEST_SCORE)
            for sample, found in zip(samples[teachers[0].size], merged, strict=True):
                image = np.full(len(found), sample.image_id, np.int64)
                tables.append(DetectionTable(image, found.labels, found.boxes, found.scores, corners=True))
            advance(number, total)
    tau = np.full(len(union), otherwise)
    curves = score_curves(truth, DetectionTable.join(tables), range(len(union))).of_each
    for label, ((_, name), curve) in enumerate(zip(union, curves, strict=True)):
        best = curve.best()
        what = f"no labelled object was found, so {otherwise:g}"
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


def _compare(summary: Summary, annotations: Path, names: Collection[str]) -> None:
    """Print a warning where people drew far more or fewer boxes of these classes in an image; crowds do not count."""
    document = load_annotations(annotations)
    ids = {row["id"] for row in document["categories"] if row["name"] in names}
    drawn = sum(row["category_id"] in ids and not row.get("iscrowd", 0) for row in document["annotations"])
    labelled = drawn / max(1, len(document["images"]))
    warning = unlike(summary.labels / summary.images, labelled, str(annotations))
    if warning is not None:
        print(warning)


def _provenance(teacher: Teacher, settings: Settings) -> dict[str, Any]:
    """What the labels depend on: the teacher, and its size where the settings leave that to it."""
    boxes = teacher.boxes
    own: dict[str, Any] = {"settings": dict(boxes.settings)} if boxes.settings else {}
    if settings.short is None and boxes.view is View.RESIZED:
        own |= dict(zip(("short", "long"), teacher.size, strict=True))
    return {"file": boxes.file, "sha256": boxes.sha256} | own


def _read(
    images: ImageList, numbers: Sequence[int], settings: Settings, teachers: Sequence[Teacher], workers: int
) -> Iterator[Shown]:
    """The chunks as the teachers see them. Images are decoded anew for each size, which is rarely more than one."""
    sizes = list(dict.fromkeys(teacher.size for teacher in teachers))
    readers = [
        read_chunks(
            images,
            numbers,
            size=settings.batch_size,
            short=short,
            long=long,
            workers=workers,
            views={teacher.boxes.view for teacher in teachers if teacher.size == (short, long)},
        )
        for short, long in sizes
    ]
    for chunks in zip(*readers, strict=True):
        yield dict(zip(sizes, chunks, strict=True))


def _find(
    teachers: Sequence[Teacher],
    samples: Mapping[tuple[int, int], Sequence[Sample]],
    settings: Settings,
    counts: np.ndarray,
    lowest: float,
) -> list[Boxes]:
    """Merged boxes of each image."""
    found: list[list[Boxes]] = [[] for _ in samples[teachers[0].size]]
    for teacher in teachers:
        detections = teacher.boxes.detect(samples[teacher.size], score_threshold=lowest)
        for mine, one in zip(found, detections, strict=True):
            boxes = one.boxes.double().cpu().numpy(), one.scores.double().cpu().numpy(), one.labels.cpu().numpy()
            mine.append(in_union(Boxes(*boxes), teacher.labels))
    return [merge(one, how=settings.how, iou_threshold=settings.iou_threshold, counts=counts) for one in found]


def _sorted_out(shown: Shown) -> tuple[dict[tuple[int, int], list[Sample]], list[Unreadable]]:
    """The images that can be read, at each size; and those that cannot, which are the same at all sizes."""
    samples = {size: [item for item in chunk if isinstance(item, Sample)] for size, chunk in shown.items()}
    return samples, [item for item in next(iter(shown.values())) if isinstance(item, Unreadable)]


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
