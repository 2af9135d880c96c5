"""Methods as a recipe with nothing but their names builds them, but for what a test changes."""

from __future__ import annotations

from typing import Any, TypeVar

from compress.config import methods as settings
from compress.distill.bckd import BCKD
from compress.distill.crosskd import CrossKD
from compress.distill.cwd import CWD
from compress.distill.ddf import DDF
from compress.distill.dkd import DKD
from compress.distill.fgd import FGD
from compress.distill.gi import GI
from compress.distill.kd_detr import KDDETR
from compress.distill.ld import LD
from compress.distill.method import Method
from compress.distill.mgd import MGD
from compress.distill.pkd import PKD
from compress.distill.tid import TID, Rules
from compress.distill.uet import UET

SETTINGS: dict[type[Method], type[settings.Term]] = {
    BCKD: settings.Bckd,
    FGD: settings.Fgd,
    PKD: settings.Pkd,
    CWD: settings.Cwd,
    MGD: settings.Mgd,
    GI: settings.Gi,
    TID: settings.Tid,
    LD: settings.Ld,
    CrossKD: settings.Crosskd,
    DKD: settings.Dkd,
    KDDETR: settings.KdDetr,
    DDF: settings.Ddf,
}
M = TypeVar("M", bound=Method)


def build(method: type[M], *arguments: Any, **changes: Any) -> M:
    """`method(*arguments)` with the default settings; `changes` are settings, or other arguments such as weight."""
    known = {key: value for key, value in changes.items() if key in SETTINGS[method].model_fields and key != "weight"}
    constants = SETTINGS[method].model_validate(known).constants()
    return method(*arguments, **(constants | changes))


def build_uet(host: Method, **changes: Any) -> UET:
    """The wrapper around `host`."""
    return UET(host, **(settings.Uet(of="host").constants() | changes))


def rules_with(**changes: Any) -> Rules:
    """TID's."""
    constants = settings.Tid().constants() | changes
    return Rules(**{key: constants[key] for key in Rules.__dataclass_fields__})
