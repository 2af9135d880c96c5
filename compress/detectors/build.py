"""The detectors that can be built and trained here: the families of this project, by name, and a user's own, by import
path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.config.families import FAMILY_FACTS, FamilyFacts
from compress.config.model import Model
from compress.detectors.backbones import build_backbone, build_own_backbone
from compress.detectors.base import Detector, in_backbone
from compress.detectors.gfl import GFL
from compress.detectors.level_norm import LevelNorm
from compress.detectors.widths import resize
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import call_own, import_object, is_import_path


@dataclass(frozen=True)
class FamilyRecord:
    """A family of this project.

    facts: what recipes know of it.
    load: imports and returns its class. Its classmethod `build(num_classes, backbone, *, neck_channels, head_depth)`,
        which takes the keys of `facts.defaults` too, gives a detector with fresh neck and head. Of a family that is
        built as a whole: `build(num_classes, *, size, options, init)`.
    """

    facts: FamilyFacts
    load: Callable[[], Any]


def _fcos() -> Any:
    from compress.detectors.torchvision.dense import FCOS  # torchvision's detectors take a second to import

    return FCOS


def _retinanet() -> Any:
    from compress.detectors.torchvision.dense import RetinaNet

    return RetinaNet


def _faster_rcnn() -> Any:
    from compress.detectors.torchvision.two_stage import FasterRCNN

    return FasterRCNN


def _d_fine() -> Any:
    from compress.detectors.transformers.real_time_detr import DFine

    return DFine


def _rt_detr_v2() -> Any:
    from compress.detectors.transformers.real_time_detr import RTDetrV2

    return RTDetrV2


def _rf_detr() -> Any:
    from compress.detectors.transformers.lw_detr import RfDetr

    return RfDetr


def _lw_detr() -> Any:
    from compress.detectors.transformers.lw_detr import LwDetr

    return LwDetr


FAMILIES = {
    "gfl": FamilyRecord(FAMILY_FACTS["gfl"], lambda: GFL),
    "fcos": FamilyRecord(FAMILY_FACTS["fcos"], _fcos),
    "retinanet": FamilyRecord(FAMILY_FACTS["retinanet"], _retinanet),
    "faster_rcnn": FamilyRecord(FAMILY_FACTS["faster_rcnn"], _faster_rcnn),
    "d_fine": FamilyRecord(FAMILY_FACTS["d_fine"], _d_fine),
    "rt_detr_v2": FamilyRecord(FAMILY_FACTS["rt_detr_v2"], _rt_detr_v2),
    "rf_detr": FamilyRecord(FAMILY_FACTS["rf_detr"], _rf_detr),
    "lw_detr": FamilyRecord(FAMILY_FACTS["lw_detr"], _lw_detr),
}


def exportable_families() -> str:
    """The families of which files can be made, for messages: `gfl, fcos or retinanet`."""
    names = [name for name, record in FAMILIES.items() if record.load().exportable is None]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


NEEDED = ("num_classes", "strides", "feature_channels", "mean", "std")
"""Attributes that the constructor of a detector sets."""


def detector_class(name: str, key: str = "detector") -> type[Detector]:
    """The class of a family, or of a user's own detector by its import path; its attributes say what it can.

    `key` names it in messages. Raises UserError for an import path that leads to no subclass of `Detector`.
    """
    if name in FAMILIES:
        family: type[Detector] = FAMILIES[name].load()
        return family
    found = import_object(name, key)
    if not (isinstance(found, type) and issubclass(found, Detector)):
        raise UserError(f"{key}: {name} is not a subclass of compress.detectors.base.Detector")
    return found


def assemble(model: Model, num_classes: int, key: str = "model") -> Detector:
    """The detector of `model` with fresh neck and head, its backbone with the weights that `model` says.

    A user's own class is imported and called. `key` names the section in messages. Raises UserError for parts that
    cannot be built and weights that cannot be had.
    """
    backbone = _backbone(model, key)
    kind: Any = detector_class(model.detector, f"{key}.detector")
    if model.is_own:
        parts = {} if backbone is None else {"backbone": backbone}
        arguments = parts | (model.options or {})
        detector: Detector = call_own(kind, model.detector, f"{key}.detector", num_classes, **arguments)
        lacking = [name for name in NEEDED if not hasattr(detector, name)]
        if lacking:
            raise UserError(f"{key}.detector: {model.detector} does not set {', '.join(lacking)}")
        detector.family = model.detector
    elif FAMILIES[model.detector].facts.whole:
        try:
            detector = kind.build(num_classes, size=model.size, options=model.options or {}, init=model.init)
        except UserError as error:
            raise UserError(f"{key}.{error}") from error
        options: Any = detector.options
        detector.model = Model(detector=model.detector, options=options)
        return detector
    else:
        defaults = FAMILIES[model.detector].facts.defaults
        given = {name: getattr(model, name) for name in defaults}
        detector = kind.build(
            num_classes,
            backbone,
            neck_channels=model.neck_channels,
            head_depth=model.head_depth,
            **{name: defaults[name] if value is None else value for name, value in given.items()},
        )
    detector.model = model.bare()
    if model.widths:
        try:
            resize(detector, model.widths)
            detector.set_feature_channels()
            detector.traced(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=detector.mean.device))
        except UserError as error:
            raise UserError(f"{key}.{error}") from None
        except Exception as error:  # whatever a layer says of channels that it does not have
            raise UserError(f"{key}.widths: the layers do not fit together ({first_line(error)})") from error
    return detector


def wrapped(library_model: Any) -> Detector | None:
    """The detector around a model of transformers, which keeps its weights; None where it is of no family here, or has
    settings that these do without."""
    from compress.detectors.transformers.load import untied

    for family, record in FAMILIES.items():
        if record.facts.whole and record.load().library == type(library_model).__name__:
            try:
                detector: Detector = record.load()(library_model.config.num_labels, untied(library_model))
            except UserError:
                return None
            options: Any = detector.options
            detector.model = Model(detector=family, options=options)
            return detector
    return None


def build_detector(
    model: Model, num_classes: int, seed: int, *, compiled: bool = False, key: str = "model"
) -> Detector:
    """A fresh detector; the same seed gives the same weights.

    compiled: run its dense loss passes through torch.compile, where it has such. key: of the recipe's section, for
    messages. Raises UserError as `assemble`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        detector = assemble(model, num_classes, key)
    detector.compiled = compiled
    return detector.to(memory_format=torch.channels_last)


def model_of(detector: Detector) -> Model:
    """The settings that build a detector of this architecture again.

    Of a detector that was not built from settings: its class by import path and its attribute `options`, the arguments
    of its constructor besides num_classes (absent: none).
    """
    if detector.model is not None:
        return detector.model
    kind = type(detector)
    return Model(detector=f"{kind.__module__}:{kind.__qualname__}", options=getattr(detector, "options", None))


def _backbone(model: Model, key: str) -> nn.Module | None:
    if model.backbone is None:
        return None
    if is_import_path(model.backbone):
        return build_own_backbone(model.backbone, model.backbone_options or {}, f"{key}.backbone")
    return build_backbone(
        model.backbone, weights=model.weights, frozen_stages=model.frozen_stages, norm_eval=model.norm_eval
    )


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy the layers of the teacher's neck and head whose weights have the student's shapes; the factors and biases of
    a GroupNorm to the BatchNorm of every level. Returns the keys; empty when no convolution fits, and then nothing is
    copied."""
    student_state, teacher_state = student.state_dict(), teacher.state_dict()

    def fits(key: str) -> bool:
        return key in student_state and student_state[key].shape == teacher_state[key].shape

    def weight_of(key: str) -> str:
        layer = key.rpartition(".")[0]
        return f"{layer}.weight" if f"{layer}.weight" in teacher_state else key

    for name, norm in student.named_modules():
        if isinstance(norm, LevelNorm):  # the factors and biases of a GroupNorm there fit every level
            of_all = name.removesuffix("bn") + "gn" if name.endswith(".bn") else name
            for level, key in product(range(len(norm)), ("weight", "bias")):
                if f"{of_all}.{key}" in teacher_state:
                    teacher_state[f"{name}.{level}.{key}"] = teacher_state[f"{of_all}.{key}"]
    keys = [key for key in teacher_state if not in_backbone(key) and fits(key) and fits(weight_of(key))]
    if not any(key.endswith("weight") and teacher_state[key].dim() == 4 for key in keys):
        return []
    student.load_state_dict({key: teacher_state[key] for key in keys}, strict=False)
    return keys


def model_size(detector: Detector, size: tuple[int, int]) -> dict[str, float]:
    """`params_m` (millions) and `gflops` of one image of `size` (height, width). A multiply-add is two FLOPs. What is
    computed says `Detector.counted`: of Faster R-CNN with as many proposals as it looks at most in evaluation."""
    was_training = detector.training
    detector.eval()
    learning = [p for p in detector.parameters() if p.requires_grad]
    images = torch.zeros(1, 3, *size, dtype=torch.uint8, device=next(detector.parameters()).device)
    try:
        for p in learning:  # torch's counter fails at a module whose input is a parameter, also without gradients
            p.requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            detector.counted(images)
    finally:
        for p in learning:
            p.requires_grad_(True)
    detector.train(was_training)
    params = sum(p.numel() for p in detector.parameters())
    return {"params_m": round(params / 1e6, 4), "gflops": round(counter.get_total_flops() / 1e9, 4)}
