"""Every kind of picture file gives the same pixels on every path, or the same line that refuses it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.data.check import check
from compress.data.coco import CocoDetection
from compress.data.convert.coco_file import read_size
from compress.data.transforms import eval_transform, train_transform
from compress.export.onnx import canvases as export_canvases
from compress.pseudo.images import ImageList, Unreadable, read_chunks
from compress.report.pictures import PhotoError, Photos
from compress.teachers.base import View
from deploy.core import image as reading
from deploy.core.canvas import letterbox
from deploy.core.errors import UserError
from deploy.core.image import image_size, load_image, read_picture
from deploy.latency.scopes import make_task, read_pool
from deploy.quantize.calibrate import canvases as calibration_canvases
from deploy.runtimes.base import DetectionBatch
from deploy.serve.decode import decode as decode_request
from deploy.serve.settings import RefusalError
from deploy.validate.detect import detect_all
from tests.helpers.fake_runners import TINY_CARD, FakeClock
from tests.helpers.picture_corpus import PictureFile, kinds, pairs, suffix

SIDE = 48
CARD = TINY_CARD.model_copy(update={"input_size": (SIDE, SIDE), "short": 20, "long": 40})
SERVED = ("jpeg", "mpo", "png", "webp", "bmp", "gif")


class Seen:
    """A runner that keeps the canvases it is given."""

    card, backend, on_cpu = CARD, "seen", True

    def __init__(self) -> None:
        self.canvases: list[np.ndarray] = []

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        self.canvases += list(images)
        n = len(images)
        nothing = np.zeros((n, 1), np.float32)
        return DetectionBatch(np.zeros((n, 1, 4), np.float32), nothing, nothing.astype(np.int64), np.zeros(n, np.int32))


def canvas(pixels: np.ndarray) -> np.ndarray:
    return letterbox(pixels, CARD.input_size, CARD.pad_color, short=CARD.short, long=CARD.long)[0]


def validated(path: Path) -> np.ndarray:
    runner = Seen()
    detect_all({"seen": runner}, {1: path}, 1, None)
    return runner.canvases[0]


def measured(path: Path) -> np.ndarray:
    runner = Seen()
    make_task(runner, "end_to_end", read_pool([path]), 1, FakeClock())(1)
    return runner.canvases[0]


# What each user of pictures makes of a file: whole pixels, or a canvas.
PIXELS: dict[str, Callable[[Path], np.ndarray]] = {
    "by its name": load_image,
    "deploy.open, a path": read_picture,
    "deploy.open, bytes": lambda path: read_picture(path.read_bytes()),
}
CANVASES: dict[str, Callable[[Path], np.ndarray]] = {
    "calibration": lambda path: calibration_canvases([path], CARD)[0],
    "check of an export": lambda path: export_canvases([path], CARD, 1)[0],
    "validate": validated,
    "benchmark": measured,
}


def write(folder: Path, files: Sequence[PictureFile], seed: int) -> list[Path]:
    paths = [folder / f"{index}{suffix(file, seed)}" for index, file in enumerate(files)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file.data)
    return paths


def outcome(read: Callable[[Path], np.ndarray], path: Path) -> np.ndarray | str:
    """Pixels, or the refusal without the file's name."""
    try:
        return read(path)
    except UserError as error:
        return str(error).removeprefix("image: ").removeprefix(f"{path}: ")


def agree(one: np.ndarray | str, other: np.ndarray | str) -> bool:
    return one == other if isinstance(one, str) or isinstance(other, str) else np.array_equal(one, other)


def compare(folder: Path, files: Sequence[PictureFile], seed: int) -> None:
    paths = write(folder, files, seed)
    known = {path: outcome(load_image, path) for path in paths}
    for path, file in zip(paths, files, strict=True):
        found = known[path]
        if file.pixels is None:
            assert isinstance(found, str) and file.refusal in found and "\n" not in found, (file.kind, found)
            assert found.startswith("cannot be read as an image: "), file.kind
        else:
            assert not isinstance(found, str), (file.kind, found)
            assert found.shape == file.pixels.shape and found.dtype == np.uint8, file.kind
            assert np.abs(found.astype(int) - file.pixels).max() <= file.off, file.kind
            assert image_size(path) == found.shape[:2] == read_size(path)[::-1], file.kind
        on_canvas = found if isinstance(found, str) else canvas(found)
        for name, read in PIXELS.items():
            assert agree(outcome(read, path), found), (file.kind, name)
        for name, read in CANVASES.items():
            assert agree(outcome(read, path), on_canvas), (file.kind, name)
        served(file, on_canvas)
    datasets(folder, paths, files, known)


def served(file: PictureFile, on_canvas: np.ndarray | str) -> None:
    """The server takes fewer formats; it refuses the same files, in words that are for strangers."""
    try:
        found = decode_request(file.data, CARD, max_pixels=10**6, where="image").canvas
    except RefusalError as error:
        taken = any(name in file.kind for name in SERVED) and "tiff" not in file.kind and "jpeg 2000" not in file.kind
        assert file.pixels is None or not taken, (file.kind, error.message)
        return
    assert agree(found, on_canvas), (file.kind, "server")


def datasets(
    folder: Path, paths: Sequence[Path], files: Sequence[PictureFile], known: dict[Path, np.ndarray | str]
) -> None:
    """Training, its evaluation, `data check`, pseudo-labelling and the report, which read lists of pictures."""
    sizes = [(7, 9) if isinstance(found, str) else found.shape[:2] for found in map(known.__getitem__, paths)]
    document = {
        "images": [
            {"id": index, "file_name": path.name, "width": width, "height": height}
            for index, (path, (height, width)) in enumerate(zip(paths, sizes, strict=True))
        ],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": index, "image_id": index, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1}
            for index in range(len(paths))
        ],
    }
    (folder / "labels.json").write_text(json.dumps(document))
    checked = check(folder / "labels.json", folder).problems
    problems = {finding.where: finding.message for finding in checked if finding.kind == "unreadable"}
    evaluated = CocoDetection(folder / "labels.json", folder, eval_transform(20, 40))
    trained = CocoDetection(folder / "labels.json", folder, train_transform(20, 40, flip=0.0))
    names = [path.name for path in paths]
    listed = ImageList(folder, list(range(len(paths))), names, [None] * len(paths))
    views = (View.RESIZED, View.ORIGINAL)
    chunk = next(read_chunks(listed, [0], size=len(paths), short=20, long=40, workers=0, views=views))
    photos = Photos(folder)
    for index, (path, file) in enumerate(zip(paths, files, strict=True)):
        found, read = known[path], chunk[index]
        if isinstance(found, str):
            assert problems[f"image {index}"] == found, file.kind
            for dataset in (evaluated, trained):
                with pytest.raises(UserError, match=re.escape(f"{path}: {found} (image id {index} of ")):
                    dataset[index]
            assert isinstance(read, Unreadable) and read.reason == f"{path}: {found}", file.kind
            with pytest.raises(PhotoError, match=re.escape(found)):
                photos.size(path.name)
            continue
        assert f"image {index}" not in problems, file.kind
        assert np.array_equal(evaluated.image(index).permute(1, 2, 0).numpy(), found), file.kind
        resized, target = evaluated[index]
        height, width = target.size
        on_canvas = canvas(found)[:, :height, :width]
        assert np.array_equal(resized.numpy(), on_canvas), file.kind
        assert not isinstance(read, Unreadable) and read.image is not None and read.original is not None
        assert np.array_equal(read.image.numpy(), on_canvas), file.kind
        assert np.array_equal(read.original.permute(1, 2, 0).numpy(), found), file.kind
        stepped = trained[index][0].numpy().astype(int)
        assert np.abs(stepped - on_canvas).max() <= 2, file.kind  # torchvision's kernel
        assert photos.size(path.name) == found.shape[1::-1], file.kind


def test_every_kind_on_every_path(tmp_path: Path) -> None:
    files = kinds(0)
    assert len({file.kind for file in files}) == len(files) > 200
    compare(tmp_path, files, 0)


def test_pairs_of_kinds_on_every_path(tmp_path: Path) -> None:
    compare(tmp_path, pairs(1, 60), 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(2, 12))
def test_more_pairs_of_kinds_on_every_path(tmp_path: Path, seed: int) -> None:
    compare(tmp_path, [*kinds(seed), *pairs(seed, 400)], seed)


def test_at_the_limit_and_beyond_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One limit for whoever reads; `image_size` says it from the header."""
    monkeypatch.setattr(reading, "MAX_PIXELS", 20 * 30)
    path = tmp_path / "a.png"
    for height, width, taken in ((20, 30, True), (30, 20, True), (20, 31, False), (601, 1, False)):
        Image.new("RGB", (width, height), (9, 99, 200)).save(path)
        refusal = f"cannot be read as an image: {width} x {height} pixels; at most 600 are taken"
        for read in (load_image, image_size, *PIXELS.values(), *CANVASES.values()):
            found = outcome(read, path)  # type: ignore[arg-type]
            assert found == refusal if not taken else not isinstance(found, str)


def test_the_limit_of_pillow_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file for file in kinds(3) if file.pixels is not None]
    paths = write(tmp_path, files, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    for path, file in zip(paths, files, strict=True):
        assert load_image(path).shape == file.pixels.shape, file.kind  # type: ignore[union-attr]
        assert image_size(path) == file.pixels.shape[:2], file.kind  # type: ignore[union-attr]
    assert Image.MAX_IMAGE_PIXELS == 3


@pytest.mark.exhaustive
def test_an_aerial_picture(tmp_path: Path) -> None:
    """196 megapixels: more than Pillow opens."""
    path = tmp_path / "large.png"
    stripes = np.zeros((14_016, 14_016), bool)
    stripes[::2] = True
    Image.fromarray(stripes).save(path)
    assert image_size(path) == (14_016, 14_016)
    pixels = load_image(path)
    assert pixels.shape == (14_016, 14_016, 3) and pixels[:2, 5].tolist() == [[255] * 3, [0] * 3]
    assert set(np.unique(canvas(pixels)[:, :20, :20])) <= {127, 128}
