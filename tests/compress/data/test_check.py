from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.data.check import check

Save = Callable[[Any], Path]


def test_sound_data_has_only_the_note_on_ids(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    problems = check(save(document), tmp_path / "images")
    assert [(p.level, p.where) for p in problems] == [("note", "categories")]
    assert "3..7 are not contiguous, first gap at 4" in problems[0].message


def damage_missing(document: dict[str, Any], images: Path) -> None:
    (images / "0.png").unlink()


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
        (damage_unreadable, "0.png: image 10: cannot be read"),
        (damage_size, "0.png: image 10: the file is 64x48 pixels, annotations.json says 64x480"),
        (damage_image_id, "annotations.json: image 11: the id is used 2 times"),
        (damage_file_twice, "annotations.json: image '0.png': the file is listed 2 times"),
        (damage_annotation_id, "annotations.json: annotation 1: the id is used 2 times"),
        (damage_no_annotation_id, "annotations.json: annotations[0]: id is missing"),
        (damage_category, "annotations.json: annotation 1: category_id 5 is not in categories"),
        (damage_image_reference, "annotations.json: annotation 1: image_id 5 is not in images"),
        (damage_category_twice, "annotations.json: category 7: the id is used 2 times"),
        (damage_category_name, "annotations.json: category 'cat': the name is used 2 times"),
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
    problems = check(save(document), tmp_path / "images")
    errors = [p for p in problems if p.level == "error"]
    lines = [str(p) for p in errors]
    assert any(line in text for text in lines), lines
    # A wrong image id moves the image's annotations to another size: only that damage has consequences.
    assert len(errors) == 1 or damage is damage_image_id
    assert not any("\n" in text for text in lines)


def test_images_without_annotations_are_a_note(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 12]
    problems = check(save(document), tmp_path / "images")
    assert [p.where for p in problems if "no annotations" in p.message] == ["image 12"]
    assert all(p.level == "note" for p in problems)
