from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compress.data.check import check
from compress.data.convert.coco_file import Converted, Source, documents, write_documents
from compress.data.convert.voc import read_voc
from compress.data.convert.yolo import parse_line, read_yolo
from deploy.core.errors import UserError
from tests.helpers.label_files import boxes_by_name, picture, text


def write(source: Source, out: Path, split: str | None = None, **options: Any) -> list[Converted]:
    return write_documents(documents(source, out, split), **options)


def from_yolo(folder: Path, names: str | None, out: Path) -> Converted:
    return write(read_yolo(folder, names), out)[0]


def from_voc(folder: Path, out: Path, first_pixel: int | None = None) -> Converted:
    return write(read_voc(folder, first_pixel), out)[0]


def test_yolo(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "images" / "train" / "a.jpg")
    picture(folder / "images" / "train" / "b.png", (100, 50))
    text(folder / "labels" / "train" / "a.txt", "1 0.5 0.5 0.25 0.5\n\n0.0 0.1 0.1 0.2 0.2\n")
    picture(folder / "beside.png", (10, 10))
    text(folder / "beside.txt", "0 0.5 0.5 1.0000001 1\n")
    converted = from_yolo(folder, "cat,dog", tmp_path / "out.json")
    assert (converted.images, converted.annotations) == (3, 3)
    assert boxes_by_name(tmp_path / "out.json") == {
        "images/train/a.jpg": [("dog", [30, 15, 20, 30], 0), ("cat", [0, 0, 16, 12], 0)],
        "images/train/b.png": [],
        "beside.png": [("cat", [0, 0, 10, 10], 0)],
    }
    assert not check(tmp_path / "out.json", converted.image_folder).errors
    assert "1 of 3 images have no label file" in read_yolo(folder, "cat,dog").notes[0]


def test_yolo_uses_the_shown_size_of_turned_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", (80, 60), exif=exif)
    text(tmp_path / "a.txt", "0 0.5 0.5 1 1")
    from_yolo(tmp_path, "x", tmp_path / "out.json")
    assert boxes_by_name(tmp_path / "out.json")["a.jpg"] == [("x", [0, 0, 60, 80], 0)]


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """Two training images and one validation image of Ultralytics' layout; the first has a box of its class."""
    folder = tmp_path / "set"
    for name, shares in (("train/a", "0 0.5 0.5 0.5 0.5"), ("train/b", "1 0.5 0.5 1 1"), ("val/c", "1 0.25 0.5 0.5 1")):
        picture(folder / "images" / f"{name}.png", (64, 64))
        text(folder / "labels" / f"{name}.txt", shares)
    text(folder / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")
    return folder


A, B, C = [("cat", [16, 16, 32, 32], 0)], [("dog", [0, 0, 64, 64], 0)], [("dog", [0, 0, 32, 64], 0)]


@pytest.mark.parametrize("place", ["images/train", "link", "images/train/../train", "."])
def test_a_part_of_the_images_finds_its_labels(divided: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (divided / "link").symlink_to(divided / "images" / "train")
    monkeypatch.chdir(divided / "images/train" if place == "." else divided)
    from_yolo(Path(place), None if place != "link" else "cat,dog", divided / "out.json")
    assert boxes_by_name(divided / "out.json") == {"a.png": A, "b.png": B}


DIVIDED = {
    "folders": {"train": "images/train", "val": "images/val"},
    "lists of folders": {"train": ["images/train"], "val": ["./images/val"]},
    "text files": {"train": "train.txt", "val": "val.txt"},
    "as Roboflow": {"train": "../images/train", "val": "../images/val", "test": "../images/test"},
    "from elsewhere": {"path": "/home/ann/set", "train": "images/train", "val": "images/val"},
    "names as a map": {"train": "images/train", "val": "images/val", "names": {0: "cat", 1: "dog"}},
}


@pytest.mark.parametrize("kind", DIVIDED)
def test_data_yaml_divides(divided: Path, kind: str, tmp_path: Path) -> None:
    text(divided / "data.yaml", json.dumps({"nc": 2, "names": ["cat", "dog"], **DIVIDED[kind]}))
    text(divided / "train.txt", "./images/train/a.png\ndata/images/train/b.png\n")
    text(divided / "val.txt", str(divided / "images/val/c.png"))
    source = read_yolo(divided)
    train, val = write(source, tmp_path / "made")
    assert (train.out, val.out) == (tmp_path / "made" / "train.json", tmp_path / "made" / "val.json")
    assert boxes_by_name(train.out) == {"images/train/a.png": A, "images/train/b.png": B}
    assert boxes_by_name(val.out) == {"images/val/c.png": C}
    for made in (train, val):
        assert not check(made.out, made.image_folder).errors
    if kind == "from elsewhere":
        assert "/home/ann/set is not there" in source.notes[1]
    (only,) = write(source, tmp_path / "one.json", "val")
    assert boxes_by_name(only.out) == {"images/val/c.png": C}
    (both,) = write(source, tmp_path / "all.json")
    assert both.images == 3


def test_folders_divide_without_a_data_yaml(divided: Path, tmp_path: Path) -> None:
    (divided / "data.yaml").unlink()
    made = write(read_yolo(divided, "cat,dog"), tmp_path / "made")
    assert [(m.out.name, m.images) for m in made] == [("train.json", 2), ("val.json", 1)]
    turned = tmp_path / "turned"  # train/images, train/labels, valid/images, ...
    turned.mkdir()
    for here, there in (("train", "train"), ("val", "valid")):
        (turned / there).mkdir()
        for kind in ("images", "labels"):
            (divided / kind / here).rename(turned / there / kind)
    made = write(read_yolo(turned, "cat,dog"), tmp_path / "again")
    assert [(m.out.name, m.images, m.annotations) for m in made] == [("train.json", 2, 2), ("val.json", 1, 1)]


def test_what_is_wrong_with_a_data_yaml(divided: Path, tmp_path: Path) -> None:
    def yaml(content: str) -> None:
        text(divided / "data.yaml", content)

    for content, message in (
        ("names: [cat, dog]\nnc: 3", r"nc is 3, and there are 2 names"),
        ("names: [cat, cat]", "'cat' is given twice"),
        ("names: [cat, dog]\ntrain: gone\nval: images/val", "data.yaml: train: gone is not there"),
        ("names: [cat, dog]\ntrain: {a: b}", "train: must be a folder, a text file, or a list"),
        ("names: [cat, dog]\ntrain: list.txt", r"list.txt:2: there is no image 'x.png'; 1 of the 2 listed"),
    ):
        yaml(content)
        text(divided / "list.txt", "images/train/a.png\nx.png")
        with pytest.raises(UserError, match=message):
            read_yolo(divided)
    yaml("names: [cat, dog]\ntrain: images/train\nval: images/train")
    assert "2 images are in train and in val" in read_yolo(divided).notes
    with pytest.raises(UserError, match=r"--split: .* has no set 'test'; it has train \(2 images\), val \(2 images\)"):
        write(read_yolo(divided), tmp_path / "x.json", "test")
    with pytest.raises(UserError, match="is not divided into train and val"):
        write(read_yolo(divided / "images/train", "cat,dog"), tmp_path / "made")


@pytest.mark.parametrize("linked", ["images/val and labels/val", "images", "a circle"])
def test_linked_folders_are_read_once(divided: Path, tmp_path: Path, linked: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if linked == "a circle":
        (divided / "images" / "train" / "up").symlink_to(divided)
    for name in {"images": ["images"], "a circle": []}.get(linked, ["images/val", "labels/val"]):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (divided / name).rename(elsewhere / name)
        (divided / name).symlink_to(elsewhere / name)
    made = from_yolo(divided, "cat,dog", tmp_path / "out.json")
    assert boxes_by_name(made.out) == {"images/train/a.png": A, "images/train/b.png": B, "images/val/c.png": C}


def test_a_link_to_nothing_is_named(divided: Path, tmp_path: Path) -> None:
    (divided / "labels" / "val" / "c.txt").rename(tmp_path / "c.txt")
    (divided / "labels" / "val" / "c.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"labels/val/c\.txt: a link to gone.txt, where nothing is"):
        read_yolo(divided)
    (divided / "images" / "more").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"images/more: a link to .*gone, where nothing is"):
        read_yolo(divided, "cat,dog")


def test_no_box_at_all_is_a_mistake(divided: Path, tmp_path: Path) -> None:
    (divided / "labels").rename(divided / "marks")
    with pytest.raises(UserError, match=r"out\.json: 3 images, and not one box in all of them"):
        from_yolo(divided, "cat,dog", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    (made,) = write(read_yolo(divided, "cat,dog"), tmp_path / "out.json", allow_empty=True)
    assert (made.images, made.annotations) == (3, 0)


@pytest.mark.parametrize("name", ["classes.txt", "obj.names", "predefined_classes.txt"])
@pytest.mark.parametrize("given", [True, False])
def test_names_a_line(divided: Path, tmp_path: Path, name: str, given: bool) -> None:
    (divided / "data.yaml").unlink()
    (divided / name).write_bytes("\ufeffcat\r\ndog, or wolf\r\n\r\n".encode())
    source = read_yolo(divided, str(divided / name) if given else None)
    assert source.names == ["cat", "dog, or wolf"]
    assert given or source.notes[0] == f"names: of {divided / name}"


@pytest.mark.parametrize("names", ["none/classes.txt", "classes.txt", "obj.names", "data/names", "x.yaml", "a.txt,b"])
def test_names_that_look_like_a_file_are_not_names(divided: Path, names: str) -> None:
    if "," in names:
        assert read_yolo(divided, names).names == ["a.txt", "b"]
        return
    with pytest.raises(UserError, match=f"--names: {names}: No such file"):
        read_yolo(divided, names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "found 4 fields"),
        ("0 0.5 0.5 0.5 0.5 0.9", "found 6 fields; a sixth"),
        ("0 0.5 0.5 0.5 0.5 0.1 0.2 2 0.3 0.4", "found 10 fields; turned boxes with an angle and key points"),
        ("0 0.1 0.1 0.2 0.1 1.2 0.2", "shares of the image"),
        ("0 0.1 0.1 0.2 0.1 0.3 0.1", "shares of the image"),
        ("0 0.1 0.1 0.2 0.1 wide 0.2", "the polygon must be numbers"),
        ("cat 0.5 0.5 0.5 0.5", "class must be an integer, found 'cat'"),
        ("0.5 0.5 0.5 0.5 0.5", "class must be an integer, found '0.5'"),
        ("inf 0.5 0.5 0.5 0.5", "class must be an integer, found 'inf'"),
        ("2 0.5 0.5 0.5 0.5", "class 2 has no name"),
        ("-1 0.5 0.5 0.5 0.5", "class -1 has no name"),
        ("0 0.5 0.5 0.5 wide", "four numbers"),
        ("0 40 30 20 10", "shares of the image"),
        ("0 0.5 0.5 1.01 0.5", "shares of the image"),
        ("0 0.5 0.5 0 0.5", "shares of the image"),
        ("0 nan 0.5 0.5 0.5", "shares of the image"),
    ],
)
def test_bad_yolo_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    picture(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        from_yolo(tmp_path, "cat,dog", tmp_path / "out.json")
    assert str(caught.value).startswith(f"{tmp_path / 'labels' / 'a.txt'}:2: ")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.json").exists()


def test_the_box_around_a_polygon_is_taken(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n1 0.25 0.5 0.75 0.25 0.5 1 0.3 0.6\n")
    read = read_yolo(tmp_path, "cat,dog")
    (found,) = (one for pictures in read.splits.values() for one in pictures)
    x, y, w, h = found.boxes[1].box
    assert (x / found.width, y / found.height, w / found.width, h / found.height) == (0.25, 0.25, 0.5, 0.75)
    where = tmp_path / "labels" / "a.txt"
    assert f"1 labels are polygons, of which the box around them is taken; the first is {where}:2" in read.notes
    text(tmp_path / "data.yaml", "names: [cat, dog]\nkpt_shape: [17, 3]\n")
    with pytest.raises(UserError, match="kpt_shape: its labels are key points, which are not read"):
        read_yolo(tmp_path)


def test_other_yolo_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_yolo(tmp_path / "none", "x")
    text(tmp_path / "set.zip", "")
    with pytest.raises(UserError, match=r"set\.zip: is a file; give the folder of the images"):
        read_yolo(tmp_path / "set.zip", "x")
    with pytest.raises(UserError, match="no images in it"):
        read_yolo(tmp_path, "x")
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="--names: yolo files only have class numbers"):
        read_yolo(tmp_path)
    text(tmp_path / "labels" / "b.txt", "")
    with pytest.raises(UserError, match="labels: no images in it"):
        read_yolo(tmp_path / "labels")
    with pytest.raises(UserError, match=r"b\.txt: there is no image"):
        read_yolo(tmp_path, "x")
    (tmp_path / "labels" / "b.txt").rename(tmp_path / "labels" / "a.txt")
    text(tmp_path / "images" / "a.txt", "0 0.5 0.5 0.1 0.1")
    with pytest.raises(UserError, match=r"a\.png: has two label files that differ"):
        read_yolo(tmp_path, "x")
    text(tmp_path / "images" / "bad.jpg", "no")
    (tmp_path / "images" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"bad\.jpg: cannot"):
        read_yolo(tmp_path, "x")


@settings(max_examples=50)
@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4), st.integers(0, 6))
def test_yolo_lines_read_back(box: list[float], label: int) -> None:
    line = " ".join([str(label), *map(repr, box)])
    assert parse_line(line, 7, "here") == (label, tuple(box))


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


@pytest.mark.parametrize(
    ("labels", "images"), [("Annotations", "JPEGImages"), ("annotations", "images"), ("labels", "data"), (".", ".")]
)
def test_voc(tmp_path: Path, labels: str, images: str) -> None:
    folder = tmp_path / "set"
    picture(folder / images / "a.png")
    picture(folder / images / "b.jpg", (20, 20))
    text(folder / labels / "a.xml", VOC)
    # As tools leave it: the name inside is of another machine's file.
    text(folder / labels / "b.xml", "<annotation><filename>old.jpg</filename></annotation>")
    expected = {"a.png": [("dog", [0, 10, 80, 20], 0), ("cat", [4, 5, 1, 4], 1)], "b.jpg": []}
    for source in (folder, folder / labels):  # the folder of the XML files finds the images as well
        converted = from_voc(source, tmp_path / "out.json")
        assert (converted.images, converted.annotations) == (2, 2)
        found = boxes_by_name(tmp_path / "out.json")
        assert found == {(Path(images) / name).as_posix(): boxes for name, boxes in expected.items()}
        assert not check(tmp_path / "out.json", converted.image_folder).errors


def box(*corners: float) -> str:
    tags = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>cat</name><bndbox>{tags}</bndbox></object>"


@pytest.mark.parametrize(
    ("corners", "first_pixel", "found", "says"),
    [
        ((0, 0, 80, 60), None, [8, 6, 16, 15], "count from 0: 1 of 2 boxes have an xmin or ymin below 1"),
        ((0.5, 3, 80, 60), None, [8, 6, 16, 15], "count from 0"),
        ((1, 1, 80, 60), None, [7, 5, 17, 16], "count from 1, as VOC's do"),  # the width as xmax fits both
        ((-1, 1, 80, 60), None, [7, 5, 17, 16], "count from 1"),  # outside of the image, in either
        ((1, 1, 80, 60), 0, [8, 6, 16, 15], ""),
        ((0, 1, 80, 60), 1, [7, 5, 17, 16], "as --first-pixel says, although 1 of 2 boxes"),
    ],
)
def test_from_where_voc_counts(
    tmp_path: Path, corners: tuple[float, ...], first_pixel: int | None, found: list[float], says: str
) -> None:
    picture(tmp_path / "a.png")
    text(tmp_path / "a.xml", f"<annotation><filename>a.png</filename>{box(*corners)}{box(8, 6, 24, 21)}</annotation>")
    source = read_voc(tmp_path, first_pixel)
    assert says in " ".join(source.notes) and bool(says) == bool(source.notes)
    write(source, tmp_path / "out.json")
    assert boxes_by_name(tmp_path / "out.json")["a.png"][1] == ("cat", found, 0)


def test_a_border_that_is_never_reached_and_one_that_is(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    head = "<annotation><filename>a.png</filename>"
    text(tmp_path / "a.xml", f"{head}<owner><name>Label Studio</name></owner>{box(8, 6, 24, 21)}</annotation>")
    write(source := read_voc(tmp_path), tmp_path / "out.json")
    assert boxes_by_name(tmp_path / "out.json")["a.png"] == [("cat", [8, 6, 16, 15], 0)]
    assert "a.xml is of Label Studio" in source.notes[0]
    text(tmp_path / "a.xml", f"{head}{box(0, 6, 24, 21)}{box(1, 1, 24, 21)}{box(1, 9, 24, 21)}</annotation>")
    assert "from 0: 1 of 3 boxes" in (note := read_voc(tmp_path).notes[0]) and "although 2 begin at 1" in note


def test_two_files_that_name_one_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        text(tmp_path / f"{name}.xml", f"<annotation><filename>a.png</filename>{box(1, 1, 9, ord(name))}</annotation>")
    from_voc(tmp_path, tmp_path / "out.json")
    found = boxes_by_name(tmp_path / "out.json")
    assert {name: boxes[0][1][3] for name, boxes in found.items()} == {"a.png": 97, "b.png": 98}
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.xml: .*a\.xml names the same image"):
        read_voc(tmp_path)


def test_voc_lists_divide(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        if name != "c":
            text(tmp_path / "Annotations" / f"{name}.xml", f"<annotation>{box(1, 1, 9, ord(name))}</annotation>")
    picture(tmp_path / "SegmentationClass" / "a.png")
    lists = tmp_path / "ImageSets" / "Main"
    text(lists / "train.txt", "a\n")
    text(lists / "val.txt", "b\nc\n")
    text(lists / "trainval.txt", "a\nb\nc\n")
    text(lists / "cat_train.txt", "a  1\nb -1\n")
    source = read_voc(tmp_path)
    assert {name: [row.path.stem for row in rows] for name, rows in source.splits.items()} == {
        "train": ["a"],
        "val": ["b", "c"],
        "rest": ["d"],
    }
    text(lists / "val.txt", "b\ngone\n")
    with pytest.raises(UserError, match=r"val\.txt: there is no image of the name 'gone'"):
        read_voc(tmp_path)


def test_voc_of_another_size_is_noticed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    size = "<size><width>160</width><height>120</height><depth>3</depth></size>"
    text(tmp_path / "a.xml", f"<annotation>{size}{box(1, 1, 9, 9)}</annotation>")
    assert "1 files say another size than their image has" in read_voc(tmp_path).notes[1]


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
