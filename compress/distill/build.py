"""Build the modules that the trainer adds to its loss from a recipe's `methods`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.config import methods as config
from compress.detectors.base import Capability, Detector
from compress.distill import bckd, crosskd, cwd, ddf, dkd, fgd, gi, kd_detr, ld, mgd, pkd, tid, vfm
from compress.distill.level_matching import LevelMatched, match_levels
from compress.distill.method import BuildContext, Method
from compress.distill.uet import UET
from compress.distill.weighting import WeightedMethod
from deploy.core.errors import UserError
from deploy.core.import_path import call_own, import_object

Needs = frozenset[Capability]


@dataclass(frozen=True)
class MethodRecord:
    """A method of this package.

    settings: its section of a recipe; in `config.Methods` a field of the same name as its row here.
    build: makes it from its settings.
    needs: what it asks of both models; a function where its settings decide.
    one_prediction: why it is refused where a head has several predictions at a location; None: it is not.
    ability: a class variable of detectors that must be true of both models, and why; None: there is none.
    needs_teacher: as `Method.needs_teacher`.
    identity: what a training depends on besides the method's settings, as JSON, from these; None: nothing.
    """

    settings: type[config.Term]
    build: Callable[[Any, BuildContext], Method]
    needs: Needs | Callable[[Any], Needs]
    one_prediction: str | None = None
    ability: tuple[str, str] | None = None
    needs_teacher: bool = True
    identity: Callable[[Any], dict[str, Any]] | None = None


METHODS = {
    "bckd": MethodRecord(config.Bckd, bckd.build, bckd.BCKD.needs),
    "fgd": MethodRecord(config.Fgd, fgd.build, fgd.FGD.needs),
    "pkd": MethodRecord(config.Pkd, pkd.build, pkd.PKD.needs),
    "cwd": MethodRecord(config.Cwd, cwd.build, lambda settings: cwd.NEEDS[settings.on]),
    "mgd": MethodRecord(config.Mgd, mgd.build, mgd.MGD.needs),
    "gi": MethodRecord(config.Gi, gi.build, gi.GI.needs),
    "tid": MethodRecord(
        config.Tid, tid.build, tid.TID.needs, one_prediction="weighs locations by their one prediction"
    ),
    "ld": MethodRecord(config.Ld, ld.build, ld.LD.needs),
    "crosskd": MethodRecord(
        config.Crosskd,
        crosskd.build,
        crosskd.CrossKD.needs,
        ability=(
            "crossable",
            "sends the student's features through the teacher's head, which it can do with gfl alone",
        ),
    ),
    "dkd": MethodRecord(config.Dkd, dkd.build, dkd.DKD.needs),
    "kd_detr": MethodRecord(config.KdDetr, kd_detr.build, lambda settings: kd_detr.needs_of(settings.random_queries)),
    "ddf": MethodRecord(config.Ddf, ddf.build, ddf.DDF.needs),
    "vfm": MethodRecord(config.Vfm, vfm.build, vfm.VFM.needs, needs_teacher=False, identity=vfm.identity),
}


def build_methods(
    wanted: config.Methods,
    student: Detector,
    teacher: Detector | None,
    *,
    seed: int = 0,
    compiled: bool = False,
    own: Mapping[str, Method | WeightedMethod] | None = None,
) -> dict[str, WeightedMethod]:
    """The methods of a recipe by name, with fresh adapters; the same seed gives the same weights.

    Methods on features alone see the levels that both pyramids have in common.

    Args:
        teacher: None where no method needs one.
        own: methods of the user's as objects, by name, to add to those of the recipe: with weight 1, or with the weight
            and schedule that a `WeightedMethod` around them has. They are copied, so that every training begins with
            them as they were given.

    Raises UserError when a method asks for what the teacher or the student cannot give, or for what they do not share.
    """
    built = {}
    for index, (key, term) in enumerate(wanted.enabled().items()):
        record = _record(key, term)
        uet = wanted.uet if wanted.uet is not None and key in wanted.uet.base_methods else None
        needs = record.needs(term) if callable(record.needs) else record.needs
        if uet is not None and not record.needs_teacher:
            raise UserError(f"methods.uet.of: {key} learns from no teacher, whose maps uet samples; leave it out")
        theirs = _teacher_of(key, teacher, needed=record.needs_teacher)
        _check(key, needs if uet is None else needs | {Capability.FEATURES}, student, theirs, record)
        if isinstance(term, config.Adapted):
            assert theirs is not None, "methods on feature maps need a teacher"
            common = match_levels(student.strides, theirs.strides)
            term = term.model_copy(update={"levels": min(term.levels, len(common))})
        weight = 1.0 if term.weight == "auto" else term.weight
        context = BuildContext(student, theirs, weight, seed, compiled)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1000 * (index + 1))
            method = record.build(term, context)
        if method.needs - needs:  # of a user's own, whose options decide
            _check(key, method.needs, student, theirs, record)
        method = _on_common_levels(method, student, theirs)
        if uet is not None:
            method = UET(method, **uet.constants(), seed=seed, compiled=compiled)
        built[config.name_of(key)] = WeightedMethod(
            method,
            weight=weight if key in wanted.own else 1.0,  # a built-in one has its weight in its terms
            auto_ratio=(term.ratio or 1.0) if term.weight == "auto" else None,
            stop_epoch=term.stop_epoch,
            decay=term.decay == "linear",
        )
    for name, given in (own or {}).items():
        if name in built:
            raise UserError(f"methods.{name}: the recipe already has a method of this name; give yours another")
        if not name.isidentifier():  # it becomes a key of checkpoints and a column of metrics.csv
            raise UserError(f"methods.{name}: is not a plain name (letters, digits, _)")
        built[name] = _copy_of_own(name, given, student, teacher)
    return built


def identity(wanted: config.Methods) -> dict[str, Any]:
    """Identify what the methods of a recipe depend on besides their settings, as JSON; empty where they do not."""
    found = {}
    for key, term in wanted.enabled().items():
        record = METHODS.get(key)
        if record is not None and record.identity is not None:
            found[key] = record.identity(term)
    return {"method_inputs": found} if found else {}


# --- details --------------------------------------------------------------------------------------------


def _teacher_of(name: str, teacher: Detector | None, *, needed: bool) -> Detector | None:
    """What the method `name` is built with: the teacher, None where it needs none. Raises UserError where it lacks."""
    if needed and teacher is None:
        raise UserError(f"methods.{name}: needs a teacher; add the section teacher, or give one")
    return teacher if needed else None


def _on_common_levels(method: Method, student: Detector, teacher: Detector | None) -> Method:
    if teacher is not None and method.needs == {Capability.FEATURES} and student.strides != teacher.strides:
        return LevelMatched(method, match_levels(student.strides, teacher.strides))
    return method


def _record(key: str, term: config.Term) -> MethodRecord:
    """The row of a method; of a user's own, one that builds its class."""
    if not isinstance(term, config.OwnMethod):
        return METHODS[key]
    method = import_object(key, f"methods.{key}")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"methods.{key}: needs a subclass of compress.distill.method.Method, got {_kind(method)}")
    _check_capabilities(f"methods.{key}", method.needs)

    def build(settings: config.OwnMethod, context: BuildContext) -> Method:
        options = settings.options or {}
        made: Method = call_own(method, method.__name__, f"methods.{key}", context.student, context.teacher, **options)
        return made

    return MethodRecord(config.OwnMethod, build, method.needs, needs_teacher=method.needs_teacher)


def _check_capabilities(key: str, needs: Any) -> None:
    """Raises UserError where a user's own method says what it needs in anything but capabilities."""
    if not isinstance(needs, (set, frozenset)) or not all(isinstance(need, Capability) for need in needs):
        names = ", ".join(f"Capability.{capability.name}" for capability in Capability)
        raise UserError(f"{key}: its `needs` is {needs!r}; give a set of {names}")


def _copy_of_own(
    name: str, given: Method | WeightedMethod, student: Detector, teacher: Detector | None
) -> WeightedMethod:
    """A user's object, checked, with its weight and schedule."""
    method = given.method if isinstance(given, WeightedMethod) else given
    if not isinstance(method, Method):
        raise UserError(f"methods.{name}: needs a compress.distill.method.Method, got {_kind(method)}")
    _check_capabilities(f"methods.{name}", method.needs)
    teacher = _teacher_of(name, teacher, needed=method.needs_teacher)
    _check(name, method.needs, student, teacher)
    weighted = copy.deepcopy(given if isinstance(given, WeightedMethod) else WeightedMethod(given))
    weighted.method = _on_common_levels(weighted.method, student, teacher)
    return weighted


def _kind(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a value of type {type(thing).__name__}"


def _check(
    name: str, needs: Needs, student: Detector, teacher: Detector | None, record: MethodRecord | None = None
) -> None:
    """Raises UserError where the models cannot serve the method `name`; `record`: its row, if it is one of ours."""
    for model, whom in ((teacher, "teacher"), (student, "student")):
        if model is None:
            continue
        missing = needs - model.capabilities
        if Capability.DENSE in model.capabilities:
            missing -= {Capability.LOCATIONS}
        if missing:
            wanted = ", ".join(sorted(capability.value for capability in missing))
            raise UserError(f"methods.{name} needs {wanted} of the {whom}, which {model.family} cannot give")
        if record is not None and record.ability is not None and not getattr(model, record.ability[0]):
            raise UserError(f"methods.{name} {record.ability[1]}, and the {whom} is {model.family}")
    if not needs & {Capability.DENSE, Capability.LOCATIONS} or teacher is None:
        return
    shared = None if Capability.DENSE in needs else min(len(student.strides), len(teacher.strides))
    if student.strides[:shared] != teacher.strides[:shared] or student.anchor_sizes != teacher.anchor_sizes:
        raise UserError(
            f"methods.{name} compares predictions location by location: the student ({student.family}) has "
            f"{_places(student)}, the teacher ({teacher.family}) {_places(teacher)}; take a teacher of the same kind, "
            "or a method on features (fgd, pkd, cwd, mgd)"
        )
    if record is not None and record.one_prediction is not None and student.anchor_sizes is not None:
        raise UserError(f"methods.{name} {record.one_prediction}, {student.family} has {_places(student)}")


def _places(model: Detector) -> str:
    strides = ", ".join(str(stride) for stride in model.strides)
    if model.anchor_sizes is None:
        return f"one at a location of strides {strides}"
    width, height = model.anchor_sizes[0][0]
    return f"{len(model.anchor_sizes[0])} anchors from {width:g} x {height:g} px on at a location of strides {strides}"
