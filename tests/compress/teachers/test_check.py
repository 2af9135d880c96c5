"""What is said about a teacher before it teaches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.manifest import Manifest
from compress.teachers.base import BoxTeacher, Preprocessing, View
from compress.teachers.check import check_teacher, class_lines, described, preprocessing_lines, resized_images
from compress.teachers.results import ResultsTeacher
from deploy.core.errors import UserError


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


def test_a_size_that_the_teacher_was_not_trained_on_is_told() -> None:
    teacher = Known(("cat",), Preprocessing("as the student's images"))
    teacher.view = View.RESIZED
    teacher.resize_short_long = (96, 160)  # type: ignore[attr-defined]  # an attribute that a teacher may have
    assert len(preprocessing_lines(teacher, resized_images(96, 160))) == 1
    assert preprocessing_lines(teacher, resized_images(64, 64))[1] == (
        "warning: teacher known.pth was trained on images of another size (short side 96, long side 160) than it is "
        "shown here (short side 64, long side 64); it finds most at its own"
    )


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


def test_perfect_results_on_crowded_images_pass_where_enough_detections_count(tmp_path: Path) -> None:
    """150 objects an image: of 100 detections none is wrong and a third is missing."""
    names = ["a.png", "b.png"]
    for name in names:
        Image.new("RGB", (160, 110)).save(tmp_path / name)
    boxes = [[10.0 * (n % 15), 10.0 * (n // 15), 8.0, 8.0] for n in range(150)]
    document = {
        "images": [{"id": i, "file_name": name, "width": 160, "height": 110} for i, name in enumerate(names)],
        "categories": [{"id": 3, "name": "c"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": 3, "bbox": box}
            for n, (i, box) in enumerate((i, box) for i in (0, 1) for box in boxes)
        ],
    }
    (tmp_path / "val.json").write_text(json.dumps(document))
    rows = [{**row, "score": 0.9} for row in document["annotations"]]
    (tmp_path / "perfect.json").write_text(json.dumps(rows))
    teacher = ResultsTeacher(tmp_path / "perfect.json", {3: "c"})
    lines: list[str] = []

    def check(max_detections: int) -> float:
        found = check_teacher(
            teacher, [0], CocoDetection(tmp_path / "val.json", tmp_path, eval_transform(64, 96)),
            Manifest(tmp_path / "manifest.json", {}), stage="teacher", identity={}, shown=resized_images(64, 96),
            min_map=80, report=lambda line: lines.append(str(line)), write=True, max_detections=max_detections,
        )  # fmt: skip
        assert found is not None
        return float(found["map"])

    usual = 100 * 67 / 101  # recalls 0 to 0.66
    assert check(200) == pytest.approx(usual)
    assert lines.pop() == "teacher perfect.json: mAP 66.34 (100.00 with 200 detections) on the validation images"
    with pytest.raises(
        UserError, match=r"reaches 66\.34 mAP on .* holds 150 objects of a class, more than count: raise"
    ):
        check(100)
    with pytest.raises(UserError, match=r"reaches 66\.34 \(7\d\.\d\d with 117 detections\) mAP"):
        check(117)
