"""Distillation from the whole detector into what is left of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.config.methods import Methods
from compress.data.batch import Batch
from compress.detectors.base import Detector, freeze
from compress.detectors.build import inherit
from compress.distill.build import build_methods
from compress.distill.crosskd import CrossKD
from compress.distill.method import Outputs
from deploy.core.errors import UserError
from tests.helpers.methods import build
from tests.helpers.pruned import batch, detector, outputs, pictures, pruned

FEATURES = ("fgd", "pkd", "cwd", "mgd")
DENSE = ("bckd", "gi", "dkd")
OF_FAMILY = {
    "gfl": (*FEATURES, *DENSE, "tid", "ld"),
    "fcos": (*FEATURES, *DENSE, "tid"),
    "retinanet": (*FEATURES, *DENSE),
    "faster_rcnn": FEATURES,
}


def look(model: Detector, data: Batch, *, teaches: bool) -> Outputs:
    features = model.features(data.images)
    prediction = model.predict(features)
    return Outputs(features, prediction, model, None if teaches else model.assign(prediction, data.targets))


def terms(methods: dict[str, Any], student: Detector, teacher: Detector) -> tuple[dict[str, Tensor], int]:
    """The terms of a batch, and how many weights the methods have in adapters."""
    built = build_methods(Methods.model_validate(methods), student.train(), teacher)
    data = batch()
    ours, theirs = look(student, data, teaches=False), look(teacher, data, teaches=True)
    found = {key: value for method in built.values() for key, value in method.method(ours, theirs, data).items()}
    adapters = [p for method in built.values() for name, p in method.named_parameters() if ".adapter." in f".{name}"]
    return found, sum(p.numel() for p in adapters)


@pytest.fixture(scope="module")
def teacher() -> Detector:
    return freeze(detector(head_depth=2))


@pytest.mark.parametrize(
    "family", ["gfl", *(pytest.param(family, marks=pytest.mark.exhaustive) for family in OF_FAMILY if family != "gfl")]
)
@pytest.mark.parametrize("keep", [(), ("maps",)])
def test_every_method_of_a_family_teaches_what_is_left(family: str, keep: tuple[str, ...]) -> None:
    whole = freeze(detector(family))
    student = pruned(detector(family), keep=keep)
    methods: dict[str, Any] = {name: {} for name in OF_FAMILY[family]}
    methods["uet"] = {"of": ("fgd", "pkd")}
    found, _ = terms(methods, student, whole)
    assert len(found) >= len(OF_FAMILY[family]) and all(value.isfinite() for value in found.values())
    torch.stack(list(found.values())).sum().backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in without if name.startswith(("backbone", "neck"))]
    assert (student.feature_channels == 32) == bool(keep)


@pytest.mark.parametrize("name", ["fgd", "pkd", "cwd", "gi", "tid"])
def test_kept_maps_need_no_adapter(teacher: Detector, name: str) -> None:
    """mgd always has its generator; it is no adapter."""
    for keep in ((), ("maps",)):
        student = pruned(detector(head_depth=2), keep=keep)
        _, adapters = terms({name: {}}, student, teacher)
        assert adapters == (0 if keep else 5 * (student.feature_channels * 32 + 32))


def test_crosskd_needs_the_towers(teacher: Detector) -> None:
    """The student's features go through the rest of the teacher's head, whose towers are as they were."""
    student = pruned(detector(head_depth=2))
    message = (
        r"^methods\.crosskd: the student's head has \d+ channels, the teacher's has 32, .*; prune with keep: \[head\]$"
    )
    with pytest.raises(UserError, match=message) as error:
        build_methods(Methods.model_validate({"crosskd": {}}), student, teacher)
    assert "\n" not in str(error.value)
    kept = pruned(detector(head_depth=2), keep=("head",))
    assert kept.feature_channels < 32
    found, _ = terms({"crosskd": {}}, kept, teacher)
    assert found["crosskd_cls"] > 0 and found["crosskd_reg"] > 0
    torch.stack(list(found.values())).sum().backward()
    # The other way round, too: a pruned teacher and a whole student.
    with pytest.raises(UserError, match=r"head has 32 channels, the teacher's has \d+"):
        build_methods(Methods.model_validate({"crosskd": {}}), detector(head_depth=2), freeze(student))


def test_crosskd_may_cross_where_the_widths_agree(teacher: Detector) -> None:
    """Only the first layers of the towers are kept, and the features cross behind them."""
    keep = ("head.cls_convs.0", "head.reg_convs.0")
    student = pruned(detector(head_depth=2), keep=keep, share=1)
    assert student.head.cls_convs[1].conv.out_channels == 8
    data = batch()
    method = build(CrossKD, student.train(), teacher, split=1, teacher_split=1)
    found = method(look(student, data, teaches=False), look(teacher, data, teaches=True), data)
    assert found["crosskd_cls"] > 0 and found["crosskd_reg"] > 0
    with pytest.raises(UserError, match="head has 8 channels, the teacher's has 32"):
        build(CrossKD, student, teacher, split=2, teacher_split=1)


@pytest.mark.parametrize("keep", [(), ("maps", "head")])
def test_a_pruned_student_has_inherited_what_fits(teacher: Detector, keep: tuple[str, ...]) -> None:
    """`teacher.inherit` copies layers of equal shape; these are those that nothing left."""
    student = pruned(detector(head_depth=2), keep=keep)
    before = outputs(student, pictures())
    copied = inherit(student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(outputs(student, pictures()), before, strict=True))
    assert ("head.gfl_cls.weight" in copied) == bool(keep)
