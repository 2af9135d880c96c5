"""`--dry-run`: build everything that a recipe names and take one real training step on made-up images.

Nothing is downloaded and nothing is kept. Weights that would have to be downloaded (the zoo's teacher, ImageNet
backbones) are random here, and the output says so. Images are at most 256 px on the short side and two a process,
so that a recipe for eight GPUs can be rehearsed on a laptop.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from PIL import Image
from rich.console import Console

from compress.config.data import Split
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.config.teacher import Source
from compress.console import open_console
from compress.data.synthetic import class_names
from compress.detectors.base import Detector
from compress.detectors.build import build_detector, model_size
from compress.detectors.checkpoints import COCO_CATEGORIES, ZOO, ModelRecord
from compress.distill.teacher import freeze
from compress.run.data import open_data
from compress.run.pseudo_labels import only_labels, sources
from compress.run.pseudo_labels import rehearse as rehearse_labels
from compress.run.teacher import for_methods
from compress.run.trainings import check_methods, train_arm
from compress.teachers.base import BoxTeacher, DetectorTeacher
from compress.teachers.load import open_teacher
from deploy.validate.coco import read_annotations

SHORT_PX, LONG_PX = 256, 448


def dry_run(recipe: Recipe, fabric: Fabric, *, distillation: bool) -> None:
    """Raises UserError for what would also stop the real run."""
    console = open_console(quiet=not fabric.is_global_zero)
    categories = _categories(recipe, console)
    teacher = None
    if distillation and recipe.teacher is not None and not only_labels(recipe):
        teacher = _teacher(recipe, categories, fabric, console)
    labellers = _labellers(recipe, categories, fabric, console) if distillation and recipe.pseudo_labels else []
    if teacher is not None:
        check_methods(recipe, len(categories), teacher)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(fabric.broadcast(own))  # the first process's: all of them read what it writes
        small = _rehearsal(recipe, folder, categories, console, write=fabric.is_global_zero)
        data = open_data(small, fabric)
        size = (recipe.data.eval_short, recipe.data.long)
        student = build_detector(small.student, len(categories), recipe.seed)
        figures = model_size(student, (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32))
        console.print(
            f"student: {recipe.student.detector} {recipe.student.backbone}, {figures['params_m']:.2f} M parameters, "
            f"{figures['gflops']:.1f} GFLOPs at {size[0]} x {size[1]}",
        )
        if teacher is not None:
            teacher.to(fabric.device)
        images = rehearse_labels(small, data, labellers, folder, console) if labellers else None
        result = train_arm(
            fabric, small, "student", small.student, small.train, data,
            teacher=teacher, images=images, identity={}, resume=False, max_steps=1,
        )  # fmt: skip
    console.print(
        f"dry run of {recipe.name}: {result['steps']} step on made-up images; everything fits together",
    )


def _categories(recipe: Recipe, console: Console) -> dict[int, str]:
    """The data's categories by id when its file is there, otherwise COCO's (and the output says so)."""
    data = recipe.data
    if data.synthetic is not None:
        return dict(enumerate(class_names(data.synthetic.classes), start=1))
    assert data.train is not None
    if data.train.annotations.is_file():
        return {row["id"]: row["name"] for row in read_annotations(data.train.annotations, sizes=True)["categories"]}
    console.print(f"dry run: {data.train.annotations} is not there; COCO's 80 classes stand in")
    return dict(COCO_CATEGORIES)


def _teacher(recipe: Recipe, categories: dict[int, str], fabric: Fabric, console: Console) -> Detector:
    settings = recipe.teacher
    assert settings is not None
    if settings.given:
        return for_methods(recipe, _open(settings, categories, fabric, console), list(categories.values()))[0]
    assert settings.model is not None
    return freeze(build_detector(_without_download(settings.model, console, "teacher"), len(categories), 0))


def _labellers(recipe: Recipe, categories: dict[int, str], fabric: Fabric, console: Console) -> list[BoxTeacher]:
    """The teachers of `pseudo_labels`; random ones for what would have to be downloaded or trained first."""
    assert recipe.pseudo_labels is not None
    if recipe.pseudo_labels.teachers is None and recipe.teacher is not None and recipe.teacher.train is not None:
        detector = _teacher(recipe, categories, fabric, console)
        name, names = "teacher.safetensors", tuple(categories.values())
        return [DetectorTeacher(detector, file=name, sha256="", class_names=names, device=fabric.device)]
    return [_open(source, categories, fabric, console) for source in sources(recipe)]


def _open(source: Source, categories: dict[int, str], fabric: Fabric, console: Console) -> BoxTeacher:
    """A random one for what would have to be downloaded."""
    name = (source.checkpoint or "").removeprefix("zoo:")
    if name not in ZOO:
        return open_teacher(_source(source, console), fabric.device, categories=categories)
    console.print(f"dry run: zoo:{name} is not downloaded; random weights stand in")
    detector, names = _zoo(name, len(COCO_CATEGORIES)), tuple(COCO_CATEGORIES.values())
    return DetectorTeacher(detector, file=name, sha256="", class_names=names, device=fabric.device)


def _source(source: Source, console: Console) -> Source:
    """Without a download."""
    if source.torchvision is None or source.torchvision.weights != "coco":
        return source
    console.print(f"dry run: COCO weights of {source.torchvision.model} are not downloaded; random ones stand in")
    return source.model_copy(update={"torchvision": source.torchvision.model_copy(update={"weights": "none"})})


def _zoo(name: str, classes: int) -> Detector:
    model = Model(backbone="resnet101" if "_r101_" in name else "resnet50")
    return freeze(ModelRecord(model=model, num_classes=classes).build())


def _without_download(model: Model, console: Console, who: str) -> Model:
    if model.weights != "imagenet":
        return model
    console.print(f"dry run: the {who}'s ImageNet weights are not downloaded; random ones stand in")
    return model.model_copy(update={"weights": "none"})


def _rehearsal(recipe: Recipe, folder: Path, categories: dict[int, str], console: Console, *, write: bool) -> Recipe:
    """The recipe on a few noise images in `folder`, two a process and micro-batch."""
    split = Split(annotations=folder / "noise" / "noise.json", images=folder / "noise")
    if write:
        _draw(split, categories, recipe.seed, images=4 * recipe.train.devices * recipe.train.accumulate)
    short = min(recipe.data.eval_short, SHORT_PX)
    data = recipe.data.model_copy(
        update={
            "synthetic": None,
            "train": split,
            "val": split,
            "short": short,
            "long": max(short, min(recipe.data.long, LONG_PX)),
            "workers": 0,
        }
    )
    schedule = recipe.train.schedule.model_copy(update={"warmup_steps": 0})
    train = recipe.train.model_copy(
        update={
            "batch_size": 2 * recipe.train.devices * recipe.train.accumulate,
            "steps": 1,
            "epochs": None,
            "schedule": schedule,
        }
    )
    student = _without_download(recipe.student, console, "student")
    changed = {"data": data, "labels": None, "train": train, "student": student, "runs": folder / "runs"}
    return recipe.model_copy(update=changed)


def _draw(split: Split, categories: dict[int, str], seed: int, *, images: int) -> None:
    folder = split.images
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        Image.fromarray(random.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(folder / f"{image_id}.png")
        rows.append({"id": image_id, "file_name": f"{image_id}.png", "width": 320, "height": 240})
        for _ in range(4):
            w, h = random.uniform(20, 150, 2)
            x, y = random.uniform(0, 320 - w), random.uniform(0, 240 - h)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, "area": w * h,
                    "category_id": int(random.choice(list(categories))), "bbox": [x, y, w, h],
                }
            )  # fmt: skip
    names = [{"id": key, "name": name} for key, name in categories.items()]
    split.annotations.write_text(json.dumps({"images": rows, "annotations": annotations, "categories": names}))
