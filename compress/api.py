"""The face of the package: what `import compress` offers.

    run = compress.distill("first.yaml", methods={"mine": MyLoss()})     # a path, a dict or a Recipe
    run.student.detect("street.jpg")                                     # boxes, scores, labels, class_names
    file = run.student.export("student.onnx")
    file.validate("val.json", "images").metrics.map
    compress.open("student.onnx").detect("street.jpg")                   # without torch

Torch is imported by the functions that need it, when they are called. What a user got wrong raises
`deploy.core.errors.UserError` with the line that the command of the same name prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config.base import is_published
from compress.config.recipe import Recipe, check_distills, load_recipe
from compress.manifest import BASELINE, STUDENT, TEACHER, RunFolder
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.core.files import CHECKPOINT_SUFFIXES, ONNX_SUFFIX
from deploy.core.image_folder import image_files
from deploy.core.storage import is_file, is_remote, place, pull, push, shown, workplace
from deploy.model import Model, open_model
from deploy.runtimes.open import OwnRunner

if TYPE_CHECKING:
    from compress.detectors.base import Detector
    from compress.distill.method import Method
    from compress.run.artifacts import Checks
    from compress.run.parts import Parts
    from compress.teachers.base import BoxTeacher
    from deploy.core.precisions import Target

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

    loaded = _recipe(recipe, partial=bool(methods) or teacher is not None)
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

    loaded = _recipe(recipe, partial=bool(methods) or teacher is not None)
    check_distills(loaded, _name_of(recipe), own_methods=bool(methods))
    return Run(pipeline.distill(loaded, resume=resume, parts=_parts(methods, teacher, student)))


def train(recipe: RecipeSource, *, student: Callable[[int], Detector] | None = None, resume: bool = False) -> Run:
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
        providers: where ONNX Runtime runs an exported file, in order of preference: `cpu`, `cuda`, `tensorrt`; or
            `openvino` (or `openvino-gpu`, `openvino-npu`), which is a runtime of its own.
        input_size: of a checkpoint: see `export`.
        device: of a checkpoint: where torch runs it.
        runner: a user's own runner to open the file with, as a class or an import path `package.module:MyRunner`.
        options: of exported files: `threads`, `allow_fallback`, `tensorrt`, `openvino`, `cuda_graph`
            (`deploy.runtimes.open.open_runner`).

    Exported files need no torch. Raises UserError for everything that keeps the file from running.
    """
    if runner is None and (Path(path).suffix in CHECKPOINT_SUFFIXES or is_published(path)):
        if options:
            raise UserError(f"{', '.join(options)}: of exported files, and {path} is a checkpoint")
        return Checkpoint(path, input_size=input_size, device=device)
    if input_size is not None or device != "cpu":
        name = "device" if input_size is None else "input_size"
        raise UserError(f"{name}: of checkpoints, and {path} is none")
    return open_model(path, providers, runner=runner, **options)


class Checkpoint(Model):
    """A detector in PyTorch with the post-processing of an exported file: it detects, validates, measures, exports."""

    def __init__(
        self,
        path: str | Path,
        *,
        recipe: Recipe | None = None,
        input_size: tuple[int, int] | None = None,
        categories: Mapping[int, str] | None = None,
        device: str = "cpu",
    ) -> None:
        """Load a checkpoint.

        Args:
            path: a file, or `zoo:NAME`.
            recipe: None: the recipe.yaml beside the file, if there is one.
            input_size, device: see `open`.
            categories: id → name in label order, for a checkpoint that does not say which classes it knows.

        Raises UserError for a detector that has no fixed graph, and where nothing says how large the input is.
        """
        from compress.config.deploy import Deploy
        from compress.export.onnx import torch_runner

        self.path = place(path)
        self._recipe_file = RunFolder(self.path.parent).recipe
        if recipe is None and is_file(self._recipe_file):
            recipe = load_recipe(self._recipe_file, partial=True)
        self._recipe = recipe
        self._settings = Deploy() if recipe is None else recipe.deploy
        size = input_size or self._settings.input_size
        resize_short_long = None
        if recipe is not None:
            resize_short_long = (recipe.data.eval_short, recipe.data.long)
            size = size or self._checks.input_size
        if size is None:
            raise UserError(
                f"input_size: there is no {self._recipe_file} to take it from; give it, for example (800, 1344)"
            )
        runner = torch_runner(
            str(path), self._settings, size, resize_short_long=resize_short_long, categories=categories, device=device
        )
        super().__init__(runner, name=str(path))

    def export(
        self,
        out: str | Path | None = None,
        *,
        precision: str = "fp32",
        images: str | Path | Sequence[str | Path] | None = None,
    ) -> Model:
        """Write an ONNX file and open it; see `compress.export`."""
        from compress.run.artifacts import ArtifactPlan, Checks, make, onnx_files
        from compress.run.folder import writing
        from compress.run.plans import quantizing
        from deploy.core.precisions import PRECISIONS, file_for

        if precision not in PRECISIONS:
            raise UserError(f"precision: '{precision}' is none of {', '.join(PRECISIONS)}")
        quantized = PRECISIONS[precision].quantized
        if self._recipe is None and (quantized or images is None):
            what = "calibration images" if quantized else "images"
            raise UserError(f"{precision}: there is no {self._recipe_file} to take {what} from")
        target, on_grids = self._target(precision)
        if out is None and (is_published(self.path) or is_remote(self.path)):
            raise UserError(f"out: say where the file goes; {shown(self.path)} lies in no folder here")
        path = file_for(self.path.with_suffix(ONNX_SUFFIX), precision) if out is None else workplace(out)
        if path.suffix != ONNX_SUFFIX:
            raise UserError(f"out: {path} does not end in {ONNX_SUFFIX}")
        short, long = self.card.short, self.card.long
        plan = ArtifactPlan(
            checkpoint=self.path,
            files=[replace(file, path=path) for file in onnx_files(path, [precision], target)],
            settings=self._settings,
            checks=Checks(
                self._checks.images if images is None else _files(images),
                self.card.input_size,
                None if short is None or long is None else (short, long),
                self._checks.train if images is None else None,
            ),
            quantizing=quantizing(self._recipe) if quantized and self._recipe is not None else None,
            on_grids=on_grids,
        )
        with writing(path):
            for artifact in make(plan):
                if not artifact.made:
                    raise UserError(artifact.summary)
        push(path)
        return open_model(path, PRECISIONS[precision].providers[:1] or "cpu")

    def prune(
        self,
        settings: Mapping[str, Any],
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        *,
        out: str | Path | None = None,
        force: bool = False,
    ) -> Checkpoint:
        """Write a checkpoint with fewer channels, which keeps the weights of those that stay, and open it. Nothing is
        trained: mAP falls until something teaches it.

        Args:
            settings: as of a recipe's `student.prune` without `of`, such as `{"gflops": 0.5, "importance": "taylor"}`.
            annotations, images: a COCO JSON of training images and their folder, for settings that look at such.
                Default: those of the recipe.yaml beside this checkpoint.
            out: default: this one's name with `.pruned.safetensors`. force: replace a file that is there.

        Raises UserError for settings that cannot be, or that need images without any, a budget that cannot be met, and
        a checkpoint that was pruned before or trained on the grids of its int8 file.
        """
        from compress.config.data import Split
        from compress.config.prune import read_cut
        from compress.run.plans import training_labels
        from compress.run.prune_checkpoint import CheckpointPruning, beside, need_new_file, prune_checkpoint

        if (annotations is None) != (images is None):
            raise UserError("annotations, images: belong together; give both, or none")
        path = beside(str(self.path)) if out is None else Path(out)
        need_new_file(path, str(self.path), force=force)
        size = self.card.input_size
        short, long = self.card.short or min(size), self.card.long or max(size)
        cut, given = read_cut(settings), None
        if annotations is not None and images is not None:
            given = Split(annotations=place(annotations), images=place(images))
        needed = None if cut.needs_pictures is None else f"prune.{cut.needs_pictures}"
        labels = training_labels(self._recipe, given, needed, print)
        optional = needed is None and given is None
        limits, checkpoint = (short, long), str(self.path)
        plan = CheckpointPruning(checkpoint, path, cut, size, limits, self._settings, labels, optional)
        made = prune_checkpoint(plan, print)
        return Checkpoint(made.path, recipe=self._recipe, input_size=size)

    @cached_property
    def _checks(self) -> Checks:
        """The recipe's validation images and the canvas that holds them."""
        from compress.run.plans import validation_images

        assert self._recipe is not None, "looked for where there is a recipe"
        return validation_images(self._recipe)[2]

    def _target(self, precision: str) -> tuple[Target, bool]:
        """The format of a quantized file; and whether its scales are those that were trained, beside the checkpoint."""
        from compress.training.qad.export import grids_file, load_grids

        file = grids_file(self.path)
        if precision != "int8" or not is_file(file):
            return self._settings.int8.target, False
        return load_grids(file).target, True


class Run:
    """Results of a run in its folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = workplace(folder)
        if self.folder != Path(folder):
            pull(self.folder)
        self._files = RunFolder(self.folder)

    def __repr__(self) -> str:
        return f"<run in {self.folder}>"

    @property
    def report(self) -> dict[str, Any]:
        """report.json: `models` with their mAP, `comparisons` with intervals, `artifacts` with mAP, latency and gate,
        and more.

        Raises UserError where there is none: `compress.run` writes it, `distill` and `train` do not.
        """
        try:
            report: dict[str, Any] = json.loads(self._files.report.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self._files.report}: not found; compress.run writes it") from None
        return report

    @cached_property
    def student(self) -> Checkpoint:
        """The student in PyTorch. Raises UserError for one without a fixed graph, which only trains and teaches."""
        return self._trained(STUDENT, "the student is not trained yet")

    @cached_property
    def baseline(self) -> Checkpoint:
        """The student that was trained without its teacher. Raises UserError where there is none."""
        return self._trained(BASELINE, "trained without a baseline; the recipe's `baseline: true` asks for one")

    @cached_property
    def teacher(self) -> Checkpoint:
        """The teacher, if it is a checkpoint of this project. Raises UserError for others, and where there is none."""
        recipe = self._recipe
        if recipe.teacher is None or recipe.teacher.checkpoint is None:
            return self._trained(TEACHER, "the teacher is no checkpoint of this project, or there is none")
        names = self.student.card
        categories = dict(zip(names.category_ids, names.class_names, strict=True))
        return Checkpoint(recipe.teacher.checkpoint, recipe=recipe, categories=categories)

    @cached_property
    def _recipe(self) -> Recipe:
        return load_recipe(self._files.recipe, partial=True)  # its methods may have been objects

    def _trained(self, name: str, otherwise: str) -> Checkpoint:
        path = self._files.weights(name)
        if not path.is_file():
            raise UserError(f"{path}: not found: {otherwise}")
        return Checkpoint(path, recipe=self._recipe)


# --- details --------------------------------------------------------------------------------------------


def _recipe(source: RecipeSource, *, partial: bool = False) -> Recipe:
    """partial: methods or a teacher come as objects, so the recipe need not name any."""
    return source if isinstance(source, Recipe) else load_recipe(source, partial=partial)


def _name_of(source: RecipeSource) -> object:
    return source if isinstance(source, str | Path) else "recipe"


def _parts(
    methods: Mapping[str, Method] | None,
    teacher: Detector | BoxTeacher | None,
    student: Callable[[int], Detector] | None,
) -> Parts:
    from compress.run.parts import Parts

    return Parts({} if methods is None else methods, teacher, student)


def _files(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """The image files of a folder, or those that are named."""
    return image_files(place(images)) if isinstance(images, str | Path) else [place(image) for image in images]
