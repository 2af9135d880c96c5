"""The stage of a run in which teachers label the images that have no labels.

    found = label_images(fabric, recipe, data, manifest, resume=…)
    train on found.images           # labelled by people, and by teachers

Each list of images (what `labels` left without labels, and each folder) is a stage of the manifest and a COCO file in
`<run>/pseudo`. With several processes each labels its share.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console

from compress.config.data import Split
from compress.config.families import families_with
from compress.config.pseudo import FineTune, PseudoLabels
from compress.config.recipe import Recipe
from compress.config.teacher import Source
from compress.config.train import Schedule, Train
from compress.data.coco import CocoDetection
from compress.data.concat import Joined
from compress.data.transforms import eval_transform
from compress.detectors.build import detector_class
from compress.manifest import Manifest
from compress.pseudo import parts
from compress.pseudo.images import ImageList, images_in
from compress.pseudo.label import LOWEST_SCORE, Labelled, Settings, pseudo_label
from compress.pseudo.merge import class_map
from compress.pseudo.parts import Shard
from compress.run.data import Datasets
from compress.teachers.base import BoxTeacher
from compress.teachers.check import check_teacher, seen_images
from compress.teachers.load import open_teacher
from compress.training.distributed import on_first_process
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.validate.coco import read_annotations

STAGE = "pseudo labels"
"""First words of the manifest's rows."""
REST = "training images"
"""Name of the list of images that the recipe's `labels` left without labels; folders are named by their number."""


FIRST_STAGE = "student.pseudo"
"""Name of the student's training on pseudo labels, if it is fine-tuned afterwards."""


@dataclass
class PseudoLabelled:
    """images: to train on, labelled ones first. identity: of what the teachers' labels are (JSON-able)."""

    images: Joined
    identity: dict[str, Any]


def folder_of(run_dir: Path) -> Path:
    """Where a run's pseudo labels lie."""
    return run_dir / "pseudo"


def is_unfinished(recipe: Recipe) -> bool:
    """Was the labelling of one of the recipe's lists interrupted?"""
    return any(parts.parts_folder(_file_of(recipe.run_dir, name)).is_dir() for name in _list_names(recipe))


def check_labelled(recipe: Recipe, data: Datasets) -> None:
    """Would the trainings on the labelled images alone be refused? Asked before the long work that precedes them.

    Raises UserError for too few images for a batch, or too few steps for the warm-up.
    """
    settings, found = recipe.pseudo_labels, len(data.train)
    if recipe.baseline and recipe.train.batch_size > found:
        raise UserError(f"train.batch_size {recipe.train.batch_size} is more than the {found} images of the baseline")
    if settings is None or settings.fine_tune is None:
        return
    train = fine_tuning(recipe.train, settings.fine_tune)
    if train.batch_size > found:
        raise UserError(
            f"pseudo_labels.fine_tune: batches of {train.batch_size} images, and only {found} have labels; set its "
            f"batch_size to {found} or less"
        )
    steps = train.steps or (train.epochs or 0) * (found // train.batch_size)
    if train.schedule.warmup_steps >= steps:
        raise UserError(
            f"pseudo_labels.fine_tune.warmup_steps: {train.schedule.warmup_steps} warm-up steps leave nothing of "
            f"{steps} steps; set it to {steps // 10}"
        )


def label_images(
    fabric: Fabric, recipe: Recipe, data: Datasets, manifest: Manifest, console: Console, *, resume: bool
) -> PseudoLabelled:
    """Let the recipe's teachers label what has no labels, and join it with what has.

    Raises:
        UserError: a teacher cannot be opened or knows a class that the data does not, an image cannot be read, or no
            label was found.
    """
    settings = recipe.pseudo_labels
    assert settings is not None, "the caller looks"
    names = dict(zip(data.train.category_ids, data.train.categories, strict=True))
    teachers = [open_teacher(source, fabric.device, categories=names) for source in sources(recipe)]
    least = settings.min_map
    if settings.teachers is None and recipe.teacher is not None:
        least = max(least, recipe.teacher.min_map)
    how = how_to_label(recipe, settings)
    val = data.val
    if settings.short is not None:
        val = CocoDetection(data.val_split.annotations, data.val_split.images, eval_transform(how.short, how.long))
    labels = labels_of(recipe, teachers, data.train.categories)
    for number, (teacher, of_teacher) in enumerate(zip(teachers, labels, strict=True), start=1):
        check_teacher(
            teacher,
            of_teacher,
            val,
            manifest,
            stage=f"{STAGE}: check of teacher {number}",
            identity={**data.identity, "limits": [how.short, how.long]},
            seen=seen_images(how.short, how.long),
            least=least,
            say=console.print,
            write=fabric.is_global_zero,
        )
    found: list[CocoDetection] = []
    hashes: list[str] = []
    totals = {"images": 0, "labels": 0, "regions": 0, "skipped": 0}
    lists = list(image_lists(settings, data, console))
    for _, images in lists:  # of all, before any is labelled: a results file may take one image for another
        for teacher in teachers:
            teacher.covers(images.ids if images.listed else None, images.names, images.folder)
    for name, images in lists:
        out = _file_of(recipe.run_dir, name)
        inputs = {
            "images": images.sha256(),
            "teachers": [{"sha256": teacher.sha256, "settings": dict(teacher.settings)} for teacher in teachers],
            "settings": settings.model_dump(
                mode="json",
                exclude={"teachers", "unlabeled", "min_map", "weighting", "fine_tune", "thresholds", "short", "long"},
            ),
            "limits": [how.short, how.long],
            "categories": sorted(names.items()),
            "thresholds_from": sha256_of(data.train_split.annotations) if settings.thresholds == "best_f1" else None,
        }

        def label(images: ImageList = images, out: Path = out) -> dict[str, Any]:
            return _label(fabric, recipe, data, teachers, images, out, how, resume=resume)

        counts = manifest.stage(f"{STAGE}: {name}", inputs, [out], label, write=fabric.is_global_zero)
        totals = {key: totals[key] + counts[key] for key in totals}
        hashes.append(sha256_of(out))
        if counts["labels"]:
            found.append(
                CocoDetection(
                    out,
                    images.folder,
                    data.train.transform,
                    cache=recipe.data.cache,
                    drop_empty=recipe.data.drop_empty,
                    drop_unsure=True,
                    scores=settings.weighting == "score",
                )
            )
    console.print(
        f"pseudo labels: {totals['labels']} labels and {totals['regions']} unsure regions in {totals['images']} images"
        + (f", {totals['skipped']} unreadable images left out" if totals["skipped"] else "")
        + f", by {', '.join(teacher.file for teacher in teachers)}"
    )
    if not found:
        raise UserError(
            f"pseudo_labels: the teachers found no label in {totals['images']} images; lower pseudo_labels.tau "
            f"({settings.tau:g}), or check that the images are of their kind and size"
        )
    labelled = [data.train] if data.has_labels else []
    return PseudoLabelled(Joined([*labelled, *found]), {"pseudo_labels": hashes, "weighting": settings.weighting})


def fine_tuning(train: Train, settings: FineTune) -> Train:
    """The settings of the second stage."""
    lr = train.optimizer.lr / 10 if settings.lr is None else settings.lr
    schedule = Schedule(name="cosine", warmup_steps=settings.warmup_steps)
    return train.model_copy(
        update={
            "epochs": settings.epochs,
            "steps": settings.steps,
            "batch_size": settings.batch_size or train.batch_size,
            "optimizer": train.optimizer.model_copy(update={"lr": lr}),
            "schedule": schedule,
        }
    )


def labelling_stages(recipe: Recipe, stages: Mapping[str, Any]) -> list[str]:
    """Names of the manifest's rows that say what was labelled, in the order of the recipe's lists."""
    return [row for name in _list_names(recipe) if (row := f"{STAGE}: {name}") in stages]


def how_to_label(recipe: Recipe, settings: PseudoLabels) -> Settings:
    return Settings(
        tau=settings.tau,
        tau_ignore=settings.tau_ignore,
        how=settings.merge,
        iou_threshold=settings.iou,
        short=recipe.data.eval_short if settings.short is None else settings.short,
        long=recipe.data.long if settings.long is None else settings.long,
        batch_size=settings.batch_size,
    )


def rehearse(recipe: Recipe, data: Datasets, teachers: list[BoxTeacher], folder: Path, console: Console) -> Joined:
    """For a dry run: label the images of `data.train` in `folder`, and join that with `data.train`. `data` may be made
    up; labels are rare then, and thresholds are not applied."""
    settings = recipe.pseudo_labels
    assert settings is not None
    labels_of(recipe, teachers, data.train.categories)
    for source in settings.unlabeled:
        if source.is_dir():
            console.print(f"pseudo labels: {len(images_in(source))} images in {source}")
        else:
            console.print(f"dry run: {source} is not there; the run will need it")
    out = folder / "pseudo.json"
    split = data.train_split
    lowest = replace(how_to_label(recipe, settings), tau=LOWEST_SCORE, tau_ignore=LOWEST_SCORE)
    pseudo_label(
        teachers, images_in(split.annotations, split.images), out, lowest,
        categories=split.annotations, table=settings.class_map, quiet=True,
    )  # fmt: skip
    rows = read_annotations(out)["annotations"]
    console.print(f"pseudo labels: {', '.join(t.file for t in teachers)} say {len(rows)} boxes of made-up images")
    if not rows:
        return Joined([data.train])
    return Joined([data.train, CocoDetection(out, split.images, data.train.transform, drop_unsure=True)])


def only_labels(recipe: Recipe) -> bool:
    """Is the recipe's teacher there for pseudo labels alone, so that nobody learns from its features or logits?"""
    return (
        recipe.teacher is not None
        and recipe.pseudo_labels is not None
        and not recipe.methods.enabled()
        and not recipe.teacher.inherit
    )


def sources(recipe: Recipe) -> list[Source]:
    """The teachers that label: those of `pseudo_labels`, or the recipe's teacher (its file, if it was trained in this
    run)."""
    settings = recipe.pseudo_labels
    assert settings is not None
    if settings.teachers is not None:
        return list(settings.teachers)
    assert recipe.teacher is not None, "the recipe was validated"
    if recipe.teacher.train is not None:
        return [Source(checkpoint=str(recipe.run_dir / "teacher.safetensors"))]
    return [recipe.teacher]


def image_lists(settings: PseudoLabels, data: Datasets, console: Console) -> list[tuple[str, ImageList]]:
    """The images to label, by name of the list, without those of the validation set; of the folders also without those
    of the training set.

    Raises UserError for a folder that is not there, and for a list that has no other images.
    """
    lists = []
    val, rest = _files(data.val_split), data.unlabelled
    if rest is not None and read_annotations(rest.annotations)["images"]:
        images = images_in(rest.annotations, rest.images)
        lists.append((REST, _others(images, _Contents(val), REST, "validation", console)))
    if settings.unlabeled:
        known = _Contents([*_files(data.train_split), *val, *([] if rest is None else _files(rest))])
        for number, folder in enumerate(settings.unlabeled, start=1):
            images = images_in(folder)
            lists.append((_folder(number), _others(images, known, str(folder), "training or validation", console)))
    return lists


def labels_of(recipe: Recipe, teachers: Sequence[BoxTeacher], categories: Sequence[str]) -> list[list[int]]:
    """For each class of each teacher its label in the data, or NO_CLASS.

    Raises UserError: a teacher does not name its classes, one of them has no place in the data, or nobody looks for a
    class of the data and the student cannot learn so.
    """
    settings = recipe.pseudo_labels
    assert settings is not None, "the caller looks"
    found = []
    for teacher in teachers:
        if teacher.class_names is None:
            raise UserError(f"teacher {teacher.file}: does not name its classes, so they cannot be matched")
        found.append(class_map(teacher.class_names, categories, settings.class_map, teacher=f"teacher {teacher.file}"))
    unseen = [name for label, name in enumerate(categories) if not any(label in labels for labels in found)]
    family = recipe.student.detector
    if unseen and not detector_class(family, "student.detector").ignores_regions:
        raise UserError(
            f"pseudo_labels: no teacher looks for {', '.join(unseen)}, and a {family} student cannot learn "
            f"from images of which only some classes are known; take a {families_with('ignores_regions')} student, or "
            "another teacher"
        )
    return found


# --- details --------------------------------------------------------------------------------------------


def _list_names(recipe: Recipe) -> list[str]:
    """Of the lists that a recipe may have."""
    if recipe.pseudo_labels is None:
        return []
    rest = [REST] if recipe.labels is not None and recipe.labels.fraction < 1 else []
    return rest + [_folder(number) for number in range(1, len(recipe.pseudo_labels.unlabeled) + 1)]


def _folder(number: int) -> str:
    """Name of the list of images of a folder, counted from 1."""
    return f"folder {number}"


def _file_of(run_dir: Path, name: str) -> Path:
    """The file of a list."""
    return folder_of(run_dir) / f"{name.replace(' ', '-')}.json"


def _label(
    fabric: Fabric,
    recipe: Recipe,
    data: Datasets,
    teachers: list[BoxTeacher],
    images: ImageList,
    out: Path,
    how: Settings,
    *,
    resume: bool,
) -> dict[str, Any]:
    """One list, shared out among the processes. Returns what the file holds."""
    settings = recipe.pseudo_labels
    assert settings is not None

    def prepare() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # of other settings
        if not resume:
            shutil.rmtree(parts.parts_folder(out), ignore_errors=True)

    on_first_process(fabric, prepare)
    labelled = Labelled(data.train_split.annotations, data.train_split.images)
    _on_all(
        fabric,
        lambda: pseudo_label(
            teachers,
            images,
            out,
            how,
            categories=data.train.annotations,
            table=settings.class_map,
            thresholds_from=labelled if settings.thresholds == "best_f1" else None,
            shard=Shard(fabric.global_rank, fabric.world_size),
            device=fabric.device,
            workers=recipe.data.workers,
            skip_unreadable=settings.skip_unreadable,
            resume=True,
            quiet=not fabric.is_global_zero,
        ),
    )
    document = read_annotations(out)
    kinds = [bool(row["iscrowd"]) for row in document["annotations"]]
    provenance = document["info"]["pseudo_labels"]
    return {
        "images": len(document["images"]),
        "labels": kinds.count(False),
        "regions": kinds.count(True),
        "skipped": len(document["skipped"]),
        "teachers": [teacher.file for teacher in teachers],
        "tau": provenance["tau"],
        "tau_ignore": provenance["tau_ignore"],
    }


def _on_all(fabric: Fabric, work: Callable[[], Any]) -> None:
    """Run `work` on every process; what goes wrong on one is raised on all of them, so that none waits for it."""
    message = None
    try:
        work()
    except UserError as error:
        message = str(error)
    messages = [fabric.broadcast(message, src=rank) for rank in range(fabric.world_size)]
    told = next((text for text in messages if text is not None), None)
    if told is not None:
        raise UserError(told)


def _files(split: Split) -> list[Path]:
    return [split.images / row["file_name"] for row in read_annotations(split.annotations)["images"]]


class _Contents:
    """`file in contents`: has one of `files` the same bytes? Only files of its size are read, each once."""

    def __init__(self, files: list[Path]) -> None:
        self._by_size: dict[int, list[Path]] = {}
        self._hashes: dict[int, set[str]] = {}
        for file in files:
            if file.is_file():
                self._by_size.setdefault(file.stat().st_size, []).append(file)

    def __contains__(self, file: Path) -> bool:
        size = file.stat().st_size if file.is_file() else None
        if size not in self._by_size:
            return False
        if size not in self._hashes:
            self._hashes[size] = {sha256_of(other) for other in self._by_size[size]}
        return sha256_of(file) in self._hashes[size]


def _others(images: ImageList, known: _Contents, where: str, what: str, console: Console) -> ImageList:
    """The images that are not among the known ones; each keeps its id."""
    rows = [
        row for row in zip(images.ids, images.names, images.sizes, strict=True) if images.folder / row[1] not in known
    ]
    if len(rows) < len(images):
        console.print(f"{where}: {len(images) - len(rows)} images of the {what} set are left out")
    if not rows:
        raise UserError(f"{where}: pseudo_labels: all its images are {what} images")
    ids, names, sizes = (list(column) for column in zip(*rows, strict=True))
    return ImageList(images.folder, ids, names, sizes, listed=images.listed)
