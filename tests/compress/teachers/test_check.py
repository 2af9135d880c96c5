"""What is said about a teacher before it teaches."""

from __future__ import annotations

from dataclasses import replace

from compress.teachers.base import BoxTeacher, Preprocessing, View
from compress.teachers.check import class_lines, described, preprocessing_lines


class Known(BoxTeacher):
    """A teacher of which everything is said and that finds nothing."""

    file, view = "known.pth", View.ORIGINAL

    def __init__(self, names: tuple[str, ...], preprocessing: Preprocessing | None = None) -> None:
        self.class_names, self.preprocessing = names, preprocessing


def test_images_are_compared_with_what_teachers_are_shown() -> None:
    own = Preprocessing("letterbox to 64 x 64", "BGR", (10.0, 20.0, 30.0), (1.0, 1.0, 1.0))
    seen = Preprocessing("short side 96, long side 160", "RGB", (30.2, 20.0, 10.0), (2.0, 2.0, 2.0))
    sees, warning = preprocessing_lines(Known(("cat",), own), seen)
    assert sees == "teacher known.pth sees images: letterbox to 64 x 64, BGR, mean 10 20 30, deviation 1 1 1"
    assert warning == (
        "warning: that differs in size, order of channels, deviation from what it is shown here (short side 96, "
        "long side 160, RGB, mean 30.2 20 10, deviation 2 2 2): right only if the teacher was trained so"
    )
    assert len(preprocessing_lines(Known(("cat",), seen), seen)) == 1
    assert preprocessing_lines(Known(("cat",)), seen) == []
    resized = Known(("cat",), replace(seen, size="as the student's images"))
    resized.view = View.RESIZED
    assert preprocessing_lines(resized, seen) == [f"teacher known.pth sees images: {described(seen)}"]


def test_classes_by_name() -> None:
    teacher = Known(("kitten", "bus", "dog"))
    assert class_lines(teacher, [1, -1, 0], ["dog", "cat", "bird"]) == [
        "teacher known.pth: 1 classes matched by name: dog",
        "teacher known.pth: classes by the class map: kitten → cat",
        "teacher known.pth: left out: bus",
        "teacher known.pth: it does not look for: bird",
    ]
    assert class_lines(teacher, [0, 1, 2], ["kitten", "bus", "dog"]) == [
        "teacher known.pth: all 3 classes, in the same order"
    ]
