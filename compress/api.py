"""The face of the package: what `import compress` offers.

    run = compress.distill("first.yaml", methods={"mine": MyLoss()})     # a path, a dict or a Recipe
    run.student.detect("street.jpg")                                     # Detections: boxes, scores, labels, class_names
    file = run.student.export("student.onnx")
    file.validate("val.json", "images").metrics.map
    compress.open("student.onnx").detect("street.jpg")                   # without torch

Torch is imported by the functions that need it, when they are called. What a user got wrong raises
`deploy.core.errors.UserError` with the line that the command of the same name prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.recipe import Recipe, load_recipe
from compress.manifest import BASELINE, STUDENT, TEACHER, RunFolder
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.core.image import image_files
from deploy.model import Model, open_model
from deploy.runtimes.open import RUNNERS, OwnRunner

if TYPE_CHECKING:
    from compress.detectors.base import Detector
    from compress.distill.method import Method
    from compress.run.parts import Parts
    from compress.teachers.base import BoxTeacher

__all__ = ["Checkpoint", "Detections", "Run", "distill", "export", "load_recipe", "open", "run", "train"]

RecipeSource = str | Path | Mapping[str, Any] | Recipe
"""A recipe's file, its content as a dict, or the recipe itself."""


def run(
    recipe: RecipeSource,
    *,
    methods: Mapping[str, Method] | None = None,
    teacher: Detector | BoxTeacher | None = None,
    student: Callable[[int], Detector] | None = None,
    resume: bool = False,
) -> Run:
    """The whole path of a recipe, from data to report: `distill`, then export, validation, latency and report.

    Arguments as of `distill`. A failed accuracy gate raises nothing: it stands in `report` of the result.
    """
    from compress.run import pipeline

    loaded = _recipe(recipe)
    return Run(pipeline.run(loaded, resume=resume, parts=_parts(methods, teacher, student)))


def distill(
    recipe: RecipeSource,
    *,
    methods: Mapping[str, Method] | None = None,
    teacher: Detector | BoxTeacher | None = None,
    student: Callable[[int], Detector] | None = None,
    resume: bool = False,
) -> Run:
    """Train a recipe's teacher (if it says so), baseline (if asked for) and student.

    Args:
        recipe: a file, a dict with the same keys, or a `Recipe`.
        methods: name → a method that the student learns from beside those of the recipe.
        teacher: in the place of the recipe's.
        student: gives the detector to train, for a number of classes, in the place of the recipe's.
        resume: continue an interrupted run.

    Raises UserError for bad data, a teacher that does not fit, a loss that is not finite, and an unfinished run in the
    folder while `resume` is False.
    """
    from compress.run import pipeline

    loaded = _recipe(recipe)
    pipeline.check_distills(loaded, _name_of(recipe), own_methods=bool(methods))
    return Run(pipeline.distill(loaded, resume=resume, parts=_parts(methods, teacher, student)))


def train(
    recipe: RecipeSource, *, student: Callable[[int], Detector] | None = None, resume: bool = False
) -> Run:
    """Train a recipe's student alone, from the labels. Arguments as of `distill`."""
    from compress.run import pipeline

    parts = _parts(None, None, student)
    return Run(pipeline.distill(_recipe(recipe), resume=resume, distillation=False, parts=parts))


def export(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    precision: str = "fp32",
    images: str | Path | Sequence[str | Path] | None = None,
    input_size: tuple[int, int] | None = None,
) -> Model:
    """Write a checkpoint as an ONNX file, compared with torch on real images before it gets its name, and open it.

    Args:
        checkpoint: a student.safetensors. What is not given here comes from the recipe.yaml beside it.
        out: default: the checkpoint's name with `.onnx`, `.fp16.onnx`, `.int8.onnx`.
        precision: `fp32`, `fp16`, `int8` or `mixed`.
        images: a folder, or image files, to compare on; None: the recipe's validation images.
        input_size: (height, width) of the network's input in pixels, multiples of 32; None: the recipe's.

    Raises UserError; `deploy.graph.export.ExportMismatchError` for a graph that computes something else than torch.
    """
    return Checkpoint(checkpoint, input_size=input_size).export(out, precision=precision, images=images)


def open(
    path: str | Path,
    providers: str | Sequence[str] = "cpu",
    *,
    input_size: tuple[int, int] | None = None,
    device: str = "cpu",
    runner: OwnRunner | None = None,
    **options: Any,
) -> Model:
    """A detector in a file, ready to look at pictures: an exported `.onnx`, a TensorRT `.engine`, or a checkpoint.

    Args:
        providers: where ONNX Runtime runs an exported file, in order of preference: `cpu`, `cuda`, `tensorrt`.
        input_size: of a checkpoint: see `export`.
        device: of a checkpoint: where torch runs it.
        runner: a user's own runner to open the file with, as a class or an import path `package.module:MyRunner`.
        options: of exported files: `threads`, `allow_fallback`, `tensorrt`, `cuda_graph`
            (`deploy.runtimes.open.open_runner`).

    Exported files need no torch. Raises UserError for everything that keeps the file from running.
    """
    suffix = Path(path).suffix
    if runner is not None or suffix in RUNNERS or not (str(path).startswith("zoo:") or suffix in _CHECKPOINTS):
        return open_model(path, providers, runner=runner, **options)
    return Checkpoint(path, input_size=input_size, device=device)


class Checkpoint(Model):
    """A detector in PyTorch, with the post-processing of an exported file: it detects, validates and exports."""

    def __init__(
        self,
        path: str | Path,
        *,
        recipe: Recipe | None = None,
        input_size: tuple[int, int] | None = None,
        categories: Mapping[int, str] | None = None,
        device: str = "cpu",
    ) -> None:
        """recipe: None: the recipe.yaml beside the checkpoint, if there is one. categories: id → name in label order,
        for a checkpoint that does not say which classes it knows.

        Raises UserError for a detector without a fixed graph, and where nothing says how large the input is.
        """
        from compress.config.deploy import Deploy
        from compress.export.onnx import torch_runner

        self.path = Path(path)
        self._recipe = _recipe_beside(self.path) if recipe is None else recipe
        settings = Deploy() if self._recipe is None else self._recipe.deploy
        size = input_size or settings.input_size
        limits = None
        if self._recipe is not None:
            limits = (self._recipe.data.eval_short, self._recipe.data.long)
            size = size or self._checks.input_size
        if size is None:
            beside = RunFolder(self.path.parent).recipe
            raise UserError(f"input_size: there is no {beside} to take it from; give it, for example (800, 1344)")
        runner = torch_runner(str(path), settings, size, limits=limits, categories=categories, device=device)
        super().__init__(runner, name=str(path))

    def export(
        self,
        out: str | Path | None = None,
        *,
        precision: str = "fp32",
        images: str | Path | Sequence[str | Path] | None = None,
    ) -> Model:
        """Write an ONNX file and open it; see `compress.export`."""
        from compress.config.deploy import Deploy
        from compress.run.artifacts import ArtifactPlan, Checks, make, onnx_files
        from compress.run.pipeline import quantizing
        from deploy.core.precisions import PRECISIONS, file_for

        if precision not in PRECISIONS:
            raise UserError(f"precision: '{precision}' is none of {', '.join(PRECISIONS)}")
        recipe, kind = self._recipe, PRECISIONS[precision]
        if recipe is None and (images is None or kind.quantized):
            what = "to compare on" if images is None else "to calibrate on"
            beside = RunFolder(self.path.parent).recipe
            raise UserError(f"images: there is no {beside} to take images {what} from; use compress export")
        files = self._checks.images if images is None else _files(images)
        limits = None if self.card.short is None or self.card.long is None else (self.card.short, self.card.long)
        settings = Deploy() if recipe is None else recipe.deploy
        out = file_for(self.path.with_suffix(".onnx"), precision) if out is None else Path(out)
        (file,) = onnx_files(out, ["fp32"], None)
        plan = ArtifactPlan(
            self.path,
            [_as(file, out, precision, settings)],
            settings,
            Checks(files, self.card.input_size, limits),
            quantizing(recipe) if recipe is not None and kind.quantized else None,
        )
        for artifact in make(plan):
            if not artifact.made:
                raise UserError(artifact.summary)
        return open_model(out)
