from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compress.data.check import check
from compress.data.convert import _yolo_line, from_voc, from_yolo
from deploy.core.errors import UserError


def picture(path: Path, size: tuple[int, int] = (80, 60), **kwargs: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **kwargs)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def boxes_by_name(path: Path) -> dict[str, list[tuple[str, list[float], int]]]:
    document = json.loads(path.read_text())
    categories = {c["id"]: c["name"] for c in document["categories"]}
    result: dict[str, list[tuple[str, list[float], int]]] = {i["file_name"]: [] for i in document["images"]}
    names = {i["id"]: i["file_name"] for i in document["images"]}
    for a in document["annotations"]:
        result[names[a["image_id"]]].append((categories[a["category_id"]], a["bbox"], a["iscrowd"]))
    return result


def test_yolo(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "images" / "train" / "a.jpg")
    picture(folder / "images" / "train" / "b.png", (100, 50))
    text(folder / "labels" / "train" / "a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.2 0.2\n")
    picture(folder / "beside.png", (10, 10))
    text(folder / "beside.txt", "0 0.5 0.5 1 1\n")
    converted = from_yolo(folder, ["cat", "dog"], tmp_path / "out.json")
    assert (converted.images, converted.annotations) == (3, 3)
    assert boxes_by_name(tmp_path / "out.json") == {
        "images/train/a.jpg": [("dog", [30, 15, 20, 30], 0), ("cat", [0, 0, 16, 12], 0)],
        "images/train/b.png": [],
        "beside.png": [("cat", [0, 0, 10, 10], 0)],
    }
    assert all(p.level == "note" for p in check(tmp_path / "out.json", converted.image_folder))


def test_yolo_uses_the_shown_size_of_turned_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", (80, 60), exif=exif)
    text(tmp_path / "a.txt", "0 0.5 0.5 1 1")
    from_yolo(tmp_path, ["x"], tmp_path / "out.json")
    assert boxes_by_name(tmp_path / "out.json")["a.jpg"] == [("x", [0, 0, 60, 80], 0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "found 4 fields"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2", "polygons"),
        ("cat 0.5 0.5 0.5 0.5", "class must be an integer, found 'cat'"),
        ("2 0.5 0.5 0.5 0.5", "class 2 has no name"),
        ("-1 0.5 0.5 0.5 0.5", "class -1 has no name"),
        ("0 0.5 0.5 0.5 wide", "four numbers"),
        ("0 40 30 20 10", "shares of the image"),
        ("0 0.5 0.5 0 0.5", "shares of the image"),
        ("0 nan 0.5 0.5 0.5", "shares of the image"),
    ],
)
def test_bad_yolo_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    picture(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        from_yolo(tmp_path, ["cat", "dog"], tmp_path / "out.json")
    assert str(caught.value).startswith(f"{tmp_path / 'labels' / 'a.txt'}:2: ")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.json").exists()


def test_other_yolo_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        from_yolo(tmp_path / "none", ["x"], tmp_path / "out.json")
    with pytest.raises(UserError, match="no images in it"):
        from_yolo(tmp_path, ["x"], tmp_path / "out.json")
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="names"):
        from_yolo(tmp_path, [], tmp_path / "out.json")
    text(tmp_path / "labels" / "b.txt", "")
    with pytest.raises(UserError, match=r"b\.txt: there is no image"):
        from_yolo(tmp_path, ["x"], tmp_path / "out.json")
    (tmp_path / "labels" / "b.txt").unlink()
    text(tmp_path / "images" / "bad.jpg", "no")
    with pytest.raises(UserError, match=r"bad\.jpg: cannot be read"):
        from_yolo(tmp_path, ["x"], tmp_path / "out.json")


@settings(max_examples=50)
@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4), st.integers(0, 6))
def test_yolo_lines_read_back(box: list[float], label: int) -> None:
    line = " ".join([str(label), *map(repr, box)])
    assert _yolo_line(line, 7, "here") == (label, tuple(box))


VOC = """<annotation>
  <filename>a.png</filename>
  <object><name>dog</name>
    <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>80</xmax><ymax>30</ymax></bndbox>
  </object>
  <object><name>cat</name><difficult>1</difficult>
    <bndbox><xmin>5</xmin><ymin>6</ymin><xmax>5</xmax><ymax>9</ymax></bndbox>
  </object>
</annotation>
"""


def test_voc(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "a.png")
    picture(tmp_path / "JPEGImages" / "b.jpg", (20, 20))
    text(tmp_path / "Annotations" / "a.xml", VOC)
    # As tools leave it: the name inside is of another machine's file.
    text(tmp_path / "Annotations" / "b.xml", "<annotation><filename>old.jpg</filename></annotation>")
    converted = from_voc(tmp_path, tmp_path / "out.json")
    assert (converted.images, converted.annotations) == (2, 2)
    assert boxes_by_name(tmp_path / "out.json") == {
        "JPEGImages/a.png": [("dog", [0, 10, 80, 20], 0), ("cat", [4, 5, 1, 4], 1)],
        "JPEGImages/b.jpg": [],
    }
    assert all(p.level == "note" for p in check(tmp_path / "out.json", converted.image_folder))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("</object>\n  <object>", "<object>", 8, "not valid XML: mismatched tag"),
        ("<xmin>5</xmin>", "<xmin>five</xmin>", 7, "<xmin> must be a number, found 'five'"),
        ("<xmin>5</xmin>", "<xmin>nan</xmin>", 7, "<xmin> must be a number"),
        ("<xmin>5</xmin>", "", 7, "the box has no <xmin>"),
        ("<xmax>5</xmax>", "<xmax>3</xmax>", 7, "corners swapped"),
        ("<name>cat</name>", "", 6, "no <name>"),
        ("bndbox", "box", 3, "no <bndbox>"),
        ("annotation>", "labels>", 1, "starts with <annotation>"),
        ("a.png", "gone.png", 2, "no image 'gone.png'"),
    ],
)
def test_bad_voc_names_file_and_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    picture(tmp_path / "JPEGImages" / "a.png")
    file = tmp_path / "Annotations" / ("other.xml" if "gone" in new else "a.xml")
    text(file, VOC.replace(old, new))
    with pytest.raises(UserError) as caught:
        from_voc(tmp_path, tmp_path / "out.json")
    assert str(caught.value).startswith(f"{file}:{line}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.json").exists()
