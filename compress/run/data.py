"""The images of a run: drawn or opened, with labels or without, and how large a canvas they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from compress.config.data import Data, Split
from compress.config.pseudo import Labels
from compress.data import synthetic
from compress.data.coco import CocoDetection, Transform
from compress.data.digests import RECORD, PictureDigests, together
from compress.data.label_split import split_labels
from compress.data.merge import Labelled, common_folder, merged
from compress.data.transforms import eval_transform, train_transform
from compress.manifest import RunFolder, fingerprint
from compress.training.distributed import on_first_process
from deploy.core.canvas import fit_size
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json
from deploy.validate.coco import load_annotations, read_annotations
from deploy.validate.labels import MOST_OBJECTS


@dataclass(frozen=True)
class DataPlan:
    """Plan of a run's images.

    data: the recipe's section. labels: how many of the training images have labels; None: all.
    runs: where drawn images are kept, for all runs. folder: of this one.
    input_size: (height, width) of the exported files' input; None: the smallest `canvas`. max_detections: of theirs.
    """

    data: Data
    runs: Path
    folder: RunFolder
    labels: Labels | None = None
    input_size: tuple[int, int] | None = None
    max_detections: int = MOST_OBJECTS


@dataclass
class Datasets:
    """Training and validation images of a run, and what identifies them. `train` are those with labels.

    identity: everything about the images that a training depends on: labels and pictures of both sets, and what happens
        to them before the network. val_identity: what a measurement on the validation images depends on.
    digests: of pictures, remembered beside the run folders.
    resize_short_long: limits in pixels of the images that are evaluated; in training the short side may vary below it.
    canvas: (height, width) that every validation image is laid on, as the exported files do it: a network sees what is
        around a picture, too. padding: share of it that no picture covers, on average, 0 to 1.
    unlabelled: a COCO file without annotations and the folder of its images, the training images that the recipe's
        `labels` leaves without labels; None: there are none.
    """

    train: CocoDetection
    val: CocoDetection
    train_split: Split
    val_split: Split
    identity: dict[str, Any]
    resize_short_long: tuple[int, int]
    canvas: tuple[int, int]
    padding: float
    val_identity: dict[str, Any] = field(default_factory=dict)
    digests: PictureDigests = field(default_factory=PictureDigests)
    unlabelled: Split | None = None
    has_labels: bool = True
    """False where labels.fraction is 0: `train` then are images without labels, of which the classes are known."""
    generated: bool = False
    """The images are drawn by the recipe's settings, which say everything about them."""

    def identity_of(self, files: Sequence[Path]) -> str | None:
        """Identify the contents of validation images; None for generated ones, which cannot change."""
        return None if self.generated else identity_of_pictures(files, self.digests, self.val_split.annotations)

    def about_missing_labels(self, labels: Labels | None) -> list[str]:
        """A line about the training images that the recipe's `labels` leaves without labels, where it does."""
        if self.unlabelled is None or labels is None:
            return []
        rest, train = len(read_annotations(self.unlabelled.annotations)["images"]), self.train
        unseen = [name for name, n in zip(train.categories, train.boxes_by_class, strict=True) if n == 0]
        none_of = f"; no label is left of {', '.join(unseen)}" if unseen and self.has_labels else ""
        return [f"labels.fraction {labels.fraction:g}: {rest} more images have no labels{none_of}"]


def splits(data: Data, runs: Path, *, write: bool = True, digests: PictureDigests | None = None) -> tuple[Split, Split]:
    """Return where the training and validation images are. Synthetic data are drawn first, into `runs`/data, unless
    they are there as they were drawn; several training sets are joined in a file there."""
    if data.synthetic is None:
        assert data.train is not None and data.val is not None, "the recipe was validated"
        if isinstance(data.train, Split):
            return data.train, data.val
        return _joined(list(data.train), runs / "data", write=write), data.val
    settings = _as_before_styles(data.synthetic.model_dump())
    name = "-".join(f"{key}{value}" for key, value in settings.items())
    folder = runs / "data" / f"synthetic-{name}-v{synthetic.VERSION}"
    if write:
        synthetic.generate(folder, **settings, digests=digests or picture_digests(runs))
    images = folder / "images"
    return (
        Split(annotations=folder / "train.json", images=images),
        Split(annotations=folder / "val.json", images=images),
    )


def _as_before_styles(synthetic: dict[str, Any]) -> dict[str, Any]:
    """Images in the plain style keep the folder and the identity that they had when there was no other."""
    return {key: value for key, value in synthetic.items() if (key, value) != ("style", "plain")}


def labelled_split(plan: DataPlan) -> Split:
    """The training images that have labels; where only a share has, a file in the run folder, which `open_data`
    writes."""
    given, _ = splits(plan.data, plan.runs, write=False)
    return given if plan.labels is None else given.model_copy(update={"annotations": plan.folder.labelled})


def open_data(plan: DataPlan, fabric: Fabric) -> Datasets:
    """Draw (synthetic) or open the images. Raises UserError for files that cannot be used."""
    data, labels = plan.data, plan.labels
    digests = picture_digests(plan.runs)
    on_first_process(fabric, lambda: splits(data, plan.runs, digests=digests))
    given, val_split = splits(data, plan.runs, write=False)
    train_split, unlabelled = labelled_split(plan), None
    if labels is not None:
        unlabelled = given.model_copy(update={"annotations": plan.folder.unlabelled})
        on_first_process(fabric, lambda: _divide(given, labels, plan.folder))
    has_labels = labels is None or labels.fraction > 0
    source = train_split if has_labels or unlabelled is None else unlabelled
    train, val, size = open_splits(plan, source, val_split, labels=has_labels)
    identity, val_identity = on_first_process(
        fabric, lambda: _identities(data, train if has_labels else None, val, train_split, digests)
    )
    return Datasets(
        train,
        val,
        train_split,
        val_split,
        identity,
        (data.eval_short, data.long),
        size,
        padding(val, data, size),
        val_identity | _canvas_identity(val, data, size),
        digests,
        unlabelled,
        has_labels,
        generated=data.synthetic is not None,
    )


def open_splits(
    plan: DataPlan, train_split: Split, val_split: Split, *, labels: bool = True, cache: bool = True
) -> tuple[CocoDetection, CocoDetection, tuple[int, int]]:
    """Training and validation images, and the canvas of these. labels: the training images have some. cache: decode
    now what `data.cache` wants in memory.

    Raises UserError for files that cannot be used, that know different categories, and without a box.
    """
    data = plan.data
    train = CocoDetection(
        train_split.annotations,
        train_split.images,
        _while_training(data),
        cache=cache and data.cache and labels,
        drop_empty=data.drop_empty and labels,
        max_detections=plan.max_detections,
    )
    val, size = validation_set(
        val_split, data, plan.input_size, cache=cache and data.cache, max_detections=plan.max_detections
    )
    if train.categories != val.categories or train.category_ids != val.category_ids:
        raise UserError(
            f"{train_split.annotations} and {val_split.annotations} have different categories: "
            f"{_first_difference(train, val)}"
        )
    for split, images in ((train_split, train), (val_split, val)):
        if images.num_boxes == 0 and (labels or images is val):
            raise UserError(f"{split.annotations}: it has no box to {'train on' if images is train else 'evaluate on'}")
    return train, val, size


def resize_splits(train: CocoDetection, val: CocoDetection, plan: DataPlan) -> tuple[int, int]:
    """Resize opened images as `plan` says from here on; its files are those that are open. Returns the canvas of
    `val`."""
    train.transform = _while_training(plan.data)
    return _while_evaluating(val, plan.data, plan.input_size)


def picture_digests(runs: Path) -> PictureDigests:
    """Digests of pictures, with the memory that all runs of this folder share."""
    return PictureDigests(runs / RECORD)


def identity_of_pictures(files: Sequence[Path], digests: PictureDigests, where: object) -> str:
    """One digest for the contents of these pictures, in their order.

    Raises UserError, naming `where` they are listed, for one that is not there or cannot be read: what reads it later
    would end there.
    """
    found = digests.of(files)
    lost = [file for file, digest in zip(files, found, strict=True) if digest is None]
    if lost:
        what = "cannot be read" if lost[0].exists() else "is missing"
        more = f" (and {len(lost) - 1} more of {len(files)})" if len(lost) > 1 else ""
        raise UserError(f"{lost[0]}: an image of {where}{more}: the file {what}")
    return together(found)


def validation_set(
    split: Split,
    data: Data,
    input_size: tuple[int, int] | None,
    *,
    cache: bool = False,
    max_detections: int = MOST_OBJECTS,
) -> tuple[CocoDetection, tuple[int, int]]:
    """Open validation images, resized as exported files resize them; and the canvas that both lay them on:
    `input_size`, or the smallest `canvas`."""
    transform = eval_transform(data.eval_short, data.long)
    val = CocoDetection(split.annotations, split.images, transform, cache=cache, max_detections=max_detections)
    return val, _while_evaluating(val, data, input_size)


def canvas(dataset: CocoDetection, data: Data) -> tuple[int, int]:
    """Smallest (height, width), multiples of 32, that holds every image of `dataset` as evaluation resizes it.

    With wide and tall images that is about a square of the long side, of which much is padding for each of them.
    """
    sizes = [fit_size(*size, short=data.eval_short, long=data.long) for size in set(dataset.sizes)]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    return -(-height // 32) * 32, -(-width // 32) * 32


def padding(dataset: CocoDetection, data: Data, canvas: tuple[int, int]) -> float:
    """Share of the canvas that the images do not cover, on average, 0 to 1."""
    counts = Counter(dataset.sizes)
    sizes = {size: fit_size(*size, short=data.eval_short, long=data.long, canvas=canvas) for size in counts}
    covered = sum(count * sizes[size][0] * sizes[size][1] for size, count in counts.items())
    return 1 - covered / (counts.total() * canvas[0] * canvas[1])


# --- details --------------------------------------------------------------------------------------------


def _while_training(data: Data) -> Transform:
    return train_transform(data.short, data.long, data.flip, data.photometric, data.scale_jitter)


def _while_evaluating(val: CocoDetection, data: Data, input_size: tuple[int, int] | None) -> tuple[int, int]:
    """Set the transform of validation images. Returns the canvas they are laid on."""
    size = input_size or canvas(val, data)
    val.transform = eval_transform(data.eval_short, data.long, size)
    return size


def _joined(sets: list[Split], folder: Path, *, write: bool) -> Split:
    """Several training sets as one, in a file whose name says where they lie.

    Raises UserError as `compress.data.merge.merged`.
    """
    if len(sets) == 1:
        return sets[0]
    places = {str(index): [str(one.annotations), str(one.images)] for index, one in enumerate(sets)}
    out = folder / f"joined-{fingerprint(places)[:16]}.json"
    images = common_folder([one.images for one in sets])
    if write:
        document, _ = merged([Labelled(one.annotations, one.images, load_annotations(one.annotations)) for one in sets])
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, document)
    return Split(annotations=out, images=images)


def _divide(given: Split, labels: Labels, folder: RunFolder) -> None:
    """Write the part of the training images that keeps its labels, and the rest."""
    folder.path.mkdir(parents=True, exist_ok=True)
    split_labels(
        given.annotations, labels.fraction, labels.seed, labelled=folder.labelled, unlabelled=folder.unlabelled
    )


def _identities(
    data: Data, train: CocoDetection | None, val: CocoDetection, train_split: Split, digests: PictureDigests
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trainings depend on, and what measurements on the validation images depend on. train: None where the
    training images have no labels; what teachers make of them has its own identity.

    Generated images are what their settings say: a folder with others in it is drawn again.
    """
    described = data.model_dump(mode="json", exclude={"workers", "cache"})
    labels = {"train_sha256": sha256_of(train_split.annotations), "val_sha256": sha256_of(val.annotations)}
    if described["synthetic"] is not None:
        described["synthetic"] = _as_before_styles(described["synthetic"])
        generated = described | labels
        return generated, generated
    del described["train"], described["val"]  # where they lie does not matter
    pictures = {"val_pictures": _pictures(val, digests)}
    measured = {"val_sha256": labels["val_sha256"], **pictures, "limits": [data.eval_short, data.long]}
    if train is not None:
        pictures["train_pictures"] = _pictures(train, digests)
    return described | labels | pictures, measured


def _canvas_identity(val: CocoDetection, data: Data, size: tuple[int, int]) -> dict[str, Any]:
    """What a measurement depends on besides; nothing where every image fills the canvas at its own size, as in records
    of before there was one."""
    free = {fit_size(*each, short=data.eval_short, long=data.long) for each in set(val.sizes)}
    return {} if free == {size} else {"canvas": list(size)}


def _pictures(images: CocoDetection, digests: PictureDigests) -> str:
    return identity_of_pictures([images.path(index) for index in range(len(images))], digests, images.annotations)


def _first_difference(train: CocoDetection, val: CocoDetection) -> str:
    train_names = dict(zip(train.category_ids, train.categories, strict=True))
    val_names = dict(zip(val.category_ids, val.categories, strict=True))
    key = next(k for k in sorted(train_names.keys() | val_names.keys()) if train_names.get(k) != val_names.get(k))
    return f"id {key} is {train_names.get(key)!r} in the first and {val_names.get(key)!r} in the second"
