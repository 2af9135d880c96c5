"""A recipe: one YAML file that holds every setting of a run, checked completely before anything starts.

    recipe = load_recipe("recipes/quickstart.yaml", ["train.epochs=3"])

Public: `load_recipe`, `load_teacher_file`, `dump_recipe`, `recipe_sha256`, and the models from `Recipe` down. The
models are strict (no unknown keys, no silent conversion) and frozen. Relative paths are relative to the working
directory, as in a shell. Sizes are pixels unless the name says otherwise.

YAML is read with the scalar rules of YAML 1.2: `1e-4` is a number and `no` is a word, not false.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError, ValidationInfo, model_validator

from compress.config.base import OutputLocation, Seed, Settings, added_later, broken_rule
from compress.config.data import Data
from compress.config.deploy import Deploy
from compress.config.families import FAMILY_FACTS, Abilities, families_with
from compress.config.loggers import Loggers
from compress.config.messages import problems
from compress.config.methods import Methods
from compress.config.model import Model, Student
from compress.config.pseudo import Labels, PseudoLabels
from compress.config.ray import Ray
from compress.config.teacher import BOXES_ALONE, Source, Teacher
from compress.config.train import Train
from compress.config.yaml_document import Document, Dumper
from deploy.core.errors import UserError, one_line
from deploy.core.storage import fetch, place


class Recipe(Settings):
    """Everything about one run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and of its folder."""
    seed: Seed = 0
    """Seed of everything random in training."""
    runs: OutputLocation = Path("runs")
    """Folder of run folders."""
    data: Data
    """The images."""
    labels: Labels | None = None
    """Which training images have labels; null: all."""
    student: Student
    """The detector that ships."""
    teacher: Teacher | None = None
    """The detector to learn from."""
    methods: Methods = Methods()
    """How to learn from it."""
    pseudo_labels: PseudoLabels | None = None
    """Let teachers label the images that have no labels, and train on these as well; null: no."""
    train: Train
    """How the student trains."""
    baseline: bool = False
    """Also train the same student from the labels alone, to show what distillation and pseudo labels are worth. Of
    a pruned student: the same architecture from random weights; and where there are methods or pseudo labels, also the
    pruned weights. Without either, the pruned student is itself what the labels alone make of them."""
    deploy: Deploy = Deploy()
    """The exported file."""
    loggers: Loggers = added_later(Loggers())
    """Where figures go besides the run folder."""
    ray: Ray | None = added_later()
    """A cluster that labels and validates; null: this machine does. {} for a Ray of this machine."""

    @property
    def run_dir(self) -> Path:
        """Folder of this run's files: `<runs>/<name>`."""
        return self.runs / self.name

    @model_validator(mode="after")
    def _rules(self, info: ValidationInfo) -> Recipe:
        whole = not (info.context or {}).get("partial", False)
        self._method_rules(whole=whole)
        self._label_rules(whole=whole)
        if not self.student.is_own and self.student.prune is None:  # what is imported, or cut, is asked in the run
            broken = self.student_problem(FAMILY_FACTS[self.student.detector])
            if broken is not None:
                raise broken_rule(*broken)
        self._training_rules()
        self._cache_rules(whole=whole)
        self._prune_rules(whole=whole)
        return self

    def _method_rules(self, *, whole: bool) -> None:
        methods, taught = self.methods.enabled(), self.methods.of_teacher()
        first = ("methods", next(iter(taught), ""))
        if taught and self.teacher is None and whole:
            raise broken_rule(first, "needs a teacher; add the section teacher")
        if taught and self.teacher is not None and set(self.teacher.given) & set(BOXES_ALONE):
            raise broken_rule(
                first,
                f"learns from features or logits, and teacher.{self.teacher.given[0]} gives boxes alone; use "
                "pseudo_labels, or another teacher",
            )
        if self.baseline and not methods and self.pseudo_labels is None and self.student.prune is None and whole:
            raise broken_rule("baseline", "needs something to compare with; add a method under methods")
        for name, term in methods.items():
            if term.stop_epoch is not None and term.stop_epoch > (self.train.epochs or term.stop_epoch):
                raise broken_rule(
                    ("methods", name, "stop_epoch"), f"{term.stop_epoch} is more than train.epochs, {self.train.epochs}"
                )

    def _training_rules(self) -> None:
        if self.student.init is not None and self.teacher is not None and self.teacher.inherit:
            raise broken_rule("teacher.inherit", "would replace the neck and head that student.init brings; keep one")
        trained: dict[str, Model] = {"student": self.student}
        if self.teacher is not None and self.teacher.train is not None and self.teacher.model is not None:
            trained["teacher.model"] = self.teacher.model
            for key in ("devices", "accelerator", "precision"):
                value, wanted = getattr(self.teacher.train, key), getattr(self.train, key)
                if value != wanted:
                    raise broken_rule(
                        f"teacher.train.{key}",
                        f"{value!r} is not train.{key}, {wanted!r}; one run trains both alike",
                    )
        for key, model in trained.items():
            if model.weights == "none" and model.frozen_stages >= 0:
                raise broken_rule(f"{key}.frozen_stages", "would freeze random weights; set it to -1")
            if model.weights == "none" and model.norm_eval:
                raise broken_rule(f"{key}.norm_eval", "would freeze unset statistics; set it to false")

    def _cache_rules(self, *, whole: bool) -> None:
        if self.teacher is None or self.teacher.cache is None:
            return
        if self.train.views is None:
            raise broken_rule(
                "teacher.cache", "needs train.views: without them no augmentation comes twice; set train.views: 8"
            )
        if not self.methods.of_teacher() and whole:
            raise broken_rule("teacher.cache", "is not used: no method learns from the teacher; leave it out")
        cwd = self.methods.cwd
        if self.teacher.cache_classes is not None and cwd is not None and cwd.on == "logits":
            raise broken_rule("teacher.cache_classes", "methods.cwd on logits compares all classes; leave it out")

    def _prune_rules(self, *, whole: bool) -> None:
        prune, teacher = self.student.prune, self.teacher
        if prune is None:
            return
        if prune.of == "teacher" and whole:
            if teacher is None:
                raise broken_rule("student.prune.of", "is teacher, and there is none; name a checkpoint")
            if teacher.train is None and teacher.checkpoint is None:
                raise broken_rule(
                    "student.prune.of",
                    f"a teacher of another library (teacher.{teacher.given[0]}) cannot be pruned; name a checkpoint",
                )
        if teacher is not None and teacher.inherit:
            raise broken_rule("teacher.inherit", "a pruned student has the whole one's weights already; leave it out")
        needing = prune.needs_images
        if needing is not None and self.labels is not None and self.labels.fraction == 0:
            raise broken_rule(f"student.prune.{needing}", "needs labelled training images, and labels.fraction is 0")

    def student_problem(self, abilities: Abilities) -> tuple[str, str] | None:
        """Key and problem of what the recipe asks of its student and a detector of these abilities cannot do."""
        family, pseudo = self.student.detector, self.pseudo_labels
        if self.deploy.int8.qad is not None and not abilities.quantizable:
            return "deploy.int8.qad", f"is for {families_with('quantizable')} students, not {family}; leave it out"
        if pseudo is None:
            return None
        if pseudo.weighting == "score" and not abilities.weights_labels:
            return (
                "pseudo_labels.weighting",
                f"score is for {families_with('weights_labels')} students; a {family} student needs hard",
            )
        if (pseudo.tau is None or pseudo.tau_ignore != pseudo.tau) and not abilities.ignores_regions:
            return (
                "pseudo_labels.tau_ignore",
                f"a {family} student cannot learn from uncertain regions; set tau and tau_ignore to one number"
                f"{'' if pseudo.tau is None else f', {pseudo.tau:g}'}, and there are none",
            )
        return None

    def _label_rules(self, *, whole: bool) -> None:
        if self.pseudo_labels is not None:
            self._pseudo_label_rules(self.pseudo_labels, whole=whole)
        if self.labels is None or self.labels.fraction > 0:
            return
        pseudo, teacher = self.pseudo_labels, self.teacher
        if pseudo is None:
            raise broken_rule("labels.fraction", "is 0 and there is no section pseudo_labels: nothing to train on")
        needs_labels = {
            "pseudo_labels.fine_tune": pseudo.fine_tune is not None,
            "pseudo_labels.thresholds": pseudo.thresholds == "best_f1",
            "teacher.train": teacher is not None and teacher.train is not None,
            "baseline": self.baseline,
            "deploy.int8.qad": self.deploy.int8.qad is not None,
            "deploy.int8.guided": self.deploy.int8.guided,
        }
        for key, asked_for in needs_labels.items():
            if asked_for:
                raise broken_rule(key, "needs labelled training images, and labels.fraction is 0")

    def _pseudo_label_rules(self, pseudo: PseudoLabels, *, whole: bool) -> None:
        if pseudo.teachers is None and self.teacher is None and whole:
            raise broken_rule(
                "pseudo_labels", "no teacher is given; add pseudo_labels.teachers, or the section teacher"
            )
        if not pseudo.unlabeled and (self.labels is None or self.labels.fraction == 1):
            raise broken_rule(
                "pseudo_labels", "all images have labels; name folders under unlabeled, or set labels.fraction below 1"
            )
        used = self.methods.of_teacher() or (self.teacher is not None and self.teacher.inherit)
        if pseudo.teachers and self.teacher is not None and not used and whole:
            raise broken_rule(
                "teacher", "is not used: pseudo_labels.teachers label the images, and there are no methods; remove it"
            )
        parts = self.train.devices * self.train.accumulate
        if pseudo.fine_tune is not None and (pseudo.fine_tune.batch_size or 0) % parts:
            raise broken_rule(
                "pseudo_labels.fine_tune.batch_size",
                f"{pseudo.fine_tune.batch_size} is not a multiple of train.devices x train.accumulate = {parts}",
            )


# ------------------------------------------------------------------------------------------ load and dump


def load_recipe(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str] = (), *, partial: bool = False
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, or the same as a dictionary; there, paths may be `Path`s and lists tuples.
        overrides: texts like `train.epochs=3`, values in YAML.
        partial: methods or a teacher come as objects beside the recipe, which need not name any then.

    Raises UserError with one line for each problem: `file:line: key: problem`, of a dictionary `key: problem`, or
    `--set key: problem`.
    """
    return _load(source, Recipe, overrides, partial=partial)


def load_teacher_file(path: Path) -> Source:
    """The teacher in a YAML file that has a section `teacher` as recipes have it, with a source and nothing else.

    Raises UserError as `load_recipe` does.
    """
    return _load(path, TeacherFile).teacher


class TeacherFile(Settings):
    """A YAML file that describes a teacher."""

    teacher: Source
    """The teacher."""


Root = TypeVar("Root", bound=Settings)


def _load(
    source: Path | str | Mapping[str, Any], root: type[Root], overrides: Sequence[str] = (), *, partial: bool = False
) -> Root:
    what = "recipe" if root is Recipe else "teacher"
    if not isinstance(source, str | Path | Mapping):
        raise UserError(f"{what}: needs a file's path or a dict, got a value of type {type(source).__name__}")
    name = None if isinstance(source, Mapping) else str(source)
    document = Document(name)
    try:
        data = document.take(source) if isinstance(source, Mapping) else document.read(_text_of(Path(source), what))
        for override in overrides:
            document.override(data, override)
        if document.problems:
            raise UserError("\n".join(document.problems))
        # Through JSON, because strict mode then means what YAML means: lists fill tuples, text fills
        # paths, whole numbers fill floats; and nothing else is converted.
        return root.model_validate_json(json.dumps(data), context={"partial": partial})
    except UserError:
        raise
    except ValidationError as error:
        raise UserError("\n".join(problems(error, data, document, root))) from None
    except (RecursionError, ValueError) as error:  # thousands of sections in each other, or of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise UserError(f"{name or what}: not a {what}: {reason}") from None


def _text_of(path: Path, what: str) -> str:
    try:
        return fetch(place(path)).read_text(encoding="utf-8")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the {what}: {reason}") from None


def check_distills(recipe: Recipe, where: object, *, own_methods: bool = False) -> None:
    """Raise UserError, naming `where` the recipe is from, when a student would learn from the labels alone."""
    if not recipe.methods.enabled() and recipe.pseudo_labels is None and not own_methods:
        raise UserError(
            f"{where}: nothing to distill with; add a method under methods, or pseudo_labels, or use compress train"
        )


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.dump(recipe_content(recipe), Dumper=Dumper, sort_keys=False, width=110)


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 of the settings, 64 hexadecimal digits; formatting, comments, written-out defaults, `loggers` and `ray`
    do not change it."""
    content = {key: value for key, value in recipe_content(recipe).items() if key not in ("loggers", "ray")}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """All settings as JSON. A student that is cut has the one key, also where its architecture is known by now."""
    content = recipe.model_dump(mode="json")
    if recipe.student.prune is not None:
        content["student"] = {"prune": content["student"]["prune"]}
    return content
