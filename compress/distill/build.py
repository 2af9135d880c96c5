"""From the recipe's `methods` to the modules that the trainer adds to its loss."""

from __future__ import annotations

import torch

from compress import methods as settings
from compress.detectors.base import Detector
from compress.distill.balance import Balanced
from compress.distill.bckd import BCKD
from compress.distill.crosskd import CrossKD
from compress.distill.cwd import CWD
from compress.distill.dkd import DKD
from compress.distill.fgd import FGD
from compress.distill.gi import GI
from compress.distill.ld import LD
from compress.distill.method import Method
from compress.distill.mgd import MGD
from compress.distill.pkd import PKD
from compress.distill.tid import TID
from compress.distill.uet import UET
from deploy.errors import UserError


def build_methods(
    wanted: settings.Methods, student: Detector, teacher: Detector, *, seed: int = 0, compiled: bool = False
) -> dict[str, Balanced]:
    """The methods of a recipe by name, with fresh adapters; the same seed gives the same weights.

    Raises UserError when a method asks for what the teacher or the student cannot give.
    """
    built = {}
    for index, (name, term) in enumerate(wanted.enabled().items()):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1000 * (index + 1))
            method = _build(term, student, teacher, seed=seed, compiled=compiled)
        if wanted.uet is not None and name in wanted.uet.hosts:
            method = UET(
                method,
                rates=wanted.uet.rates,
                combine=wanted.uet.combine,
                mode=wanted.uet.mode,
                certainty=wanted.uet.certainty,
                seed=seed,
            )
        _check(name, method, student, teacher)
        built[name] = Balanced(
            method,
            auto_ratio=(term.ratio or 1.0) if term.weight == "auto" else None,
            stop_epoch=term.stop_epoch,
            decay=term.decay == "linear",
        )
    return built


def _build(term: settings.Term, student: Detector, teacher: Detector, *, seed: int, compiled: bool) -> Method:
    constants = term.constants() | {"weight": 1.0 if term.weight == "auto" else term.weight}
    widths = (student.feature_channels, teacher.feature_channels)
    match term:
        case settings.Bckd():
            return BCKD(**constants, compiled=compiled)
        case settings.Fgd():
            return FGD(*widths, **constants)
        case settings.Pkd():
            return PKD(*widths, **constants)
        case settings.Cwd():
            return CWD(*widths, **constants)
        case settings.Mgd():
            return MGD(*widths, **constants, seed=seed)
        case settings.Gi():
            return GI(*widths, **constants)
        case settings.Tid():
            return TID(*widths, **constants)
        case settings.Ld():
            return LD(**constants)
        case settings.Crosskd():
            return CrossKD(student, teacher, **constants)
        case settings.Dkd():
            return DKD(**constants)
    raise AssertionError(f"no module for {type(term).__name__}")


def _check(name: str, method: Method, student: Detector, teacher: Detector) -> None:
    for model, whom in ((teacher, "teacher"), (student, "student")):
        missing = method.needs - model.capabilities
        if missing:
            wanted = ", ".join(sorted(capability.value for capability in missing))
            raise UserError(f"methods.{name} needs {wanted} of the {whom}, which {type(model).__name__} cannot give")
