"""Results in a COCO JSON as a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.teachers.load import open_teacher
from compress.teachers.results import ResultsTeacher
from deploy.core.errors import UserError
from tests.helpers.teacher_files import CPU, noise, sample

NAMES = {7: "cat", 3: "dog"}
ROWS: list[dict[str, Any]] = [
    {"image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 20], "score": 0.25},
    {"image_id": 2, "category_id": 3, "bbox": [5, 5, 5, 5], "score": 0.75},
    {"image_id": 1, "category_id": 3, "bbox": [30, 30, 90, 90], "score": 0.5},
]
DOCUMENT: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "sub/a.png"}, {"id": 2, "file_name": "b.png"}, {"id": 4, "file_name": "c.png"}],
    "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
    "annotations": ROWS,
}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_list_is_looked_up_by_id(tmp_path: Path) -> None:
    teacher = ResultsTeacher(written(tmp_path / "r.json", ROWS), NAMES)
    assert teacher.class_names == ("dog", "cat")
    first, second, third = teacher.detect(
        [sample(noise(60, 50), 1, "x.png"), sample(noise(60, 50), 2), sample(noise(60, 50), 9)], score_threshold=0.2
    )
    assert first.boxes.tolist() == [[30, 30, 50, 60], [1, 2, 11, 22]]  # best first, cut at the image
    assert (first.scores.tolist(), first.labels.tolist()) == ([0.5, 0.25], [0, 1])
    assert second.labels.tolist() == [0] and len(third.boxes) == 0
    (strict,) = teacher.detect([sample(noise(60, 50), 1)], score_threshold=0.4)
    assert strict.scores.tolist() == [0.5]


def test_what_a_list_covers(tmp_path: Path) -> None:
    teacher = ResultsTeacher(written(tmp_path / "r.json", ROWS), NAMES)
    assert teacher.covers([1, 2], ["a", "b"], tmp_path) is None
    told = teacher.covers([1, 2, 3, 4], ["a", "b", "c", "d"], tmp_path)
    assert told is not None and "no result for 2 of 4 images" in told
    with pytest.raises(UserError, match="has no result for any of the 2 images"):
        teacher.covers([8, 9], ["a", "b"], tmp_path)
    with pytest.raises(UserError, match="knows images by id, and those of a folder have none"):
        teacher.covers(None, ["a"], tmp_path)


def test_an_id_or_a_name_of_two_images_is_refused(tmp_path: Path) -> None:
    """Lists that number from 1 each, as training and validation sets do, and folders with equal names."""
    rows = ResultsTeacher(written(tmp_path / "r.json", ROWS), NAMES)
    rows.covers([1, 2], ["a.png", "b.png"], tmp_path / "val")
    rows.covers([2, 3], ["val/b.png", "c.png"], tmp_path)  # 2 is the same image, named from another folder
    wanted = (
        r"r.json: image_id 1 stands for two images, .*val/a.png and .*train/a.png; give a COCO document \(images, ca"
    )
    with pytest.raises(UserError, match=wanted):
        rows.covers([1], ["a.png"], tmp_path / "train")
    document = ResultsTeacher(written(tmp_path / "d.json", DOCUMENT))
    document.covers([1, 2], ["b.png", "c.png"], tmp_path / "one")
    document.covers(None, ["b.png"], tmp_path / "two" / ".." / "one")
    with pytest.raises(
        UserError, match=r"d.json: the name c.png stands for two images, .*one/c.png and .*two/c.png; put"
    ):
        document.covers(None, ["c.png"], tmp_path / "two")


def test_images_of_a_document_have_its_sizes(tmp_path: Path) -> None:
    images = [DOCUMENT["images"][0] | {"width": 50, "height": 60}, *DOCUMENT["images"][1:]]
    teacher = ResultsTeacher(written(tmp_path / "d.json", DOCUMENT | {"images": images}))
    right, unstated = sample(noise(60, 50), 1, "sub/a.png"), sample(noise(7, 9), 2, "b.png")
    assert len(teacher.detect([right, unstated], score_threshold=0.05)) == 2
    with pytest.raises(UserError, match=r"d.json: images: sub/a.png is 50x60 pixels there and 60x50 here, so it"):
        teacher.detect([sample(noise(50, 60), 1, "sub/a.png")], score_threshold=0.05)
    with pytest.raises(UserError, match=r"images\[0\]: width must be an integer, found wide"):
        ResultsTeacher(written(tmp_path / "d.json", DOCUMENT | {"images": [images[0] | {"width": "wide"}]}))


def test_a_document_is_looked_up_by_name(tmp_path: Path) -> None:
    teacher = open_teacher(str(written(tmp_path / "d.json", DOCUMENT)), CPU)
    assert teacher.class_names == ("dog", "cat") and teacher.settings == {}
    found, nothing = teacher.detect(
        [sample(noise(60, 50), 77, "sub/a.png"), sample(noise(60, 50), 1, "c.png")], score_threshold=0.05
    )
    assert found.labels.tolist() == [0, 1] and len(nothing.boxes) == 0
    assert teacher.covers(None, ["sub/a.png", "c.png"], tmp_path) is None
    with pytest.raises(UserError, match=r"1 of 2 images are not there, the first is a.png"):
        teacher.covers([1, 2], ["a.png", "b.png"], tmp_path)


def broken(key: str, value: Any) -> list[dict[str, Any]]:
    return [ROWS[0], ROWS[1] | {key: value}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken("score", 1.5), r"r.json: \[1\]: score must lie in 0..1, found 1.5"),
        (broken("score", "high"), r"r.json: \[1\]: score must be a number, found high"),
        (broken("bbox", [1, 2, 3]), r"r.json: \[1\]: bbox must be four numbers"),
        (broken("category_id", 5), r"r.json: \[1\]: category_id 5 has no name; known ids are 3, 7"),
        (broken("image_id", "1"), r"r.json: \[1\]: image_id must be an integer"),
        ([{key: value for key, value in ROWS[0].items() if key != "score"}], "score is missing; labels without scores"),
        ([1], r"r.json: \[0\]: must be an object"),
        ("text", "neither a list of COCO results nor a COCO document"),
        (DOCUMENT | {"images": DOCUMENT["images"][1:]}, "image_id 1 is not among the images"),
        (DOCUMENT | {"images": None}, "images: must be a list"),
        (DOCUMENT | {"images": [*DOCUMENT["images"], {"id": 9, "file_name": "b.png"}]}, "two have the same id or file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ResultsTeacher(written(tmp_path / "r.json", content), NAMES)
    assert "\n" not in str(caught.value)


def test_a_list_needs_names_and_a_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows its categories by id alone; give the COCO file with their names"):
        open_teacher(str(written(tmp_path / "r.json", ROWS)), CPU)
    with pytest.raises(UserError, match=r"none.json: cannot be read: No such file"):
        open_teacher(str(tmp_path / "none.json"), CPU)
    (tmp_path / "cut.json").write_text("[{\n")
    with pytest.raises(UserError, match=r"cut.json:2: not valid JSON"):
        open_teacher(str(tmp_path / "cut.json"), CPU)


def test_names_belong_to_the_identity(tmp_path: Path) -> None:
    """The file is the same, but its id 3 means something else: labels of one are not continued with the other."""
    path = written(tmp_path / "r.json", ROWS)
    assert ResultsTeacher(path, NAMES).settings != ResultsTeacher(path, NAMES | {3: "fox"}).settings
