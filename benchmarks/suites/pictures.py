"""What another reader of pictures would cost: the same model and pictures, read by other decoders and resize filters.

    python -m benchmarks pictures
    python -m benchmarks pictures --name bccd --checkpoint student.safetensors --data val.json --images FOLDER \
        --size 256 320 --limits 240 320

Without options: the teacher of the quickstart, on pictures that are drawn at 3/2 and at 3/4 of its side and kept as
JPEG. Every variant gives the network its own canvas of each picture: `difference` is the mean distance from the canvas
of `deploy.core`, in levels of 255, `furthest` the largest; `mAP` is that of the detections, `mAP lost` against ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_by_torchvision
from torchvision.transforms.v2 import functional as F

from benchmarks.lib.results import Case, Row
from compress.config.deploy import Deploy
from compress.data import synthetic
from compress.export.onnx import torch_runner
from compress.teachers.onnx_input import opencv_linear
from deploy.core import canvas as ours
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.runtimes.base import Runner
from deploy.runtimes.pictures import Canvases, fit_pictures, picture_detections
from deploy.validate.coco import evaluate_coco
from deploy.validate.detect import Outcome

Read = Callable[[Path], np.ndarray]
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
SIDE, CLASSES, QUALITY = 128, 8, 90


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=300, help="pictures of a case")
    given = parser.add_argument_group("a model and pictures of your own; all but --limits")
    given.add_argument("--name", help="of the data")
    given.add_argument("--checkpoint", type=Path)
    given.add_argument("--data", type=Path, help="COCO JSON")
    given.add_argument("--images", type=Path)
    given.add_argument("--size", type=int, nargs=2, help="height width")
    given.add_argument("--limits", type=int, nargs=2, help="short long")


def run(args: argparse.Namespace) -> Iterator[Case]:
    own = ("name", "checkpoint", "data", "images", "size")
    missing = [f"--{name}" for name in own if getattr(args, name) is None]
    if not missing:
        limits = tuple(args.limits) if args.limits else None
        runner = torch_runner(str(args.checkpoint), Deploy(), tuple(args.size), resize_short_long=limits)
        yield Case(args.name, measure(runner, args.data, args.images, args.count))
        return
    if len(missing) < len(own):
        raise UserError(f"a model of your own needs {' '.join(missing)}, too")
    runner = torch_runner("zoo:quickstart", Deploy(), (SIDE, SIDE))
    for name, side in {"drawn, 3 to 2": SIDE * 3 // 2, "drawn, 3 to 4": SIDE * 3 // 4}.items():
        with tempfile.TemporaryDirectory(prefix="bench-pictures-") as folder:
            yield Case(name, measure(runner, drawn(Path(folder), side, args.count), Path(folder), args.count))


def drawn(folder: Path, side: int, count: int) -> Path:
    """Draw JPEGs of the quickstart's kind into `folder`. Returns their COCO file."""
    synthetic.generate(folder / "png", train=CLASSES, val=count, size=side, classes=CLASSES, seed=0)
    document = json.loads((folder / "png" / "val.json").read_text())
    for entry in document["images"]:
        with Image.open(folder / "png" / "images" / entry["file_name"]) as image:
            entry["file_name"] = Path(entry["file_name"]).with_suffix(".jpg").name
            image.save(folder / entry["file_name"], quality=QUALITY)
    (folder / "val.json").write_text(json.dumps(document))
    return folder / "val.json"


def measure(runner: Runner, data: Path, images: Path, count: int) -> list[Row]:
    """Rows of every variant, ours among them."""
    document = json.loads(data.read_text())
    document["images"] = document["images"][:count]
    kept = {entry["id"] for entry in document["images"]}
    document["annotations"] = [row for row in document["annotations"] if row["image_id"] in kept]
    files = {entry["id"]: images / entry["file_name"] for entry in document["images"]}
    outcomes = {name: Outcome() for name in VARIANTS}
    means: dict[str, list[float]] = {name: [] for name in VARIANTS}
    largest = dict.fromkeys(VARIANTS, 0)
    for image_id, path in files.items():
        reference = fit_pictures([load_image(path)], runner.card).images.astype(np.int16)
        for name, variant in VARIANTS.items():
            canvases = variant.canvases(path, runner)
            distance = np.abs(canvases.images - reference)
            means[name].append(float(distance.mean()))
            largest[name] = max(largest[name], int(distance.max()))
            found = picture_detections(runner(canvases.images), canvases, runner.card)
            outcomes[name].detections.add(image_id, found[0])
    values = {name: evaluate_coco(document, outcome.detections.table()).map for name, outcome in outcomes.items()}
    rows: list[Row] = []
    for name, value in values.items():
        rows += [
            Row(name, "difference", float(np.mean(means[name])), "levels", n=len(files)),
            Row(name, "furthest", largest[name], "levels", n=len(files)),
            Row(name, "mAP", value, "%", n=len(files)),
            Row(name, "mAP lost", values["ours"] - value, "points", n=len(files)),
        ]
    return rows


# --- the variants ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    read: Read = load_image
    resize: Resize = ours.resize

    def canvases(self, path: Path, runner: Runner) -> Canvases:
        """Canvases of one picture, by our rule of sizes."""
        with mock.patch.object(ours, "resize", self.resize):
            return fit_pictures([self.read(path)], runner.card)


def by_torchvision(path: Path) -> np.ndarray:
    pixels = decode_by_torchvision(str(path), ImageReadMode.RGB, apply_exif_orientation=True)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def hurried(path: Path) -> np.ndarray:
    """libjpeg-turbo with its fast transform and without smooth chroma, as players of films decode."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(path.read_bytes(), "RGB", fastdct=True, fastupsample=True)
    return pixels


def torchs(pixels: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    return F.resize_image(planes, list(size), antialias=antialias).permute(1, 2, 0).numpy()


def pillows(pixels: np.ndarray, size: tuple[int, int], *, filter: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), filter))


VARIANTS = {
    "ours": Variant(),
    "decoded by Pillow": Variant(read=by_pillow),
    "decoded by torchvision": Variant(read=by_torchvision),
    "decoded in a hurry": Variant(read=hurried),
    "resized by torchvision": Variant(resize=partial(torchs, antialias=True)),
    "torchvision, no antialias": Variant(resize=partial(torchs, antialias=False)),
    "OpenCV, linear": Variant(resize=opencv_linear),
    "Pillow, nearest": Variant(resize=partial(pillows, filter=Image.Resampling.NEAREST)),
    "Pillow, box": Variant(resize=partial(pillows, filter=Image.Resampling.BOX)),
    "Pillow, bicubic": Variant(resize=partial(pillows, filter=Image.Resampling.BICUBIC)),
    "Pillow, Lanczos": Variant(resize=partial(pillows, filter=Image.Resampling.LANCZOS)),
}
