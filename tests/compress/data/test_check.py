from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.data.check import Problem, check
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform

Save = Callable[[Any], Path]


def problems_of(path: Path, images: Path, **options: Any) -> list[Problem]:
    return list(check(path, images, **options).problems)


def test_sound_data_has_only_the_note_on_ids(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    checked = check(save(document), tmp_path / "images")
    assert [(p.level, p.kind, p.where) for p in checked.problems] == [("note", "id-gap", "categories")]
    assert "3..7 are not contiguous, first gap at 4" in checked.problems[0].message
    assert (checked.image_count, checked.boxes) == (7, {"cat": 14, "dog": 7})


def damage_missing(document: dict[str, Any], images: Path) -> None:
    (images / "0.png").unlink()


def damage_link(document: dict[str, Any], images: Path) -> None:
    (images / "0.png").unlink()
    (images / "0.png").symlink_to("gone.png")


def damage_unreadable(document: dict[str, Any], images: Path) -> None:
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:200])


def damage_size(document: dict[str, Any], images: Path) -> None:
    document["images"][0]["height"] = 480


def damage_image_id(document: dict[str, Any], images: Path) -> None:
    document["images"][0]["id"] = 11


def damage_file_twice(document: dict[str, Any], images: Path) -> None:
    document["images"].append({**document["images"][0], "id": 99})
    document["annotations"].append({**document["annotations"][0], "id": 99, "image_id": 99})


def damage_annotation_id(document: dict[str, Any], images: Path) -> None:
    document["annotations"][1]["id"] = 1


def damage_no_annotation_id(document: dict[str, Any], images: Path) -> None:
    del document["annotations"][0]["id"]


def damage_category(document: dict[str, Any], images: Path) -> None:
    document["annotations"][0]["category_id"] = 5


def damage_image_reference(document: dict[str, Any], images: Path) -> None:
    document["annotations"][0]["image_id"] = 5


def damage_category_twice(document: dict[str, Any], images: Path) -> None:
    document["categories"].append({"id": 7, "name": "cow"})


def damage_category_name(document: dict[str, Any], images: Path) -> None:
    document["categories"].append({"id": 4, "name": "cat"})


def damage_box_twice(document: dict[str, Any], images: Path) -> None:
    document["annotations"].append({**document["annotations"][2], "id": 77})


def damage_all_annotations(document: dict[str, Any], images: Path) -> None:
    document["annotations"] = []


def damage_box(bbox: list[float]) -> Callable[[dict[str, Any], Path], None]:
    def damage(document: dict[str, Any], images: Path) -> None:
        document["annotations"][0]["bbox"] = bbox

    return damage


def damage_area(document: dict[str, Any], images: Path) -> None:
    document["annotations"][0]["area"] = 0


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (damage_missing, "0.png: image 10: the file is missing"),
        (damage_link, "0.png: image 10: a link to gone.png, where nothing is"),
        (damage_unreadable, "0.png: image 10: cannot"),
        (damage_size, "0.png: image 10: the file is 64x48 pixels, annotations.json says 64x480"),
        (damage_image_id, "annotations.json: image 11: the id is used 2 times"),
        (damage_file_twice, "annotations.json: image '0.png': the file is listed 2 times"),
        (damage_annotation_id, "annotations.json: annotation 1: the id is used 2 times"),
        (damage_no_annotation_id, "annotations.json: annotations[0]: id is missing"),
        (damage_category, "annotations.json: annotation 1: category_id 5 is not in categories"),
        (damage_image_reference, "annotations.json: annotation 1: image_id 5 is not in images"),
        (damage_category_twice, "annotations.json: category 7: the id is used 2 times"),
        (damage_category_name, "annotations.json: category 'cat': the name is used 2 times"),
        (damage_box_twice, "annotation 77: is annotation 3 once more: same image, category and box"),
        (damage_all_annotations, "annotations.json: annotations: the list is empty"),
        (
            damage_box([60, 5, 6, 5]),
            "annotation 1: bbox [60, 5, 6, 5] reaches 2 px out of the image of 64x48",
        ),
        (damage_box([64, 5, 6, 5]), "annotation 1: bbox [64, 5, 6, 5] lies outside the image"),
        (damage_box([4, 5, 0, 5]), "annotation 1: bbox [4, 5, 0, 5] is empty"),
        (damage_box([4, 5, 0.5, 5]), "annotation 1: bbox [4, 5, 0.5, 5] is less than one pixel"),
        (damage_box([4, float("inf"), 5, 5]), "not finite"),
        (damage_area, "annotation 1: area is 0"),
    ],
)
def test_each_damage_is_found_alone_and_named(
    damage: Callable[[dict[str, Any], Path], None],
    line: str,
    document: dict[str, Any],
    save: Save,
    tmp_path: Path,
) -> None:
    damage(document, tmp_path / "images")
    problems = problems_of(save(document), tmp_path / "images")
    errors = [p for p in problems if p.level == "error"]
    lines = [str(p) for p in errors]
    assert any(line in text for text in lines), lines
    # A wrong image id moves the image's annotations to another size: only that damage has consequences.
    assert len(errors) == 1 or damage is damage_image_id
    assert not any("\n" in text for text in lines) and all(text.startswith("error: ") for text in lines)


def test_notes(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 12]
    document["categories"].append({"id": 0, "name": "animals"})
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "6.png")
    document["images"][6] |= {"width": None, "height": None}
    problems = [p for p in problems_of(save(document), tmp_path / "images") if p.where != "categories"]
    assert [(p.kind, p.where) for p in problems if p.kind != "bad-box"] == [
        ("empty-category", "category 0"),
        ("empty-image", "image 12"),
        ("no-size", "image 16"),
        ("same-file", "image 16"),
    ]
    assert "'animals' has no box" in str(problems[-4])
    assert "has no width and height; its file is 40x60 pixels" in problems[-2].message
    assert str(problems[-1]).startswith("note: ") and str(problems[-1]).endswith("images/1.png")


@pytest.mark.parametrize(
    ("pixels", "kind", "says"),
    [
        (np.full((48, 64), 0.5, np.float32), "unreadable", "cannot be read as an image"),
        (np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) % 4096, "odd-pixels", "nearly one colour"),
        (np.full((48, 64), 9, np.uint8), "odd-pixels", "nearly one colour, about (9, 9, 9)"),
    ],
)
def test_pixels_that_say_nothing(
    document: dict[str, Any], save: Save, tmp_path: Path, pixels: np.ndarray, kind: str, says: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / "images" / "0.tif")
    document["images"][0]["file_name"] = "0.tif"
    (found,) = (p for p in problems_of(save(document), tmp_path / "images") if p.kind != "id-gap")
    assert (found.kind, found.where) == (kind, "image 10") and says in found.message


def test_crowds_may_be_equal_and_objects_many(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    crowd = {"image_id": 10, "category_id": 3, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 1}
    document["annotations"] += [{**crowd, "id": 100 + number} for number in range(200)]
    assert [p.kind for p in problems_of(save(document), tmp_path / "images")] == ["id-gap"]
    for image, more in ((10, 100), (11, 99)):  # beside one dog and two cats
        dog = {"image_id": image, "category_id": 3, "area": 81}
        document["annotations"] += [
            {**dog, "id": 1000 * image + number, "bbox": [number / 100, 1, 9, 9]} for number in range(more)
        ]
    path = save(document)
    (found,) = (p for p in problems_of(path, tmp_path / "images", max_detections=200) if p.kind == "many-objects")
    assert (found.where, found.message) == ("image 10", "holds 103 objects; mAP counts 100 detections of a class")
    one, two = (p for p in problems_of(path, tmp_path / "images") if p.kind == "many-objects")
    assert (one.where, two.where) == ("image 10", "image 11")
    assert two.message == "holds 102 objects; an exported file gives deploy.max_detections, 100"


def test_files_that_are_near_are_named(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    for name, says in (
        ("images/0.png", f"it is there with --images {tmp_path}"),
        ("up/0.png", "0.png is there, so the"),
    ):
        document["images"][0]["file_name"] = name
        (found,) = (p for p in problems_of(save(document), tmp_path / "images") if p.kind == "no-file")
        assert found.message.startswith("the file is missing; ") and says in found.message


def test_sizes_that_are_missing_come_from_the_files(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    whole = CocoDetection(save(document), tmp_path / "images", eval_transform(99, 99)).sizes
    document["images"][0] |= {"width": None, "height": None}
    del document["images"][1]["width"]
    dataset = CocoDetection(save(document), tmp_path / "images", eval_transform(99, 99))
    assert dataset.sizes == whole and dataset[1][1].original_size == whole[1]


def test_pictures_of_another_set(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "images" / "3.png", other / "copy.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(other / "new.png")
    rows = [{"id": 1, "file_name": "new.png"}, {"id": 2, "file_name": "copy.png"}]
    val = tmp_path / "val.json"
    val.write_text(save({"images": rows, "annotations": [], "categories": []}).read_text())
    (found,) = (p for p in problems_of(save(document), tmp_path / "images", against=(val, other)) if p.level == "error")
    assert (found.kind, found.where) == ("shared", "image 13") and f"is {other / 'copy.png'} of {val}" in found.message


def test_many_findings_of_a_kind_are_counted(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    document["annotations"] += [{**a, "id": a["id"] + 100} for a in document["annotations"]]
    checked = check(save(document), tmp_path / "images")
    lines = checked.lines()
    assert (checked.errors, checked.notes, len(lines)) == (21, 1, 12)
    assert lines[10] == "error: and 11 more: boxes are given twice: same image, category and box"
    made = checked.to_dict()
    assert (made["fit"], made["errors"], made["kinds"]) == (False, 21, {"box-twice": 21, "id-gap": 1})
    assert len(made["problems"]) == 22
    assert made["problems"][0] == {
        "kind": "box-twice",
        "level": "error",
        "file": str(tmp_path / "annotations.json"),
        "where": "annotation 101",
        "message": "is annotation 1 once more: same image, category and box",
    }
