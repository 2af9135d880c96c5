"""What labelling uses where nothing is given: what the teachers' files say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.pseudo.label import Labelled
from compress.pseudo.settings import Settings, unlike
from compress.teachers.base import Preprocessing, View
from deploy.core.card import OperatingPoint
from deploy.core.errors import UserError
from tests.helpers.random_teacher import SMALL, make, teacher

POINT = OperatingPoint(score=0.3, f1=0.8, precision=0.8, recall=0.8, class_scores=[0.3], images=40)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, two teachers, and what these label."""
    folder = tmp_path_factory.mktemp("pseudo")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    for index, (few, size) in enumerate(zip(pixels, [(64, 48), (40, 60), (90, 50), (64, 64), (64, 48)], strict=True)):
        Image.fromarray(few).resize(size, Image.Resampling.BILINEAR).save(folder / "images" / f"{index}.png")
    teacher(folder / "a.safetensors", ("cat", "dog"), 1)
    teacher(folder / "b.safetensors", ("person", "kitten"), 2)
    make(folder, folder / "whole.json")
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def a_teacher(**said: Any) -> Any:
    return SimpleNamespace(file="a.onnx", view=View.RESIZED, preprocessing=None, **said)


def test_thresholds() -> None:
    """Given; of the teacher's best F1; or the default, to the bit. Regions from half of it, or as given."""
    assert Settings(tau=0.6).thresholds([a_teacher(operating_point=POINT)]) == (0.6, 0.3, "as given")
    assert Settings(tau=0.1).thresholds([a_teacher(operating_point=POINT)]) == (0.1, 0.05, "as given")
    with pytest.raises(UserError, match=r"tau_ignore 0.9 is above 0.3, from where boxes are labels"):
        Settings(tau_ignore=0.9).thresholds([a_teacher(operating_point=POINT)])
    tau, region, why = Settings(tau_ignore=0.1).thresholds([a_teacher(operating_point=POINT)])
    assert (tau, region) == (0.3, 0.1)
    assert why == "where a.onnx says its F1 is best, 0.800 on 40 images"
    zero = POINT.model_copy(update={"score": 0.0})
    for teachers in ([a_teacher()], [a_teacher(operating_point=zero)], [a_teacher(operating_point=POINT)] * 2):
        tau, region, why = Settings().thresholds(teachers)
        assert (tau, region) == (0.4, 0.2) and why.startswith("the default") and "--thresholds-from" in why


def test_sizes() -> None:
    """One that looks at no resized image costs no second size."""
    known, unknown, own_eyes = a_teacher(resize_short_long=(96, 160)), a_teacher(), a_teacher()
    own_eyes.view = View.ORIGINAL
    assert Settings().sizes([own_eyes, known, unknown]) == [(96, 160), (96, 160), (800, 1333)]
    assert Settings(short=64, long=64).sizes([known, unknown]) == [(64, 64)] * 2
    assert Settings().sizes([own_eyes]) == [(800, 1333)]
    for wrong in ({"short": 64}, {"long": 64}):
        with pytest.raises(UserError, match="is missing; both or none are given"):
            Settings(**wrong)


def test_the_size_is_told_with_its_reason() -> None:
    known, unknown, own_eyes = a_teacher(resize_short_long=(96, 160)), a_teacher(), a_teacher()
    own_eyes.view = View.ORIGINAL
    start = "teacher a.onnx sees images: short side"
    assert Settings().size_lines(known) == [f"{start} 96, long side 160, as in its training"]
    assert "long side 1333, the default, since its file does not say; --short" in Settings().size_lines(unknown)[0]
    (warning,) = Settings(short=800, long=1333).size_lines(known)
    assert warning.startswith(f"warning: {start} 800, long side 1333, as given; it was trained with short side 96, lon")
    assert Settings().size_lines(own_eyes) == []
    own_eyes.preprocessing = Preprocessing("letterbox to 64 x 64")
    assert Settings().size_lines(own_eyes) == ["teacher a.onnx sees images: letterbox to 64 x 64, RGB"]


@pytest.mark.parametrize(("found", "labelled", "said"), [(3, 1, False), (3.01, 1, True), (1, 3, False), (0, 3, True)])
def test_three_times_is_too_many(found: float, labelled: float, said: bool) -> None:
    assert (unlike(found, labelled, "val.json") is not None) == said
    assert unlike(5, 0, "val.json") is None, "nobody drew a box of these classes"


def test_each_teacher_sees_the_size_that_its_file_says(world: Path, tmp_path: Path) -> None:
    """What two find together is what each finds alone at its size: no class of theirs is the same."""
    sizes = {"large": (64, 96), "small": (32, 48)}
    files = [
        teacher(tmp_path / "large.safetensors", ("cat", "dog"), 1, resize_short_long=sizes["large"]),
        teacher(tmp_path / "small.safetensors", ("person", "kitten"), 2, resize_short_long=sizes["small"]),
    ]
    own = replace(SMALL, short=None, long=None)
    make(world, tmp_path / "both.json", teachers=files, table={}, settings=own)
    both = read(tmp_path / "both.json")
    rows = [{"short": row["short"], "long": row["long"]} for row in both["info"]["pseudo_labels"]["teachers"]]
    assert rows == [{"short": short, "long": long} for short, long in sizes.values()]
    for file, (name, (short, long)) in zip(files, sizes.items(), strict=True):
        out = tmp_path / f"{name}.json"
        make(world, out, teachers=[file], table={}, settings=replace(SMALL, short=short, long=long))
        alone = boxes_by_class(read(out))
        assert len(alone) == 2 and all(len(rows) > 5 for rows in alone.values())
        assert alone == {key: rows for key, rows in boxes_by_class(both).items() if key in alone}


def test_the_threshold_is_that_of_the_best_f1_where_the_teacher_says(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = POINT.model_copy(update={"score": 0.7, "class_scores": [0.7, None]})
    file = teacher(tmp_path / "t.safetensors", ("cat", "dog"), 1, operating_point=point)
    for name, tau in (("own", None), ("given", 0.7)):
        how = replace(SMALL, tau=tau, tau_ignore=0.35 if tau else None)
        make(world, tmp_path / f"{name}.json", teachers=[file], table={}, settings=how, quiet=False)
    own, given = (read(tmp_path / f"{name}.json") for name in ("own", "given"))
    assert own["info"]["pseudo_labels"]["tau"] == {"cat": 0.7, "dog": 0.7} and own["annotations"]
    assert own["annotations"] == given["annotations"]
    said = "threshold: 0.7 (0.35 for regions to ignore), where t.safetensors says its F1 is best, 0.800 on 40 images"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("threshold")] == [said]


def boxes_by_class(document: dict[str, Any]) -> dict[str, list[Any]]:
    """(image, box, score, region) of all annotations, by the name of the class."""
    found: dict[str, list[Any]] = {row["name"]: [] for row in document["categories"]}
    names = {row["id"]: row["name"] for row in document["categories"]}
    for row in document["annotations"]:
        found[names[row["category_id"]]].append([row["image_id"], row["bbox"], row["score"], row["iscrowd"]])
    return {name: sorted(rows) for name, rows in found.items()}


def test_a_number_of_boxes_unlike_that_of_people_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The labels of `whole.json` themselves are alike; a tenth of them is not, nor are none of the classes' boxes."""
    document = read(world / "whole.json")
    labels = [row for row in document["annotations"] if not row["iscrowd"]]
    for name, kept in (("alike", labels), ("few", labels[::10]), ("many", labels * 4), ("none", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**document, "info": {}, "annotations": kept}))
        make(world, tmp_path / f"of_{name}.json", like=Labelled(tmp_path / f"{name}.json", world / "images"))
        out = capsys.readouterr().out
        assert out.count("\n") == (name in ("few", "many"))
        if out:
            found, drawn = len(labels) / 5, len(kept) / 5
            assert out.startswith(f"warning: {found:.2f} labels a picture, and {tmp_path / name}.json has {drawn:.2f}:")
