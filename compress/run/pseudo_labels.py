"""The stage of a run in which teachers label the images that have no labels.

    plan = labelling_plan(recipe.pseudo_labels, labels=recipe.labels, ...)
    pseudo = label_images(fabric, plan, data, manifest, console, resume=…)
    train on pseudo.images          # labelled by people, and by teachers

Each list of images (what `labels` left without labels, and each folder) is a stage of the manifest and a COCO file in
`<run>/pseudo`. With several processes each labels its share.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console

from compress.config.data import Data, Split
from compress.config.families import families_with
from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.pseudo import FineTune, Labels, PseudoLabels
from compress.config.teacher import Source, Teacher
from compress.config.train import Schedule, Train
from compress.data.coco import CocoDetection
from compress.data.concat import ConcatDataset
from compress.data.digests import together
from compress.data.transforms import eval_transform
from compress.detectors.build import detector_class
from compress.manifest import TEACHER, Manifest, RunFolder
from compress.pseudo import parts
from compress.pseudo.images import ImageList, images_in, without
from compress.pseudo.label import LOWEST_SCORE, Labelled, pseudo_label
from compress.pseudo.merge import class_map
from compress.pseudo.parts import Shard
from compress.pseudo.settings import Settings
from compress.run.data import Datasets
from compress.teachers.base import BoxTeacher
from compress.teachers.check import check_teacher, resized_images
from compress.teachers.load import open_teacher
from compress.training.distributed import on_every_process, on_first_process
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.on_ray import Cluster
from deploy.core.same_files import FileContents
from deploy.core.storage import is_folder
from deploy.validate.coco import read_annotations

STAGE = "pseudo labels"
"""First words of the manifest's rows."""
REST = "training images"
"""Name of the list of images that the recipe's `labels` left without labels; folders are named by their number."""


@dataclass(frozen=True)
class LabellingPlan:
    """Plan of what teachers label in a run, and how.

    settings: the recipe's section.
    sources: who labels. min_map: what each must reach on the validation images, percent.
    how: thresholds, merging, and the size of the images that the teachers see.
    lists: names of the lists of images, in their order; each becomes a file in `folder`.
    student: family that trains on the labels. needs_all_classes: it cannot learn from images of which only some classes
        are known.
    cache, drop_empty, workers: of the recipe's data.
    max_detections: of a class in an image that count where the teachers are measured.
    cluster: whose actors label, driven by the first process; None: all processes of the run do.
    """

    settings: PseudoLabels
    sources: tuple[Source, ...]
    min_map: float
    how: Settings
    lists: tuple[str, ...]
    folder: Path
    student: str
    needs_all_classes: bool
    cache: bool
    drop_empty: bool
    workers: int
    max_detections: int
    cluster: Cluster | None = None

    def file(self, name: str) -> Path:
        """The COCO file of a list."""
        return self.folder / f"{name.replace(' ', '-')}.json"

    @property
    def limits(self) -> tuple[int, int]:
        """(short, long) of the images that the teachers see, pixels: the recipe always says one for all of them."""
        assert self.how.short is not None and self.how.long is not None, "labelling_plan gives both"
        return self.how.short, self.how.long

    def is_unfinished(self) -> bool:
        """Whether the labelling of one of the lists was interrupted."""
        return any(parts.parts_folder(self.file(name)).is_dir() for name in self.lists)

    def stages(self, recorded: Mapping[str, Any]) -> list[str]:
        """The recorded stages of the manifest that say what was labelled, in the order of the lists."""
        return [stage for name in self.lists if (stage := f"{STAGE}: {name}") in recorded]


def labelling_plan(
    settings: PseudoLabels,
    *,
    labels: Labels | None,
    data: Data,
    teacher: Teacher | None,
    student: Model,
    run: RunFolder,
    max_detections: int,
    cluster: Cluster | None = None,
) -> LabellingPlan:
    """Make the plan of a recipe's sections; a teacher that the run trains is its checkpoint."""
    sources: tuple[Source, ...]
    min_map = settings.min_map
    if settings.teachers is not None:
        sources = settings.teachers
    else:
        assert teacher is not None, "the recipe was validated"
        trained = Source(checkpoint=str(run.weights(TEACHER)))
        sources = (teacher if teacher.train is None else trained,)
        min_map = max(min_map, teacher.min_map)
    rest = [REST] if labels is not None and labels.fraction < 1 else []
    return LabellingPlan(
        settings=settings,
        sources=sources,
        min_map=min_map,
        how=Settings(
            tau=settings.tau,
            tau_ignore=settings.tau_ignore,
            how=settings.merge,
            iou_threshold=settings.iou,
            short=data.eval_short if settings.short is None else settings.short,
            long=data.long if settings.long is None else settings.long,
            batch_size=settings.batch_size,
        ),
        lists=(*rest, *(_folder(number) for number in range(1, len(settings.unlabeled) + 1))),
        folder=run.pseudo_labels,
        student=student.detector,
        needs_all_classes=not detector_class(student.detector, "student.detector").ignores_regions,
        cache=data.cache,
        drop_empty=data.drop_empty,
        workers=data.workers,
        max_detections=max_detections,
        cluster=cluster,
    )


@dataclass
class PseudoLabelled:
    """images: to train on, labelled ones first. identity: of what the teachers' labels are (JSON-able)."""

    images: ConcatDataset
    identity: dict[str, Any]


def label_images(
    fabric: Fabric, plan: LabellingPlan, data: Datasets, manifest: Manifest, console: Console, *, resume: bool
) -> PseudoLabelled:
    """Let the plan's teachers label what has no labels, and join it with what has.

    Raises:
        UserError: a teacher cannot be opened or knows a class that the data does not, an image cannot be read, or no
            label was found.
    """
    names = dict(zip(data.train.category_ids, data.train.categories, strict=True))
    teachers = [open_teacher(source, fabric.device, categories=names) for source in plan.sources]
    _check_teachers(plan, teachers, data, manifest, console, write=fabric.is_global_zero)
    lists = image_lists(plan.settings.unlabeled, data, console)
    for _, images in lists:  # of all, before any is labelled: a results file may take one image for another
        for teacher in teachers:
            teacher.covers(images.ids if images.listed else None, images.names, images.folder)
    results = []
    for name, images in lists:
        out, inputs = plan.file(name), on_first_process(fabric, partial(_inputs, plan, teachers, images, data))

        def label(images: ImageList = images, out: Path = out) -> dict[str, Any]:
            return _label(fabric, plan, data, teachers, images, out, resume=resume)

        results.append(manifest.stage(f"{STAGE}: {name}", inputs, [out], label, write=fabric.is_global_zero))
    totals = {key: sum(result[key] for result in results) for key in ("images", "labels", "regions", "skipped")}
    console.print(
        f"pseudo labels: {totals['labels']} labels and {totals['regions']} uncertain regions in "
        f"{totals['images']} images"
        + (f", {totals['skipped']} unreadable images left out" if totals["skipped"] else "")
        + f", by {', '.join(teacher.file for teacher in teachers)}"
    )
    if not totals["labels"]:
        tau = max(value for result in results for value in result["tau"].values())
        raise UserError(
            f"pseudo_labels: the teachers found no label in {totals['images']} images; lower pseudo_labels.tau "
            f"({tau:.3g}), or check that the images are of their kind and size"
        )
    with_labels = [data.train] if data.has_labels else []
    for (name, images), result in zip(lists, results, strict=True):
        if result["labels"]:
            with_labels.append(_dataset(plan, plan.file(name), images.folder, data))
    hashes = [sha256_of(plan.file(name)) for name, _ in lists]
    return PseudoLabelled(ConcatDataset(with_labels), {"pseudo_labels": hashes, "weighting": plan.settings.weighting})


def rehearse(
    plan: LabellingPlan, data: Datasets, teachers: list[BoxTeacher], folder: Path, console: Console
) -> ConcatDataset:
    """Label the images of `data.train` in `folder`, and join that with `data.train`: a dry run. `data` may be made
    up; labels are rare then, and thresholds are not applied."""
    labels_of(plan, teachers, data.train.categories)
    for source in plan.settings.unlabeled:
        if is_folder(source):
            console.print(f"pseudo labels: {len(images_in(source))} images in {source}")
        else:
            console.print(f"dry run: {source} is not there; the run will need it")
    out = folder / "pseudo.json"
    split = data.train_split
    lowest = replace(plan.how, tau=LOWEST_SCORE, tau_ignore=LOWEST_SCORE)
    pseudo_label(
        teachers, images_in(split.annotations, split.images), out, lowest,
        categories=split.annotations, table=plan.settings.class_map, quiet=True,
    )  # fmt: skip
    rows = read_annotations(out)["annotations"]
    console.print(f"pseudo labels: {', '.join(t.file for t in teachers)} say {len(rows)} boxes of made-up images")
    if not rows:
        return ConcatDataset([data.train])
    return ConcatDataset([data.train, CocoDetection(out, split.images, data.train.transform, drop_uncertain=True)])


def check_labelled(labelled: int, train: Train, *, baseline: bool, fine_tune: FineTune | None) -> None:
    """Find out before long work whether the trainings on the labelled images alone would be refused.

    Raises UserError for too few images for a batch, or too few steps for the warm-up.
    """
    if baseline and train.batch_size > labelled:
        raise UserError(f"train.batch_size {train.batch_size} is more than the {labelled} images of the baseline")
    if fine_tune is None:
        return
    train = fine_tuning(train, fine_tune)
    if train.batch_size > labelled:
        raise UserError(
            f"pseudo_labels.fine_tune: batches of {train.batch_size} images, and only {labelled} have labels; set its "
            f"batch_size to {labelled} or less"
        )
    steps = train.steps or (train.epochs or 0) * (labelled // train.batch_size)
    if train.schedule.warmup_steps >= steps:
        raise UserError(
            f"pseudo_labels.fine_tune.warmup_steps: {train.schedule.warmup_steps} warm-up steps leave nothing of "
            f"{steps} steps; set it to {steps // 10}"
        )


def fine_tuning(train: Train, settings: FineTune) -> Train:
    """Settings of the second training, on the labelled images alone."""
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


def only_labels(teacher: Teacher | None, methods: Methods, pseudo_labels: PseudoLabels | None) -> bool:
    """Whether the recipe's teacher is there for pseudo labels alone: nothing learns from its features or logits."""
    return teacher is not None and pseudo_labels is not None and not methods.of_teacher() and not teacher.inherit


def image_lists(folders: Sequence[Path], data: Datasets, console: Console) -> list[tuple[str, ImageList]]:
    """The images to label, by name of the list, without those of the validation set; of the folders also without those
    of the training set.

    Raises UserError for a folder that is not there, and for a list that has no other images.
    """
    lists = []
    val, rest = _files(data.val_split), data.unlabelled
    if rest is not None and read_annotations(rest.annotations)["images"]:
        images = images_in(rest.annotations, rest.images)
        lists.append((REST, _others(images, FileContents(val), REST, "validation", console)))
    if folders:
        known = FileContents([*_files(data.train_split), *val, *([] if rest is None else _files(rest))])
        for number, folder in enumerate(folders, start=1):
            images = images_in(folder)
            lists.append((_folder(number), _others(images, known, str(folder), "training or validation", console)))
    return lists


def labels_of(plan: LabellingPlan, teachers: Sequence[BoxTeacher], categories: Sequence[str]) -> list[list[int]]:
    """Return for each class of each teacher its label in the data, or NO_CLASS.

    Raises UserError: a teacher does not name its classes, one of them has no place in the data, or no teacher looks for
    a class of the data and the student cannot learn so.
    """
    table = plan.settings.class_map
    labels = []
    for teacher in teachers:
        if teacher.class_names is None:
            raise UserError(f"teacher {teacher.file}: does not name its classes, so they cannot be matched")
        labels.append(class_map(teacher.class_names, categories, table, teacher=f"teacher {teacher.file}"))
    unseen = [name for label, name in enumerate(categories) if not any(label in known for known in labels)]
    if unseen and plan.needs_all_classes:
        raise UserError(
            f"pseudo_labels: no teacher looks for {', '.join(unseen)}, and a {plan.student} student cannot learn from "
            f"images of which only some classes are known; take a {families_with('ignores_regions')} student, or "
            "another teacher"
        )
    return labels


# --- details --------------------------------------------------------------------------------------------


def _check_teachers(
    plan: LabellingPlan,
    teachers: Sequence[BoxTeacher],
    data: Datasets,
    manifest: Manifest,
    console: Console,
    *,
    write: bool,
) -> None:
    """Measure the teachers on the validation images, at the size at which they will label."""
    val = data.val
    transform = eval_transform(*plan.limits)
    if val.transform != transform:
        val = CocoDetection(data.val_split.annotations, data.val_split.images, transform)
    labels = labels_of(plan, teachers, data.train.categories)
    for number, (teacher, of_teacher) in enumerate(zip(teachers, labels, strict=True), start=1):
        check_teacher(
            teacher,
            of_teacher,
            val,
            manifest,
            stage=f"{STAGE}: check of teacher {number}",
            identity={**data.val_identity, "limits": list(plan.limits)},
            shown=resized_images(*plan.limits),
            min_map=plan.min_map,
            report=lambda line: console.print(f"pseudo labels: {line}"),
            write=write,
            max_detections=plan.max_detections,
        )


def _inputs(plan: LabellingPlan, teachers: Sequence[BoxTeacher], images: ImageList, data: Datasets) -> dict[str, Any]:
    """Everything that shapes the labels of a list (JSON-able)."""
    elsewhere = {"teachers", "unlabeled", "min_map", "weighting", "fine_tune", "thresholds", "short", "long"}
    measured = plan.settings.thresholds == "best_f1"
    return {
        "images": images.sha256(),
        "pictures": together(data.digests.of(images.files)),
        "teachers": [{"sha256": teacher.sha256, "settings": dict(teacher.settings)} for teacher in teachers],
        "settings": plan.settings.model_dump(mode="json", exclude=elsewhere),
        "limits": list(plan.limits),
        "categories": sorted(zip(data.train.category_ids, data.train.categories, strict=True)),
        "thresholds_from": sha256_of(data.train_split.annotations) if measured else None,
        **({"thresholds_from_pictures": data.identity.get("train_pictures")} if measured else {}),
    }


def _label(
    fabric: Fabric,
    plan: LabellingPlan,
    data: Datasets,
    teachers: Sequence[BoxTeacher],
    images: ImageList,
    out: Path,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Label one list, shared out among the processes. Returns what the file holds."""
    settings = plan.settings

    def prepare() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            shutil.rmtree(parts.parts_folder(out), ignore_errors=True)

    on_first_process(fabric, prepare)
    labelled = Labelled(data.train_split.annotations, data.train_split.images)
    shared = plan.cluster is None
    label = partial(
        pseudo_label,
        teachers if shared else plan.sources,
        images,
        out,
        plan.how,
        categories=data.train.annotations,
        table=settings.class_map,
        like=labelled if data.has_labels else None,
        thresholds_from=labelled if settings.thresholds == "best_f1" else None,
        shard=Shard(fabric.global_rank, fabric.world_size) if shared else Shard(0, 1),
        device=fabric.device,
        workers=plan.workers,
        cluster=plan.cluster,
        skip_unreadable=settings.skip_unreadable,
        resume=True,
        replace=True,
        quiet=not fabric.is_global_zero,
    )
    on_every_process(fabric, label) if shared else on_first_process(fabric, label)
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


def _dataset(plan: LabellingPlan, file: Path, images: Path, data: Datasets) -> CocoDetection:
    """A labelled list to train on."""
    return CocoDetection(
        file,
        images,
        data.train.transform,
        cache=plan.cache,
        drop_empty=plan.drop_empty,
        drop_uncertain=True,
        scores=plan.settings.weighting == "score",
    )


def _folder(number: int) -> str:
    """Name of the list of images of a folder, counted from 1."""
    return f"folder {number}"


def _files(split: Split) -> list[Path]:
    return [split.images / row["file_name"] for row in read_annotations(split.annotations)["images"]]


def _others(images: ImageList, known: FileContents, where: str, what: str, console: Console) -> ImageList:
    """The images that are not among the known ones. Raises UserError where none is left."""
    others = without(images, known)
    if len(others) < len(images):
        console.print(f"{where}: {len(images) - len(others)} images of the {what} set are left out")
    if not len(others):
        raise UserError(f"{where}: pseudo_labels: all its images are {what} images")
    return others
