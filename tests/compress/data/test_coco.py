from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform, train_transform
from deploy.core.errors import UserError
from deploy.validate.coco import read_annotations

Save = Callable[[Any], Path]
KEEP = eval_transform(1000, 1000)


def identity(image: torch.Tensor, boxes: torch.Tensor, ignore: torch.Tensor) -> Any:
    return image, boxes, ignore


def test_sample_against_pillow(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    dataset = CocoDetection(save(document), tmp_path / "images", identity)
    assert dataset.categories == ("dog", "cat") and dataset.category_ids == (3, 7)
    assert dataset.image_ids == tuple(range(10, 17))
    for index, entry in enumerate(document["images"]):
        image, target = dataset[index]
        pixels = np.array(Image.open(tmp_path / "images" / entry["file_name"]))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
        rows = [a for a in document["annotations"] if a["image_id"] == entry["id"]]
        x, y, w, h = np.array([a["bbox"] for a in rows]).T
        assert np.array_equal(target.boxes.numpy(), np.stack([x, y, x + w, y + h], 1))
        assert target.labels.tolist() == [{3: 0, 7: 1}[a["category_id"]] for a in rows]
        assert target.size == target.original_size == (entry["height"], entry["width"])
        assert dataset.aspect_ratios[index] == np.float32(entry["width"] / entry["height"])


def test_what_cannot_be_learned_is_dropped_and_counted(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    def add(bbox: list[float], **change: Any) -> None:
        document["annotations"].append(
            {"id": 100, "image_id": 10, "category_id": 3, "bbox": bbox, "area": 9, "iscrowd": 0, **change}
        )

    add([1, 1, 0.9, 5])
    add([1, 1, 5, float("nan")])
    add([1, 1, 5, 5], area=0)
    add([64, 1, 5, 5])
    add([-6, 1, 5, 5])
    add([1, 1, 5, 5], category_id=99)
    add([1, 1, 5, 5], image_id=99)
    add([2, 3, 5, 5], iscrowd=1)
    dataset = CocoDetection(save(document), tmp_path / "images", KEEP)
    expected = {"empty box": 3, "outside the image": 2, "unknown category": 1, "unknown image": 1}
    assert dataset.dropped == Counter(expected)
    assert dataset[0][1].ignore.tolist() == [False] * 3 + [True]


def test_drop_empty(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    kept = [a for a in document["annotations"] if a["image_id"] not in (11, 12)]
    kept.append({**kept[0], "id": 99, "image_id": 12, "iscrowd": 1})
    path = save({**document, "annotations": kept})
    assert len(CocoDetection(path, tmp_path / "images", KEEP)) == 7
    dataset = CocoDetection(path, tmp_path / "images", KEEP, drop_empty=True)
    assert dataset.image_ids == (10, 13, 14, 15, 16)
    assert len(CocoDetection(path, tmp_path / "images", KEEP)[1][1].boxes) == 0


def test_cache_gives_the_same_pixels_without_the_files(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    path, transform = save(document), train_transform((40, 64), 96, scale_jitter=(0.7, 1.5))
    plain = CocoDetection(path, tmp_path / "images", transform)
    samples = [plain[(index, 77)] for index in range(len(plain))]
    cached = CocoDetection(path, tmp_path / "images", transform, cache=True)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    for _ in range(2):  # the cache is not written to
        for index, (image, target) in enumerate(samples):
            again, other = cached[(index, 77)]
            assert torch.equal(image, again) and torch.equal(target.boxes, other.boxes)


@pytest.mark.parametrize("cache", [False, True])
def test_a_subset_gives_what_the_whole_gives(document: dict[str, Any], save: Save, tmp_path: Path, cache: bool) -> None:
    whole = CocoDetection(save(document), tmp_path / "images", eval_transform(64, 96), cache=cache)
    chosen = [len(whole) - 1, 0]
    part = whole.subset(chosen, cache=cache)
    assert len(part) == 2 and part.num_boxes == sum(len(whole[index][1].labels) for index in chosen)
    for place, index in enumerate(chosen):
        (image, target), (wanted, wanted_target) = part[(place, 3)], whole[(index, 3)]
        torch.testing.assert_close(image, wanted, rtol=0, atol=0)
        torch.testing.assert_close(target.boxes, wanted_target.boxes, rtol=0, atol=0)
        assert target.labels.tolist() == wanted_target.labels.tolist() and target.image_id == wanted_target.image_id
        assert part.path(place) == whole.path(index) and part.aspect_ratios[place] == whole.aspect_ratios[index]


def test_boxes_out_of_the_frame_disappear(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    def shift(image: torch.Tensor, boxes: torch.Tensor, ignore: torch.Tensor) -> Any:
        boxes[0] = torch.tensor([5.0, 5.0, 5.0, 9.0])
        return image, boxes, ignore

    dataset = CocoDetection(save(document), tmp_path / "images", shift)
    whole = CocoDetection(dataset.annotations, tmp_path / "images", identity)[0][1]
    for _ in range(2):  # the transform wrote into its own copy
        target = dataset[0][1]
        assert torch.equal(target.boxes, whole.boxes[1:]) and torch.equal(target.labels, whole.labels[1:])


def test_grey_palette_and_turned_images_are_rgb(save: Save, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "images" / "grey.png")
    Image.fromarray(pixels).quantize(16).save(tmp_path / "images" / "palette.png")
    Image.fromarray(pixels).save(tmp_path / "images" / "plain.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.fromarray(pixels).save(tmp_path / "images" / "turned.jpg", exif=exif)
    names = {"grey.png": (60, 40), "palette.png": (60, 40), "plain.bmp": (60, 40), "turned.jpg": (40, 60)}
    entries = [{"id": i, "file_name": name, "width": w, "height": h} for i, (name, (w, h)) in enumerate(names.items())]
    document = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    dataset = CocoDetection(save(document), tmp_path / "images", identity)
    for index, (width, height) in enumerate(names.values()):
        image, _ = dataset[index]
        assert image.shape == (3, height, width) and image.dtype == torch.uint8
    assert torch.equal(dataset[2][0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_missing_and_wrong_size_images(document: dict[str, Any], save: Save, tmp_path: Path) -> None:
    document["images"][1]["width"] += 1
    dataset = CocoDetection(save(document), tmp_path / "images", KEEP)
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: the file is missing \(image id 10 of "):
        dataset[0]
    with pytest.raises(UserError, match="is 40x60 pixels, the annotations say 41x60"):
        dataset[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [],,\n}', r"annotations\.json:2: not valid JSON"),
        ("[]", "COCO JSON is an object"),
        ('{"images": [], "categories": []}', "annotations: must be a list, found nothing"),
        (
            '{"images": [3], "annotations": [], "categories": []}',
            r"images\[0\]: must be an object, found int",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 3}], "annotations": [], "categories": []}',
            r"images\[0\]: height is missing",
        ),
        (
            '{"annotations": [], "categories": [], "images": [{"id": 1, "file_name": "a", "width": 0, "height": 3}]}',
            r"images\[0\]: width must be a positive integer, found 0",
        ),
        (
            '{"images": [], "categories": [], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]}',
            r"annotations\[0\]: bbox must be four numbers",
        ),
        (
            '{"images": [], "categories": [], "annotations": '
            '[{"id": [1], "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}',
            r"annotations\[0\]: id must be an integer or text, found \[1\]",
        ),
        (
            '{"annotations": [], "categories": [], "images": '
            '[{"id": 1, "file_name": "a", "width": 3, "height": 99999999999}]}',
            r"images\[0\]: height must be a positive integer, found 99999999999",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": "1", "name": "x"}]}',
            r"categories\[0\]: id must be an integer, found \"1\"",
        ),
    ],
)
def test_malformed_files_are_one_line(text: str, message: str, save: Save) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(save(text), sizes=True)
    assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_annotations(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not UTF-8"):
        read_annotations(tmp_path / "binary.json")
