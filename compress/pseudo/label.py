"""Teachers and images → a COCO file of pseudo labels (`pseudo_label`).

Every annotation has a `score`. One with `iscrowd` and `ignore` is a region where something may be: too uncertain to
learn, too likely to call background. `info.coverage` lists the category ids that were looked for. `info.pseudo_labels`
tells how the file came about: hashes of the teachers, thresholds, settings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from compress.pseudo.find import Finder, Found, Image, RayFinder, Teacher, Union, categories_of, open_teachers
from compress.pseudo.images import ImageList, chunk_count, images_in
from compress.pseudo.merge import Boxes, looked_for, split
from compress.pseudo.parts import Shard, Summary
from compress.pseudo.settings import Settings, unlike
from compress.teachers.base import BoxTeacher, View
from compress.teachers.check import class_lines
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import LocalUserError, UserError
from deploy.core.files import naming, need_place, sha256_of
from deploy.core.lock import locked
from deploy.core.on_ray import Cluster
from deploy.validate.coco import load_annotations
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import score_curves

LOWEST_SCORE = 0.05
"""Detections below it are never looked at, unless a region to ignore may have a lower score."""


@dataclass(frozen=True)
class Labelled:
    """A COCO file with labels, and the folder of its images (None: the file's own)."""

    annotations: Path
    root: Path | None


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
    cluster: Cluster | None = None,
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
        cluster: let the actors of a Ray cluster do the work. They open the teachers for themselves, so these must be
            sources, and the shard the only one.
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
    union = [] if categories is None else categories_of(categories)
    union, teachers = open_teachers(sources, union, table, settings, device)
    _tell(sources, teachers, union, images, settings, quiet=quiet)
    counts = looked_for([teacher.labels for teacher in teachers], len(union))

    def finder(lowest: float) -> Finder | RayFinder:
        if cluster is None:
            return Finder(teachers, counts, settings, lowest, workers)
        return RayFinder(cluster, _reopened(sources, shard), union, table, settings, lowest, workers)

    tau, tau_ignore = _thresholds(teachers, union, counts, settings, thresholds_from, finder, quiet=quiet)
    lowest = finder(min(LOWEST_SCORE, float(tau_ignore.min())))
    labeller = _Labeller(images, settings, teachers, union, counts, tau, tau_ignore, lowest, skip_unreadable)
    info = labeller.info(table, None if thresholds_from is None else sha256_of(thresholds_from.annotations))
    if _is_done(out, info, images, replace=replace):
        return None
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


@dataclass(frozen=True)
class _Labeller:
    """Labelling of one shard, with everything decided.

    union: the common label space. counts: teachers that look for each class, int64 [K].
    tau, tau_ignore: lowest score of a label and of a region, a class, float64 [K]. finder: does the work.
    """

    images: ImageList
    settings: Settings
    teachers: Sequence[Teacher]
    union: Union
    counts: np.ndarray
    tau: np.ndarray
    tau_ignore: np.ndarray
    finder: Finder | RayFinder
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
        chunks = self.finder.find(self.images, numbers[done:])
        part = parts.part_file(out, shard)
        with naming(part), open(part, "a", encoding="utf-8") as file, _telling(name, quiet) as advance:
            for number, found in zip(numbers[done:], chunks, strict=True):
                parts.append(file, {"number": number, "pictures": found.pictures, **self._labelled(found)})
                advance(number // shard.count + 1, len(numbers))

    def _labelled(self, found: Found) -> dict[str, Any]:
        """COCO rows of a chunk. Raises UserError for an image that cannot be read and is not to be skipped."""
        if found.unreadable and not self.skip_unreadable:
            raise UserError(
                f"{found.unreadable[0].reason}; --skip-unreadable, or pseudo_labels.skip_unreadable in a recipe, "
                "leaves such images out"
            )
        return {
            "images": [_image_row(image) for image in found.images],
            "annotations": [
                annotation
                for image in found.images
                for annotation in _annotations(image, *split(image.boxes, self.tau, self.tau_ignore), self.union)
            ],
            "skipped": [item.name for item in found.unreadable],
        }


def _tell(
    sources: Sequence[Source | str | BoxTeacher],
    teachers: Sequence[Teacher],
    union: Union,
    images: ImageList,
    settings: Settings,
    *,
    quiet: bool,
) -> None:
    """Print what the teachers look for and see, of those that were opened here.

    Raises UserError where one knows nothing about the images."""
    for source, teacher in zip(sources, teachers, strict=True):
        if isinstance(source, Source | str) and not quiet:
            of_classes = class_lines(teacher.boxes, teacher.labels, [name for _, name in union])
            print(*of_classes, *settings.size_lines(teacher.boxes), sep="\n")
        note = teacher.boxes.covers(images.ids if images.listed else None, images.names, images.folder)
        if note is not None and not quiet:
            print(note)


def _reopened(sources: Sequence[Source | str | BoxTeacher], shard: Shard) -> list[Source | str]:
    """The sources, for others to open."""
    if shard.count > 1:
        raise UserError("shard: a Ray cluster divides the work itself; start one command, without shards or torchrun")
    named = [source for source in sources if isinstance(source, Source | str)]
    if len(named) < len(sources):
        raise UserError("teachers: a Ray cluster opens them for itself; give files or sources, not open teachers")
    return named


def _check_place(out: Path, shard: Shard, *, resume: bool) -> None:
    """Raises UserError where `out` or this shard's part of it cannot be written."""
    if out.suffix != ".json":
        raise UserError(f"{out}: pseudo labels are COCO JSON; name a file that ends in .json")
    need_place(out)
    if out.exists() and not resume:
        raise UserError(f"{out}: already exists; delete it, or name another file")
    with _of_this_shard():
        parts.need_fresh(out, shard, resume=resume)


def _is_done(out: Path, info: Mapping[str, Any], images: ImageList, *, replace: bool) -> bool:
    """Whether the file is there; what a kill left of its parts is removed. Raises UserError where another one stands in
    its place and is not to be replaced."""
    if not out.exists():
        return False
    if _is_of(parts.header_of(out), info, images):
        parts.remove(out)
        return True
    if not replace:
        raise UserError(
            f"{out}: already exists, made with other settings or of other pictures; delete it, or name another file"
        )
    return False


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


def _thresholds(
    teachers: Sequence[Teacher],
    union: Union,
    counts: np.ndarray,
    settings: Settings,
    split_: Labelled | None,
    finder: Callable[[float], Finder | RayFinder],
    *,
    quiet: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Per class the lowest score of a label and of a region: float64 [K] each. Says where they come from."""
    label_from, region_from, why = settings.thresholds([teacher.boxes for teacher in teachers])
    if split_ is not None:
        tau = _measured(teachers, union, counts, settings, label_from, split_, finder(LOWEST_SCORE), quiet=quiet)
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
    finder: Finder | RayFinder,
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
    with _telling("thresholds", quiet) as advance:
        for number, found in enumerate(finder.find(images, range(total)), start=1):
            if found.unreadable:
                raise UserError(found.unreadable[0].reason)
            for image in found.images:
                ids, boxes = np.full(len(image.boxes), image.image_id, np.int64), image.boxes
                tables.append(DetectionTable(ids, boxes.labels, boxes.boxes, boxes.scores, corners=True))
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


def _image_row(image: Image) -> dict[str, Any]:
    height, width = image.size
    return {"id": image.image_id, "file_name": image.name, "width": width, "height": height}


def _annotations(image: Image, labels: Boxes, regions: Boxes, union: Union) -> Iterator[dict[str, Any]]:
    """COCO rows without id, rounded to a hundredth of a pixel: what lies below is noise of the arithmetic."""
    for found, ignore in ((labels, 0), (regions, 1)):
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (round(float(side), 2) for side in box)
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            if width > 0 and height > 0:
                yield {
                    "image_id": image.image_id,
                    "category_id": union[label][0],
                    "bbox": [x1, y1, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": ignore,
                    "ignore": ignore,
                    "score": round(float(score), 4),
                }


def _telling(what: str, quiet: bool) -> Any:
    return nullcontext(lambda done, total: None) if quiet else progress(what)
