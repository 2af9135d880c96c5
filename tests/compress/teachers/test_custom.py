"""Teachers of a user's own, by import path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.config.teacher import SOURCES, Custom, Source
from compress.data.batch import ImageSize
from compress.detectors.base import Capability
from compress.teachers.base import DetectorTeacher, Sample, View
from compress.teachers.load import TEACHERS, open_teacher
from deploy.core.errors import UserError
from tests.helpers.own_parts import Points

CPU = torch.device("cpu")
PARTS = "tests.helpers.own_parts"


def source(name: str, options: dict[str, Any] | None = None) -> Source:
    return Source(custom=Custom(factory=f"{PARTS}:{name}", options=options))


def test_every_source_has_its_row() -> None:
    assert tuple(TEACHERS) == SOURCES


def test_a_teacher_of_boxes() -> None:
    teacher = open_teacher(source("Fixed", {"name": "cat", "score": 0.75}), CPU)
    assert teacher.file == f"{PARTS}:Fixed" and teacher.class_names == ("cat",)
    assert teacher.capabilities == {Capability.BOXES} and teacher.detector is None and teacher.view is View.ORIGINAL
    assert teacher.covers([1], ["a.png"], None) is None  # type: ignore[arg-type]
    sample = Sample(None, 1, ImageSize((32, 32), (64, 16)), "a.png", torch.zeros(3, 64, 16, dtype=torch.uint8))
    (found,) = teacher.detect([sample], score_threshold=0.5)
    assert found.boxes.tolist() == [[2, 3, 16, 30]] and found.scores.tolist() == [0.75]
    assert not len(teacher.detect([sample], score_threshold=0.8)[0].scores)


def test_a_detector_becomes_a_teacher_of_everything_that_it_gives() -> None:
    teacher = open_teacher(source("points_teacher", {"width": 16}), CPU, categories={3: "cat", 9: "dog"})
    assert isinstance(teacher, DetectorTeacher) and isinstance(teacher.detector, Points)
    assert teacher.class_names == ("cat", "dog") and teacher.settings == {"width": 16}
    assert Capability.FEATURES in teacher.capabilities and len(teacher.sha256) == 64
    assert not teacher.detector.training and not any(p.requires_grad for p in teacher.detector.parameters())
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (found,) = teacher.detect([Sample(image, 1, ImageSize((60, 90), (120, 180)), "a.png")], score_threshold=0.3)
    assert len(found.scores) and float(found.boxes[:, 2].max()) <= 180


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Absent", None, f"teacher.custom.factory: {PARTS} has no Absent"),
        ("Fixed", {"name": "cat"}, f"teacher.custom.factory: {PARTS}:Fixed cannot be built: TypeError"),
        (
            "nothing",
            None,
            "gives dict, which is neither a Detector nor a BoxTeacher: it has no sha256, settings, class_names",
        ),
    ],
)
def test_factories_that_make_no_teacher(name: str, options: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        open_teacher(source(name, options), CPU)
    assert message in str(error.value) and "\n" not in str(error.value)
