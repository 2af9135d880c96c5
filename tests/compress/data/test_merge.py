"""Several COCO files become one."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data.check import check
from compress.data.merge import Labelled, merge, merged
from deploy.core.errors import UserError

NAMES = ["cat", "dog", "cow"]


@st.composite
def labelled(draw: st.DrawFn, number: int, folder: str) -> Labelled:
    """A set with ids that may clash with those of others; its pictures do not."""
    ids = st.integers(0, 6)
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    categories = [
        {"id": key, "name": name}
        for key, name in zip(
            draw(st.lists(ids, min_size=len(names), max_size=len(names), unique=True)), names, strict=True
        )
    ]
    licenses = [
        {"id": key, "name": draw(st.sampled_from("XY"))} for key in draw(st.lists(ids, max_size=2, unique=True))
    ]
    images = [
        {
            "id": key,
            "file_name": f"{draw(st.sampled_from(['', 'below/', './']))}{number}-{key}.png",
            "width": 9,
            "height": 9,
        }
        | ({"license": draw(ids)} if draw(st.booleans()) else {})
        for key in draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    ]
    annotations = [
        {"image_id": draw(st.sampled_from(images))["id"], "category_id": draw(st.sampled_from(categories))["id"]}
        | {"bbox": [1, 2, 3, draw(st.integers(1, 5))]}
        | draw(
            st.sampled_from(
                [{}, {"id": 1}, {"id": None}, {"id": "a"}, {"id": 7, "score": 0.5}, {"iscrowd": 1, "ignore": 1}]
            )
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    content = {"images": images, "annotations": annotations, "categories": categories, "licenses": licenses}
    return Labelled(Path(f"{number}.json"), Path(folder), content)


def facts(document: dict[str, Any], folder: Path) -> Counter[str]:
    """What a set says, without ids: each picture with its license, and each annotation with its picture and class."""
    names = {row["id"]: row["name"] for row in document["categories"]}
    licenses = {row["id"]: row["name"] for row in document.get("licenses", [])}
    pictures, said = {}, []
    for row in document["images"]:
        pictures[row["id"]] = os.path.abspath(folder / row["file_name"])
        license_ = licenses.get(row.get("license"))
        said.append([pictures[row["id"]], row["width"], row["height"], *([license_] if license_ else [])])
    for row in document["annotations"]:
        others = {key: value for key, value in row.items() if key not in ("id", "image_id", "category_id")}
        said.append([pictures[row["image_id"]], names[row["category_id"]], others])
    return Counter(json.dumps(fact, sort_keys=True) for fact in said)


@given(data=st.data(), folders=st.sampled_from([("a", "a"), ("a", "b"), ("a", "a/b", "/tmp/c")]))
def test_nothing_is_lost_and_ids_are_one_each(data: st.DataObject, folders: tuple[str, ...]) -> None:
    sets = [data.draw(labelled(number, folder)) for number, folder in enumerate(folders)]
    document, folder = merged(sets)
    for section in ("images", "annotations", "categories", "licenses"):
        ids = [row["id"] for row in document.get(section, [])]
        assert len(set(ids)) == len(ids)
    names = [row["name"] for row in document["categories"]]
    assert len(set(names)) == len(names)
    expected = sum((facts(dict(one.content), one.folder) for one in sets), Counter())
    assert facts(document, folder) == expected
    first, again = sets[0].content, document
    assert again["categories"][: len(first["categories"])] == first["categories"], "the first file keeps its ids"
    assert [row["id"] for row in again["images"]][: len(first["images"])] == [row["id"] for row in first["images"]]


def write(file: Path, names: dict[int, str], pictures: list[str], **more: Any) -> Path:
    """A box of the first category in each picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    key = next(iter(names))
    document = {
        "images": [{"id": n, "file_name": name, "width": 9, "height": 9} for n, name in enumerate(pictures)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": key, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
            for n in range(len(pictures))
        ],
        "categories": [{"id": n, "name": name} for n, name in names.items()],
    }
    file.write_text(json.dumps(document | more))
    return file


def test_each_file_has_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    a = write(Path("data/a.json"), {1: "cat", 2: "dog"}, ["x.png", "y.png"])
    b = write(Path("data/b.json"), {1: "dog", 5: "cat"}, ["x.png"], info={"coverage": [1, 5], "pseudo_labels": {}})
    for place, color in (("data/old/x.png", 9), ("data/old/y.png", 90), ("data/new/more/x.png", 200)):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((9, 9)).point(lambda value, by=color: (value + by) % 256).save(place)
    made = merge([a, b], Path("all.json"), [Path("data/old"), Path("data/new/more")])
    assert (made.folder, made.images, made.boxes, made.notes) == (Path("data"), 3, 3, [])
    document = json.loads(Path("all.json").read_text())
    assert [row["file_name"] for row in document["images"]] == ["old/x.png", "old/y.png", "new/more/x.png"]
    assert document["annotations"][2]["category_id"] == 2, "dog, as in the first file"
    assert "coverage" not in document["info"] and document["info"]["merged"][1]["info"]["coverage"] == [1, 5]
    assert not check(Path("all.json"), made.folder).errors


def test_what_may_be_a_mistake_is_a_note(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", {1: "cat"}, ["x.png"]), write(tmp_path / "b.json", {1: "dog"}, ["y.png"])
    lines = merge([a, b], tmp_path / "all.json").notes
    assert len(lines) == 4 and f"{a}: has no category dog; its pictures count as without any" in lines
    assert f"{b}: 1 of 1 pictures are not in {tmp_path}, y.png is the first; --images names the folder" in lines


def test_classes_that_nobody_looked_for(tmp_path: Path) -> None:
    """One file can say it of all of its pictures, and not of some."""
    names = {1: "cat", 2: "dog"}
    half = {"coverage": [1]}
    a, b = (write(tmp_path / f"{x}.json", names, [f"{x}.png"], info=half) for x in "ab")
    merge([a, b], tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["info"]["coverage"] == [1]
    c = write(tmp_path / "c.json", names, ["c.png"])
    with pytest.raises(UserError, match=r"b\.json: info\.coverage: nobody looked for dog in its pictures"):
        merge([c, b], tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_mistakes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", {1: "cat"}, ["x.png"]), write(tmp_path / "b.json", {1: "cat"}, ["./x.png"])
    twice = write(tmp_path / "twice.json", {1: "cat", 2: "cat"}, ["z.png"])
    lost = json.loads(b.read_text())
    lost["annotations"][0]["image_id"] = 77
    (tmp_path / "lost.json").write_text(json.dumps({**lost, "images": [{"id": 5, "file_name": "q.png"}]}))
    out, folder = tmp_path / "out.json", [tmp_path]
    for files, images, says in (
        ([a, b], (), r"b\.json: images: '\./x\.png' is .*x\.png, which .*a\.json has too"),
        ([a, twice], (), r"twice\.json: categories: two are called 'cat'"),
        ([a, tmp_path / "lost.json"], (), r"lost\.json: annotations\[0\]: image_id 77 is not in the file"),
        ([a], (), r"out\.json: merging takes at least two files"),
        ([a, b], folder * 3, r"--images: 3 folders for 2 files"),
    ):
        with pytest.raises(UserError, match=says):
            merge(files, out, images)
    assert not out.exists()
    other = write(tmp_path / "c" / "c.json", {1: "cat"}, ["x.png"])
    with pytest.raises(UserError, match="is one of the files to merge"):
        merge([a, other], a, force=True)
    merge([a, other], out)
    with pytest.raises(UserError, match="is there already; --force replaces it"):
        merge([a, other], out)
    merge([other, a], out, force=True)
