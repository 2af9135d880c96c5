"""Large files are opened through an index: what is seen of them is what the general reader makes of them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import index, quick_tables
from compress.data.coco import CocoDetection
from deploy.core.errors import UserError

Document = dict[str, Any]
ALWAYS, NEVER = 0, 1 << 60


def identity(image: torch.Tensor, boxes: torch.Tensor, ignore: torch.Tensor) -> Any:
    return image, boxes, ignore


def no_pixels(self: CocoDetection, number: int) -> torch.Tensor:
    return torch.zeros(3, 1, 1, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file has an index, in a folder of this test, and is read in many pieces."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SMALLEST", ALWAYS)
    monkeypatch.setattr(quick_tables, "PIECE", 64)
    return tmp_path / "cache" / "compress" / "labels"


def seen(dataset: CocoDetection) -> Any:
    """All that a dataset says, but for its pictures."""
    targets = [dataset[number][1].__getstate__() for number in range(len(dataset))]
    facts = [
        [value.tolist() if isinstance(value, np.ndarray) else value for value in target.values()] for target in targets
    ]
    names = [dataset.name(number) for number in range(len(dataset))]
    labels = [list(dataset.dropped.items()), dataset.label_notes, dataset.num_boxes, dataset.boxes_by_class]
    pictures = [dataset.image_ids, dataset.sizes, dataset.aspect_ratios.tolist(), names]
    return [dataset.categories, dataset.category_ids, *labels, *pictures, repr(facts)]


def outcome(file: Path, **options: Any) -> Any:
    try:
        return seen(CocoDetection(file, file.parent, identity, **options))
    except (UserError, ValueError) as error:  # ValueError: a name that no file can have
        return repr(error)


def ordinary(images: int = 5) -> Document:
    """A document with everything that the quick reader reads, and things that it steps over."""
    names = ["dog", "cat", "not looked for", "nothing"]
    boxes = [
        {"image_id": 10 + n % images, "category_id": 3 + 4 * (n % 2), "bbox": [n % 4, 1.5, 8, 9.25 + n % 3], "id": n}
        for n in range(40)
    ]
    more: list[Document] = [
        {**boxes[0], "id": "again", "segmentation": [{"x": 1}, {"y": "},{"}, [[1, 2]]]},
        {**boxes[1], "id": None, "bbox": [-0.0, 0, 4, 4], "iscrowd": True, "ignore": 1},
        {**boxes[2], "id": 4.5, "bbox": [0, 0, 4, 4], "iscrowd": 1.0, "score": 0.25, "área": "ü\\\""},
        {**boxes[3], "area": 0}, {**boxes[3], "image_id": 99}, {**boxes[3], "image_id": 99, "category_id": 98},
        {**boxes[3], "bbox": [900, 0, 4, 4]}, {**boxes[3], "bbox": [0, 0, 0.5, 4]}, {**boxes[0], "category_id": 5},
    ]  # fmt: skip
    return {
        "info": {"coverage": [3, 7, 9]},
        "annotations": boxes[:20] + more + boxes[20:],
        "licenses": [{"id": 1}, {"id": 2}],
        "images": [
            {"id": 10 + n, "file_name": f"{n}é.png", "width": 31 + n, "height": 40, "extra": [{}, {}]}
            for n in range(images + 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in zip((3, 7, 5, 9), names, strict=True)],
    }


# ------------------------------------------------------------------------------------------------- equal to the other

numbers = st.sampled_from([0, 1, 2, 3.5, 7, -4, 40, 0.9, -0.0, 1e-3, 0.1, 30.000000000000004, 2**31, 1e15])
odd = st.sampled_from(
    [None, True, "3", "\ud800", 2.5, 2**60 + 1, [1], {}, -1, 0, 2**31, 2**63, 10**400, 1e300, math.nan, math.inf]
)
boxes = st.lists(numbers | odd, min_size=3, max_size=4) | odd
PLACES = [("annotations", "bbox", boxes)] + [
    (section, key, odd)
    for section, keys in {
        "annotations": ("bbox", "image_id", "category_id", "area", "iscrowd", "ignore", "score", "id"),
        "images": ("id", "file_name", "width", "height"),
        "categories": ("id", "name"),
    }.items()
    for key in keys
]


@st.composite
def documents(draw: Any) -> Document:
    def some(values: st.SearchStrategy[Any], key: str) -> Document:
        return {key: draw(values)} if draw(st.booleans()) else {}

    small, flag = st.integers(1, 5), st.sampled_from([0, 1, True, False, 1.0])
    text = st.sampled_from(["a", "ü", "},{", '"', "\\", "]}", "\x00"])
    document: Document = {
        "images": [
            {"id": number, "file_name": draw(text), "width": draw(st.integers(1, 50)), "height": draw(small) * 16}
            for number in draw(st.lists(small, unique=True, min_size=1, max_size=4))
        ],
        "categories": [{"id": number, "name": draw(text)} for number in draw(st.lists(small, min_size=1, max_size=4))],
        "annotations": [
            {
                **some(st.lists(st.lists(numbers, max_size=3) | text, max_size=3), "segmentation"),
                "image_id": draw(small),
                "category_id": draw(small),
                "bbox": draw(st.lists(numbers, min_size=4, max_size=4)),
                **some(numbers, "area"),
                **some(flag, "iscrowd"),
                **some(flag, "ignore"),
                **some(st.sampled_from([0, 1, 0.3]), "score"),
                **some(st.sampled_from([1, 2, "b", None, 1.5]), "id"),
                **some(st.lists(st.dictionaries(text, text, max_size=2), max_size=3), "parts"),
            }
            for _ in range(draw(st.integers(0, 9)))
        ],
        **some(st.sampled_from([None, {}, {"coverage": [1, 2]}, {"coverage": [1, 9]}, {"coverage": 3}]), "info"),
    }
    section, key, values = draw(st.sampled_from(PLACES))
    if document[section] and draw(st.integers(0, 2)) == 0:
        row = draw(st.sampled_from(document[section]))
        row[key] = draw(values)
        if draw(st.booleans()):
            del row[key]
    if draw(st.integers(0, 19)) == 0:
        document[draw(st.sampled_from(list(document)))] = draw(odd)
    return {key: document[key] for key in draw(st.permutations(list(document)))}


@st.composite
def files(draw: Any) -> bytes:
    plain = draw(st.booleans())
    text = json.dumps(draw(documents()), indent=draw(st.sampled_from([None, 1])), ensure_ascii=plain)
    content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.sampled_from([b"", b",", b"}", b"\xff", b"\\", b"0"])) + content[cut + 1 :]
    return draw(st.sampled_from([b""] * 19 + [b"\xef\xbb\xbf"])) + content


@settings(max_examples=100)
@given(files(), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_any_file_is_seen_as_the_general_reader_sees_it(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, empty: bool, uncertain: bool, scores: bool, most: int
) -> None:
    options = {"drop_empty": empty, "drop_uncertain": uncertain, "scores": scores, "max_detections": most}
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CocoDetection, "image", no_pixels)
        first = outcome(file, **options)
        again = outcome(file, **options)
        patch.setattr(index, "SMALLEST", NEVER)
        assert first == again == outcome(file, **options)


def annotation(**changes: Any) -> Document:
    return {"image_id": 10, "category_id": 3, "bbox": [1, 2, 8, 9], **changes}


SPECIAL: dict[str, list[Document]] = {
    "zeros of both signs": [annotation(bbox=[-0.0, 0, 9, 9]), annotation(bbox=[0, 0.0, 9, 9])],
    "the same crowd region": [annotation(bbox=[3, 3, 9, 9], iscrowd=1)] * 2,
    "the same box of an unknown image": [annotation(image_id=99), annotation(image_id=98), annotation(image_id=99)],
    "other images come first": [annotation(image_id=14, bbox=[n, 1, 8, 8]) for n in range(9)],
    "an unknown image comes first": [annotation(image_id=99, bbox=[n, 1, 8, 8]) for n in range(9)],
    "most are crowd regions": [annotation(image_id=14, bbox=[n, 1, 8, 8], iscrowd=n % 4 > 0) for n in range(9)],
    "ignored without being a crowd region": [annotation(ignore=1)],
    "sums that floats do not hold": [annotation(bbox=[-(2**53) - 1, 0, 2**53 + 3, 9])],
    "a score out of range": [annotation(score=1.5)],
    "a negative score of what is dropped": [annotation(score=-1, category_id=99)],
    "a score of text": [annotation(score="1")],
    "half a crowd": [annotation(iscrowd=0.5)],
    "two crowds": [annotation(iscrowd=2)],
    "half ignored": [annotation(ignore=0.5)],
    "a box that is no number": [annotation(bbox=[math.nan, 0, 9, 9])],
    "a large area": [annotation(area=10**305)],
    "an id of many digits": [annotation(image_id=10**30), annotation(id=10**30), annotation(id=10**30)],
    "an id that is true": [annotation(id=True)],
    "no box": [{"image_id": 10, "category_id": 3}],
}


@pytest.mark.parametrize("case", [*SPECIAL, "an image twice", "a class twice", "not UTF-8", "nothing"])
def test_a_special_file_is_seen_as_the_general_reader_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(CocoDetection, "image", no_pixels)
    document = ordinary()
    document["annotations"] = SPECIAL.get(case, []) + document["annotations"]
    if case.endswith("twice"):
        section = "images" if case == "an image twice" else "categories"
        document[section].append({**document[section][0], "name": "again"})
    file = tmp_path / "labels.json"
    content = json.dumps(document, ensure_ascii=False).encode()
    file.write_bytes(content.replace("ü".encode(), b"\xff") if case == "not UTF-8" else content)
    found = [outcome(file, scores=True, max_detections=7)]
    monkeypatch.setattr(index, "SMALLEST", NEVER)
    assert found == [outcome(file, scores=True, max_detections=7)]


@pytest.mark.parametrize("options", [{}, {"drop_empty": True}, {"drop_uncertain": True, "scores": True}])
def test_an_ordinary_file_has_an_index(
    tmp_path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(CocoDetection, "image", no_pixels)
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(ordinary()))
    with monkeypatch.context() as patch:
        patch.setattr(index, "SMALLEST", NEVER)
        plain = CocoDetection(file, tmp_path, identity, max_detections=7, **options)
        patch.setattr(index, "plain_tables", None)
        patch.setattr(index, "SMALLEST", ALWAYS)
        made = CocoDetection(file, tmp_path, identity, max_detections=7, **options)
        patch.setattr(index, "_read", None)
        opened = CocoDetection(file, tmp_path, identity, max_detections=7, **options)
    assert len(plain.dropped) == 4 and len(plain.label_notes) == 3
    assert seen(made) == seen(opened) == seen(plain)
    chosen = [len(plain) - 1, 0, 1]
    assert seen(opened.subset(chosen)) == seen(plain.subset(chosen))
    sent = pickle.dumps(opened)
    assert seen(pickle.loads(sent)) == seen(plain) and len(sent) < len(pickle.dumps(plain))


# ------------------------------------------------------------------------------------------------------- on the disk


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(ordinary()))
    return file


def only(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def turned(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    "damage", [turned, lambda content: content[:-1], lambda content: b"", lambda content: b"{}" * 9]
)
def test_a_damaged_index_is_made_anew(labels: Path, own_folder: Path, damage: Callable[[bytes], bytes]) -> None:
    right = seen_tables(labels)
    place = only(own_folder)
    content = place.read_bytes()
    place.write_bytes(damage(content))
    assert seen_tables(labels) == right
    assert only(own_folder).read_bytes() == content


def seen_tables(file: Path) -> dict[str, Any]:
    tables = index.label_tables(file, file.parent)
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(tables).items()
        if name != "place"
    }


def test_another_content_has_another_index(labels: Path, own_folder: Path) -> None:
    before = seen_tables(labels)
    labels.write_text(json.dumps(ordinary(images=4)))
    assert seen_tables(labels) != before and len(list(own_folder.glob("*.safetensors"))) == 2


def test_without_a_place_for_it_the_labels_are_there(labels: Path, tmp_path: Path) -> None:
    with_index = seen_tables(labels)
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "a file").touch()
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
        assert seen_tables(labels) == with_index


def test_what_depends_on_the_pictures_is_not_kept(
    document: Document, save: Callable[[Any], Path], own_folder: Path
) -> None:
    file = save(document)
    whole = seen(CocoDetection(file, file.parent / "images", identity))
    for entry in document["images"]:
        del entry["width"]
    assert seen(CocoDetection(save(document), file.parent / "images", identity)) == whole and only(own_folder)


def test_indices_that_nobody_opens_are_removed(labels: Path, own_folder: Path) -> None:
    seen_tables(labels)
    first = only(own_folder)
    long_ago = time.time() - 40 * 24 * 3600
    os.utime(first, (long_ago, long_ago))
    seen_tables(labels)  # it is in use again
    labels.write_text(json.dumps(ordinary(images=4)))
    seen_tables(labels)
    assert first.is_file()
    os.utime(first, (long_ago, long_ago))
    labels.write_text(json.dumps(ordinary(images=3)))
    seen_tables(labels)
    assert not first.exists() and len(list(own_folder.glob("*.safetensors"))) == 2


def test_of_two_processes_one_makes_it(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = index._made

    def slowly(*args: Any) -> Any:
        (tmp_path / f"made-{os.getpid()}").touch()
        time.sleep(0.3)
        return right(*args)

    monkeypatch.setattr(index, "_made", slowly)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=index.label_tables, args=(labels, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and len(list(tmp_path.glob("made-*"))) == 1
