"""Program: uses what docs/extending/*.diff add to the packages in the folder that it is given."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import torch

import compress
from compress.cli import main
from compress.config.recipe import Recipe, load_recipe, load_teacher_file
from compress.data.batch import Batch, ImageSize, Target
from compress.detectors.backbones import build_backbone
from compress.detectors.build import assemble, build_detector
from compress.distill.build import build_methods
from compress.distill.method import Outputs
from compress.export.deployable import Deployable, marked_for_half
from compress.teachers.base import Sample
from compress.teachers.load import open_teacher
from deploy.core.errors import UserError
from deploy.core.precisions import PRECISIONS, file_for
from deploy.runtimes.open import open_runner, runner_kind
from deploy.tensorrt.card import claimed_precision

TRAIN = {"steps": 3, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.01}, "schedule": {"warmup_steps": 0}}
RECIPE = {
    "name": "added",
    "data": {"synthetic": {"train": 24, "val": 8, "size": 64, "classes": 3}, "short": 64, "long": 64},
    "teacher": {
        "model": {"detector": "atss", "backbone": "nano", "neck_channels": 64, "head_depth": 1},
        "train": TRAIN,
    },
    "student": {"detector": "atss", "backbone": "nano", "neck_channels": 32, "head_depth": 1},
    "methods": {"hint": {"loss_weight": 2.0}},
    "train": TRAIN,
    "deploy": {"precisions": ["fp32", "body16"]},
}


def targets() -> list[Target]:
    """Two images, one with a box and one with a crowd alone."""
    return [
        Target(
            boxes=torch.tensor([[8.0, 8.0, 50.0, 40.0]]), labels=torch.tensor([1]), ignore=torch.tensor([crowd]),
            scores=None, image_id=0, size=(64, 64), original_size=(64, 64),
        )
        for crowd in (False, True)
    ]  # fmt: skip


def family_and_method(recipe: Recipe) -> None:
    """One step of a student of the new family that learns by the new method."""
    assert recipe.teacher is not None and recipe.teacher.model is not None
    assert recipe.methods.enabled().keys() == {"hint"}
    student, teacher = build_detector(recipe.student, 3, 0), build_detector(recipe.teacher.model, 3, 1)
    assert type(student).__name__ == "ATSS" and student.family == "atss"
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = student.features(images)
    prediction = student.predict(features)
    assigned = student.assign(prediction, targets())
    assert assigned.assignment.num_positives[0] > 0  # the other has none, and counts as one
    losses = student.loss(prediction, assigned)
    with torch.no_grad():
        wanted = teacher.features(images)
        theirs = Outputs(wanted, teacher.predict(wanted), teacher)
    methods = build_methods(recipe.methods, student, teacher)
    method = methods["hint"].method
    terms = method(Outputs(features, prediction, student, assigned), theirs, Batch(images, targets()))
    by_hand = sum(
        (s - t).square().mean() for s, t in zip(method.adapter(features), wanted, strict=True)
    )  # loss_weight 2, halved
    torch.testing.assert_close(terms["hint"], by_hand)
    sum([*losses.values(), *terms.values()]).backward()
    for parameter in (*method.parameters(), *student.backbone.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


def backbone() -> None:
    with torch.device("meta"):  # its shapes alone: 58 million weights
        built = build_backbone("resnet152", weights="none")
        maps = built(torch.zeros(1, 3, 64, 64))
    assert [x.shape[1:] for x in maps] == [(512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    assert len(built.layer3) == 36


def precision(recipe: Recipe) -> None:
    name = recipe.deploy.precisions[1]
    file = file_for(Path("student.onnx"), name)
    assert file.name == "student.body16.onnx" and claimed_precision(file.name) == "body16"
    module = marked_for_half(Deployable(assemble(recipe.student, 3), (64, 64)).eval(), PRECISIONS[name].float_parts)
    kinds = {key.split(".")[1]: value.dtype for key, value in module.named_parameters() if value.dim() == 4}
    assert kinds == {"backbone": torch.float64, "neck": torch.float64, "head": torch.float32}  # float64: the mark
    scores, boxes = module.dense(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert scores.dtype == boxes.dtype == torch.float32 and scores.isfinite().all() and boxes.isfinite().all()


def runtime() -> None:
    file = Path("student.ort")
    file.touch()
    assert runner_kind(file).name == "ONNX Runtime's format"
    try:
        open_runner(file)
    except UserError as error:
        assert "student.ort: ONNX Runtime cannot load it" in str(error), error
    else:
        raise AssertionError("an empty file was opened")


def teacher() -> None:
    Path("labels").mkdir()
    Path("labels/a.txt").write_text("1 0.5 0.5 0.25 0.5 0.9\n0 0.5 0.5 0.25 0.5 0.2\n")
    section = Path("teacher.yaml")
    section.write_text("teacher: {yolo_txt: {folder: labels, class_names: [cat, dog]}}\n")
    opened = open_teacher(load_teacher_file(section), torch.device("cpu"))
    assert opened.class_names == ("cat", "dog")
    size = ImageSize((64, 64), (100, 200))
    found, empty = opened.detect([Sample(None, 1, size, "a.jpg"), Sample(None, 2, size, "b.jpg")], score_threshold=0.5)
    assert found.boxes.tolist() == [[75, 25, 125, 75]] and found.labels.tolist() == [1] and not len(empty.boxes)


def command() -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            main(["classes", "--help"])
        except SystemExit as end:
            assert end.code == 0
    assert "FILE.onnx" in shown.getvalue()


if __name__ == "__main__":
    assert compress.__file__ is not None and Path(compress.__file__).is_relative_to(sys.argv[1]), compress.__file__
    recipe = load_recipe(RECIPE)
    family_and_method(recipe)
    backbone()
    precision(recipe)
    runtime()
    teacher()
    command()
    print("works: backbone command family method precision runtime teacher")
