"""A trained student on disk: its checkpoint, the recipe.yaml beside it, and what the command line says on top."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.exits import gate_failed
from compress.cli.options import ThresholdFlags, images_in, need_folder
from deploy.core.errors import UserError
from deploy.core.files import CHECKPOINT_SUFFIXES, ONNX_SUFFIX
from deploy.core.storage import is_file

if TYPE_CHECKING:
    from compress.config.data import Split
    from compress.config.deploy import Deploy
    from compress.config.recipe import Recipe
    from compress.run.artifacts import Artifact, ArtifactPlan, Checks


@dataclass(frozen=True)
class Student:
    """recipe: of its run, if it lies there. settings: the recipe's, or the defaults, with the options on top.
    images: --images."""

    path: Path
    recipe: Recipe | None
    settings: Deploy
    images: Path | None

    @property
    def recipe_file(self) -> Path:
        """Path of its recipe, if there is one."""
        return self.path.parent / "recipe.yaml"

    def need_images_and_size(self) -> None:
        """Raise UserError where nothing says which images to check an export on, or how large its input is."""
        if self.recipe is None and self.images is None:
            raise UserError(f"--images: there is no {self.recipe_file} to take images from; give a folder")
        if self.recipe is None and self.settings.input_size is None:
            raise UserError(
                f"--input-size: there is no {self.recipe_file} to take it from; give it, for example 800x1344"
            )

    def checks(self) -> tuple[Checks, Split | None]:
        """Return what exports are checked on, and the labelled images that they come from, if they are the recipe's.
        These may lie on another machine, so they are not looked for where the options say everything."""
        from compress.run.artifacts import Checks

        size, files = self.settings.input_size, [] if self.images is None else images_in(self.images)
        recipe, split, train = self.recipe, None, None
        if recipe is not None and (not files or size is None):
            from compress.run.plans import validation_images

            split, _, checks = validation_images(recipe)
            train = None if files else checks.train
            files, size = files or list(checks.images), size or checks.input_size
        assert size is not None and files, "need_images_and_size was called"
        resize_short_long = None if recipe is None else (recipe.data.eval_short, recipe.data.long)
        return Checks(files, size, resize_short_long, train), split


def read_student(path: Path, images: Path | None, input_size: str | None, thresholds: ThresholdFlags) -> Student:
    """Raises UserError for options that cannot be, and for a bad recipe beside the checkpoint; beside `zoo:NAME` there
    is none."""
    from compress.config.base import is_published

    published = is_published(path)
    if not published and path.suffix not in (*CHECKPOINT_SUFFIXES, ONNX_SUFFIX):
        raise UserError(f"{path}: is no checkpoint; give a student.safetensors")
    if images is not None:
        need_folder(images, "--images")
    given = {"input_size": _height_width(input_size), **vars(thresholds)}
    recipe_file = path.parent / "recipe.yaml"
    recipe = None
    if not published and is_file(recipe_file):
        from compress.config.recipe import load_recipe

        recipe = load_recipe(recipe_file, partial=True)  # the run may have had parts that were objects
    settings = _deploy_settings(recipe, {key: value for key, value in given.items() if value is not None})
    return Student(path, recipe, settings, images)


def make_files(plan: ArtifactPlan) -> list[Artifact]:
    """Make the files of a plan and say what they are. Ends the command where one cannot be made."""
    from compress.console import open_console
    from compress.run.artifacts import make
    from compress.run.folder import writing
    from deploy.graph.export import ExportMismatchError
    from deploy.quantize.picture import sensitivity_table, trials_table

    made, files = [], ExitStack()
    files.enter_context(writing(plan.files[0].path))
    try:
        for artifact in make(plan):
            out, found = artifact.path, artifact.search
            if artifact.gate == "fail" and out.is_file():  # of an earlier export, which may have had another budget
                out.unlink()
                print(f"{out}: removed; it was made by an earlier export")
            if found is not None:
                if found.sensitivities or not artifact.made:
                    open_console().print(sensitivity_table(found))
                open_console().print(trials_table(found))
            if artifact.gate == "fail":
                gate_failed(artifact.summary)
            if not artifact.made:
                raise UserError(artifact.summary)
            if found is not None:
                print(f"the search: {out.with_suffix('.guided.json')}, {out.with_suffix('.guided.svg')}")
            print(f"{out}: {artifact.summary}")
            made.append(artifact)
    except ExportMismatchError as error:
        gate_failed(f"{plan.checkpoint}: {' '.join(str(error).split())}")
    finally:
        files.close()
    return made


def _height_width(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, times, width = text.lower().partition("x")
    if not (times and height.isdecimal() and width.isdecimal()):
        raise UserError(f"--input-size: '{text}' is not HEIGHTxWIDTH, for example 800x1344")
    if max(len(height), len(width)) > 9:  # no number to compare with
        raise UserError("--input-size: at most 8192 pixels high and wide")
    if int(height) % 32 or int(width) % 32 or not int(height) or not int(width):
        raise UserError(f"--input-size: '{text}': height and width must be multiples of 32")
    return int(height), int(width)


def _deploy_settings(recipe: Recipe | None, given: dict[str, Any]) -> Deploy:
    """The deploy section of the recipe, or the defaults; with what was given on top."""
    from pydantic import ValidationError

    from compress.config.deploy import Deploy

    base = Deploy() if recipe is None else recipe.deploy
    try:
        return Deploy.model_validate({**base.model_dump(), **given})
    except ValidationError as error:
        raise UserError("; ".join(map(_deploy_problem, error.errors()))) from None


def _deploy_problem(problem: Any) -> str:
    key = problem.get("ctx", {}).get("key") or problem["loc"][0]
    option, message = f"--{str(key).replace('_', '-')}", problem["msg"].removeprefix("Input ")
    return f"{option}: {message}" if problem["type"] == "rule" else f"{option}: {problem['input']} {message}"
