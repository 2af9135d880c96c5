"""The arms of a run: teacher, baseline and student, each built from the recipe, trained and saved.

    data = open_data(recipe, fabric)
    arm = train_arm(fabric, recipe, "student", recipe.student, recipe.train, data, teacher=…)

Everything here works the same in one process and in several; process 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from compress.config.recipe import Data, Model, Recipe, Split, Train, recipe_sha256
from compress.console import open_console
from compress.data import synthetic
from compress.data.batch import Target
from compress.data.coco import CocoDetection
from compress.data.concat import TrainingImages
from compress.data.label_split import split_labels
from compress.data.loader import eval_loader, train_loader
from compress.data.transforms import eval_transform, fit_size, train_transform
from compress.detectors.backbones import build_backbone
from compress.detectors.base import Capability, Detector
from compress.detectors.build import build_family
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.distill.build import build_methods
from compress.distill.level_matching import describe
from compress.distill.weighting import Balanced
from compress.manifest import fingerprint
from compress.training.evaluate import evaluate
from compress.training.loop import fit
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.validate.coco import CocoMetrics

EVAL_BATCH = 8


@dataclass
class Datasets:
    """Training and validation images of a run, and what identifies them. `train` are those with labels.

    unlabelled: a COCO file without annotations and the folder of its images, the training images that the recipe's
        `labels` leaves without labels; None: there are none.
    """

    train: CocoDetection
    val: CocoDetection
    train_split: Split
    val_split: Split
    identity: dict[str, Any]
    unlabelled: Split | None = None
    has_labels: bool = True
    """False where labels.fraction is 0: `train` then are images without labels, of which the classes are known."""


def splits(data: Data, runs: Path, *, write: bool = True) -> tuple[Split, Split]:
    """Where the training and validation images are. Synthetic data are drawn first, into `runs`/data."""
    if data.synthetic is None:
        assert data.train is not None and data.val is not None, "the recipe was validated"
        return data.train, data.val
    settings = _as_before_styles(data.synthetic.model_dump())
    name = "-".join(f"{key}{value}" for key, value in settings.items())
    folder = runs / "data" / f"synthetic-{name}-v{synthetic.VERSION}"
    if write:
        synthetic.generate(folder, **settings)
    images = folder / "images"
    return (
        Split(annotations=folder / "train.json", images=images),
        Split(annotations=folder / "val.json", images=images),
    )


def _as_before_styles(synthetic: dict[str, Any]) -> dict[str, Any]:
    """Images in the plain style keep the folder and the identity that they had when there was no other."""
    return {key: value for key, value in synthetic.items() if (key, value) != ("style", "plain")}


def labelled_split(recipe: Recipe) -> Split:
    """The training images that have labels; with the recipe's `labels` that is a file in the run folder, which
    `open_data` writes."""
    given, _ = splits(recipe.data, recipe.runs, write=False)
    if recipe.labels is None:
        return given
    return given.model_copy(update={"annotations": recipe.run_dir / "labelled.json"})


def open_data(recipe: Recipe, fabric: Fabric) -> Datasets:
    """Draw (synthetic) or open the recipe's images. Raises UserError for files that cannot be used."""
    data = recipe.data
    on_first_process(fabric, lambda: splits(data, recipe.runs))
    given, val_split = splits(data, recipe.runs, write=False)
    train_split, unlabelled = labelled_split(recipe), None
    if recipe.labels is not None:
        labels = recipe.labels
        unlabelled = given.model_copy(update={"annotations": recipe.run_dir / "unlabelled.json"})

        def divide() -> None:
            recipe.run_dir.mkdir(parents=True, exist_ok=True)
            split_labels(
                given.annotations,
                labels.fraction,
                labels.seed,
                labelled=train_split.annotations,
                unlabelled=unlabelled.annotations,
            )

        on_first_process(fabric, divide)
    transform = train_transform(data.short, data.long, data.flip, data.photometric, data.scale_jitter)
    has_labels = recipe.labels is None or recipe.labels.fraction > 0
    source = train_split if has_labels or unlabelled is None else unlabelled
    train = CocoDetection(
        source.annotations,
        source.images,
        transform,
        cache=data.cache and has_labels,
        drop_empty=data.drop_empty and has_labels,
    )
    val = CocoDetection(
        val_split.annotations, val_split.images, eval_transform(data.eval_short, data.long), cache=data.cache
    )
    if train.categories != val.categories or train.category_ids != val.category_ids:
        raise UserError(
            f"{train_split.annotations} and {val_split.annotations} have different categories: "
            f"{_first_difference(train, val)}"
        )
    for split, images in ((train_split, train), (val_split, val)):
        if images.num_boxes == 0 and (has_labels or images is val):
            raise UserError(
                f"{split.annotations}: no box in it that could be {'learned' if images is train else 'found'}"
            )
    described = data.model_dump(mode="json", exclude={"workers", "cache"})
    if described["synthetic"] is not None:
        described["synthetic"] = _as_before_styles(described["synthetic"])
    identity = described | {
        "train_sha256": sha256_of(train_split.annotations),
        "val_sha256": sha256_of(val_split.annotations),
    }
    return Datasets(train, val, train_split, val_split, identity, unlabelled, has_labels)


def on_first_process(fabric: Fabric, work: Callable[[], Any]) -> None:
    """Run `work` on process 0 while the others wait. What goes wrong is raised on all of them, so that none hangs."""
    message = None
    if fabric.is_global_zero:
        try:
            work()
        except UserError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'file'}: {error.strerror or error}"
    message = fabric.broadcast(message)
    if message is not None:
        raise UserError(message)


def build_detector(model: Model, num_classes: int, seed: int, *, compiled: bool = False) -> Detector:
    """A fresh detector; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = build_backbone(
            model.backbone,
            weights=model.weights,
            frozen_stages=model.frozen_stages,
            norm_eval=model.norm_eval,
        )
        detector = build_family(
            model.detector,
            num_classes,
            backbone,
            neck_channels=model.neck_channels,
            head_depth=model.head_depth,
            anchor_scale=model.anchor_scale,
            roi_samples=model.roi_samples,
            compiled=compiled,
        )
    return detector.to(memory_format=torch.channels_last)


def check_methods(recipe: Recipe, num_classes: int, teacher: Detector) -> dict[str, Balanced]:
    """Build the methods as the student's training will build them. Raises UserError where teacher, student and methods
    do not fit each other."""
    student = build_detector(recipe.student.model_copy(update={"weights": "none"}), num_classes, recipe.seed)
    methods = build_methods(recipe.methods, student, teacher)
    if recipe.teacher is not None and recipe.teacher.inherit and not inherit(student, teacher):
        raise UserError(
            f"teacher.inherit: no layer of the teacher's neck and head (width {teacher.feature_channels}) fits the "
            f"student's (width {student.feature_channels}); give both the same neck_channels"
        )
    return methods


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy the layers of the teacher's neck and head whose weights have the student's shapes. Returns the keys; empty
    when no convolution fits, and then nothing is copied."""
    own, theirs = student.state_dict(), teacher.state_dict()

    def fits(key: str) -> bool:
        return key in own and own[key].shape == theirs[key].shape

    def weight_of(key: str) -> str:
        layer = key.rpartition(".")[0]
        return f"{layer}.weight" if f"{layer}.weight" in theirs else key

    keys = [key for key in theirs if not key.startswith("backbone.") and fits(key) and fits(weight_of(key))]
    if not any(key.endswith("weight") and theirs[key].dim() == 4 for key in keys):
        return []
    student.load_state_dict({key: theirs[key] for key in keys}, strict=False)
    return keys


def canvas(dataset: CocoDetection, recipe: Recipe) -> tuple[int, int]:
    """Smallest (height, width), multiples of 32, that holds every image of `dataset` as the recipe resizes it."""
    sizes = [fit_size(*size, recipe.data.eval_short, recipe.data.long) for size in set(dataset.sizes)]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    return -(-height // 32) * 32, -(-width // 32) * 32


def evaluate_arm(detector: Detector, data: Datasets, fabric: Fabric, workers: int) -> CocoMetrics:
    """COCO metrics (percent) on the validation images, shared out among the processes."""
    loader = eval_loader(
        data.val,
        batch_size=EVAL_BATCH,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    return evaluate(detector, loader, data.val, fabric.device)


def train_arm(
    fabric: Fabric,
    recipe: Recipe,
    name: str,
    model: Model,
    settings: Train,
    data: Datasets,
    *,
    teacher: Detector | None = None,
    images: TrainingImages | None = None,
    start: Path | None = None,
    identity: Mapping[str, Any],
    resume: bool,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train one arm and save it as `<run>/<name>.safetensors`. Returns its figures (JSON-able).

    With a teacher it learns by the recipe's methods, and inherits if the recipe says so.

    Args:
        images: to train on, with the classes of `data.train`; None: `data.train`.
        start: checkpoint with the weights to begin with, of the same model; None: fresh ones.
    """
    output = recipe.run_dir / f"{name}.safetensors"
    if fabric.is_global_zero:
        output.unlink(missing_ok=True)  # from now on this arm is unfinished
    fabric.seed_everything(recipe.seed, verbose=False)
    detector = build_detector(model, len(data.train.categories), recipe.seed, compiled=settings.compile)
    if start is not None:
        detector.load_state_dict(load_detector(start)[0].state_dict())
    methods = {}
    if teacher is not None:
        methods = build_methods(recipe.methods, detector, teacher, seed=recipe.seed, compiled=settings.compile)
        if any(Capability.DENSE not in built.method.needs for built in methods.values()):
            note = describe(detector.strides, teacher.strides)
            if note is not None and fabric.is_global_zero:
                open_console().print(f"{name}: {note}")
        if recipe.teacher is not None and recipe.teacher.inherit:
            inherit(detector, teacher)
    loader = train_loader(
        data.train if images is None else images,
        batch_size=settings.batch_size // settings.accumulate,
        seed=recipe.seed,
        workers=recipe.data.workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    result = fit(
        fabric,
        detector,
        settings,
        loader=loader,
        evaluate=lambda d: evaluate_arm(d, data, fabric, recipe.data.workers),
        folder=recipe.run_dir / name,
        name=name,
        identity=fingerprint(identity),
        teacher=teacher,
        methods=methods,
        resume=resume,
        max_steps=max_steps,
    )
    if fabric.is_global_zero and result.metrics is not None:
        record = ModelRecord(
            detector=model.detector,
            backbone=model.backbone,
            num_classes=detector.num_classes,
            neck_channels=model.neck_channels,
            head_depth=model.head_depth,
            anchor_scale=model.anchor_scale,
            roi_samples=model.roi_samples,
            class_names=data.train.categories,
            category_ids=data.train.category_ids,
            val_map=result.metrics.map,
            recipe_sha256=recipe_sha256(recipe),
        )
        save_detector(output, detector, metadata=record)
    fabric.barrier()
    metrics = result.metrics.to_dict() if result.metrics is not None else {}
    return {"metrics": metrics, "steps": result.steps, "seconds": round(result.seconds, 1)}


def model_size(detector: Detector, size: tuple[int, int]) -> dict[str, float]:
    """`params_m` (millions) and `gflops` of one image of `size` (height, width). A multiply-add is two FLOPs. Of a
    detector in two stages with the proposals of an empty image."""
    was_training = detector.training
    detector.eval()
    images = torch.zeros(1, 3, *size, dtype=torch.uint8, device=next(detector.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prediction = detector(images)
        if Capability.DENSE not in detector.capabilities:  # the rest of its network comes with the boxes
            nothing = torch.zeros(0)
            detector.decode(prediction, [Target(nothing.view(0, 4), nothing, nothing, None, 0, size, size)])
    detector.train(was_training)
    params = sum(p.numel() for p in detector.parameters())
    return {"params_m": round(params / 1e6, 4), "gflops": round(counter.get_total_flops() / 1e9, 4)}


def _first_difference(train: CocoDetection, val: CocoDetection) -> str:
    ours = dict(zip(train.category_ids, train.categories, strict=True))
    theirs = dict(zip(val.category_ids, val.categories, strict=True))
    key = next(k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k))
    return f"id {key} is {ours.get(key)!r} in the first and {theirs.get(key)!r} in the second"
