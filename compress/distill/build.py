"""From the recipe's `methods` to the modules that the trainer adds to its loss."""

from __future__ import annotations

import torch

from compress.config import methods as settings
from compress.detectors.base import Capability, Detector
from compress.distill.bckd import BCKD
from compress.distill.crosskd import CrossKD
from compress.distill.cwd import CWD
from compress.distill.dkd import DKD
from compress.distill.fgd import FGD
from compress.distill.gi import GI
from compress.distill.ld import LD
from compress.distill.level_matching import Aligned, match_levels
from compress.distill.method import Method
from compress.distill.mgd import MGD
from compress.distill.pkd import PKD
from compress.distill.tid import TID
from compress.distill.uet import UET
from compress.distill.weighting import Balanced
from deploy.core.errors import UserError


def build_methods(
    wanted: settings.Methods, student: Detector, teacher: Detector, *, seed: int = 0, compiled: bool = False
) -> dict[str, Balanced]:
    """The methods of a recipe by name, with fresh adapters; the same seed gives the same weights.

    Methods on features see the levels that both pyramids have in common (`levels`).

    Raises UserError when a method asks for what the teacher or the student cannot give, or for what they do not share.
    """
    built = {}
    for index, (name, term) in enumerate(wanted.enabled().items()):
        uet = wanted.uet if wanted.uet is not None and name in wanted.uet.hosts else None
        needs = _needs(term)
        _check(name, needs if uet is None else needs | {Capability.FEATURES}, student, teacher)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1000 * (index + 1))
            method = _build(term, student, teacher, seed=seed, compiled=compiled)
        if needs == {Capability.FEATURES} and student.strides != teacher.strides:
            method = Aligned(method, match_levels(student.strides, teacher.strides))
        if uet is not None:
            method = UET(
                method,
                rates=uet.rates,
                combine=uet.combine,
                mode=uet.mode,
                certainty=uet.certainty,
                seed=seed,
                compiled=compiled,
            )
        built[name] = Balanced(
            method,
            auto_ratio=(term.ratio or 1.0) if term.weight == "auto" else None,
            stop_epoch=term.stop_epoch,
            decay=term.decay == "linear",
        )
    return built


def _build(term: settings.Term, student: Detector, teacher: Detector, *, seed: int, compiled: bool) -> Method:
    constants = term.constants() | {"weight": 1.0 if term.weight == "auto" else term.weight}
    if isinstance(term, settings.Adapted):
        common = match_levels(student.strides, teacher.strides)
        constants["levels"] = min(term.levels, len(common))
        widths = (student.feature_channels, teacher.feature_channels)
    match term:
        case settings.Bckd():
            return BCKD(**constants, compiled=compiled)
        case settings.Fgd():
            return FGD(*widths, **constants, compiled=compiled)
        case settings.Pkd():
            return PKD(*widths, **constants)
        case settings.Cwd():
            return CWD(*widths, **constants)
        case settings.Mgd():
            return MGD(*widths, **constants, seed=seed)
        case settings.Gi():
            return GI(*widths, **constants)
        case settings.Tid():
            return TID(*widths, **constants, compiled=compiled)
        case settings.Ld():
            return LD(**constants)
        case settings.Crosskd():
            return CrossKD(student, teacher, **constants, compiled=compiled)
        case settings.Dkd():
            return DKD(**constants)
    raise AssertionError(f"no module for {type(term).__name__}")


def _needs(term: settings.Term) -> frozenset[Capability]:
    match term:
        case settings.Cwd(on="logits"):
            return BCKD.needs
        case settings.Fgd() | settings.Pkd() | settings.Cwd() | settings.Mgd():
            return frozenset({Capability.FEATURES})
        case settings.Gi() | settings.Tid():
            return GI.needs
        case settings.Ld() | settings.Crosskd():
            return LD.needs
        case _:
            return BCKD.needs


def _check(name: str, needs: frozenset[Capability], student: Detector, teacher: Detector) -> None:
    for model, whom in ((teacher, "teacher"), (student, "student")):
        missing = needs - model.capabilities
        if missing:
            wanted = ", ".join(sorted(capability.value for capability in missing))
            raise UserError(f"methods.{name} needs {wanted} of the {whom}, which {model.family} cannot give")
    if Capability.DENSE not in needs:
        return
    if student.strides != teacher.strides or student.cells != teacher.cells:
        raise UserError(
            f"methods.{name} compares predictions place by place: the student ({student.family}) has "
            f"{_places(student)}, the teacher ({teacher.family}) {_places(teacher)}; take a teacher of the same kind, "
            "or a method on features (fgd, pkd, cwd, mgd)"
        )
    if name == "tid" and student.cells is not None:
        raise UserError(
            f"methods.tid weighs locations by their one prediction, {student.family} has {_places(student)}"
        )


def _places(model: Detector) -> str:
    strides = ", ".join(str(stride) for stride in model.strides)
    if model.cells is None:
        return f"one at a location of strides {strides}"
    width, height = model.cells[0][0]
    return f"{len(model.cells[0])} anchors from {width:g} x {height:g} px on at a location of strides {strides}"
