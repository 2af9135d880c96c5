"""A made-up detection dataset that is drawn in seconds and still rewards a larger network.

A class is a shape *and* a texture ("striped star"). The scenes hold the same shapes with no texture or a
foreign one, and the same textures on foreign shapes, all unlabelled: neither cue is enough alone, and
colour says nothing. Objects measure from 12 px to half the image side (log-uniform), are rotated,
stretched, shaded, cut by the image border and covered by other objects and by strokes.

`generate` writes COCO JSON and PNG files; the same arguments give the same bytes of JSON and the same pixels.

A style changes how the scenes look and not what is in them, so that a detector can be tried on images of another kind
than it was trained on: `night` is dark, bluish, low in contrast, out of focus and noisy.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.data.digests import PictureDigests
from compress.data.shapes import (
    CLASS_SHAPES,
    CLASS_TEXTURES,
    FOREIGN_SHAPES,
    FOREIGN_TEXTURES,
    SHAPES,
    Array,
    texture_of,
    unit_area,
)
from deploy.core.errors import UserError
from deploy.core.files import sha256_of, write_json

MAX_CLASSES = 24
MIN_OBJECT_PX = 12
MAX_OBJECTS = 8
MIN_VISIBLE = 0.3
"""An object of which less than this share can be seen is not annotated."""

VERSION = 1
"""Raise it when the drawing changes: folders of an older version are then drawn again."""


Style = Literal["plain", "night"]


def generate(
    folder: Path,
    *,
    train: int,
    val: int,
    size: int,
    classes: int,
    seed: int,
    style: Style = "plain",
    digests: PictureDigests | None = None,
) -> None:
    """Write `train.json`, `val.json` (COCO) and `images/` into `folder`, unless they are there already.

    The images are `size` x `size` RGB. The folder appears whole or not at all: it is drawn under a
    temporary name beside it. A folder of another specification, or in which a file was changed, is replaced; a folder
    that this function did not write is an error.

    digests: of pictures, with a memory; None: all are read, to see whether they are as they were drawn.

    Raises:
        UserError: a number out of range, or `folder` holds something else.
    """
    _check_arguments(train, val, size, classes, seed)
    folder = Path(folder)
    specification: dict[str, Any] = dict(version=VERSION, train=train, val=val, size=size, classes=classes, seed=seed)
    if style != "plain":  # folders from before there were styles stay as they are
        specification["style"] = style
    if _is_complete(folder, specification, PictureDigests() if digests is None else digests):
        return
    if folder.exists() and not (folder / "spec.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a synthetic dataset; name another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:  # the reader knows `folder`, not the temporary name
        raise OSError(error.errno, error.strerror, str(folder)) from error
    try:
        _write(temporary / "new", specification)
        if folder.exists():
            os.replace(folder, temporary / "old")
        os.replace(temporary / "new", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def class_names(classes: int) -> list[str]:
    """The names of the first `classes` classes, in category-id order (ids start at 1)."""
    return [f"{texture} {shape}" for shape, texture in _CLASSES[:classes]]


@dataclass(frozen=True)
class Box:
    """One annotated object."""

    label: int
    xyxy: tuple[float, float, float, float]
    """Pixels; of the whole object, hidden parts too, clipped to the image."""
    area: float
    """Pixels that the object covers inside the image, hidden ones too."""


def draw(size: int, classes: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[Box]]:
    """One scene: the image uint8 [size, size, 3] and its annotated objects, lowest first."""
    canvas = _background(size, rng)
    for _ in range(rng.integers(1, 5)):
        _stroke(canvas, None, rng) if rng.random() < 0.6 else _blob(canvas, rng)

    empty = rng.random() < 0.05
    count = 0 if empty else 1 + min(MAX_OBJECTS - 1, int(rng.poisson(2.3)))
    kinds: list[int | None] = [int(label) for label in rng.integers(classes, size=count)]
    kinds += [None] * int(rng.choice(4, p=(0.3, 0.4, 0.2, 0.1)))  # distractors
    rng.shuffle(kinds)

    owner = np.full((size, size), -1, np.int16)
    placed: list[Circle] = []
    drawn: list[tuple[int, Box, float]] = []
    for index, kind in enumerate(kinds):
        place = _place(size, placed, rng)
        placed.append(place)
        shape, texture = _distractor(classes, rng) if kind is None else _CLASSES[kind]
        xyxy, area, full_area = _object(canvas, owner, index, shape, texture, place, rng)
        if kind is not None and xyxy is not None:
            drawn.append((index, Box(kind, xyxy, area), full_area))
    for _ in range(int(rng.choice(3, p=(0.6, 0.3, 0.1)))):
        _stroke(canvas, owner, rng)

    visible = np.bincount(owner.ravel() + 1, minlength=len(kinds) + 1)[1:]
    boxes = [box for index, box, full_area in drawn if visible[index] >= MIN_VISIBLE * full_area]

    canvas += rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(1, 9))
    canvas += 0.5
    np.clip(canvas, 0, 255, out=canvas)
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0)), boxes


def restyle(pixels: NDArray[np.uint8], style: Style, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A scene uint8 [h, w, 3] in another style; the objects stay where they are."""
    if style == "plain":
        return pixels
    light = pixels.astype(np.float32) / 255
    grey = (light @ _LUMA)[..., None]
    light = 0.5 * light + 0.5 * grey
    padded = np.pad(light, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = light.shape[:2]
    blurred = np.mean([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
    light = 0.5 * light + 0.5 * blurred
    light = 0.06 + rng.uniform(0.45, 0.6) * light ** np.float32(1.2) * np.array((0.75, 0.9, 1.25), np.float32)
    light += rng.standard_normal(light.shape, dtype=np.float32) * np.float32(rng.uniform(0.005, 0.015))
    return (np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8)


# --- files -----------------------------------------------------------------------------------------------


def _check_arguments(train: int, val: int, size: int, classes: int, seed: int) -> None:
    for name, value, low, high in (
        ("train", train, 1, 1_000_000),
        ("val", val, 1, 1_000_000),
        ("size", size, 2 * MIN_OBJECT_PX, 4096),
        ("classes", classes, 2, MAX_CLASSES),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:
            raise UserError(f"synthetic data: {name} is {value}, must be from {low} to {high}")


def _file_names(split: str, count: int) -> list[str]:
    return [f"{split}_{index:06d}.png" for index in range(count)]


def _is_complete(folder: Path, specification: dict[str, Any], digests: PictureDigests) -> bool:
    names = [name for split in ("train", "val") for name in _file_names(split, specification[split])]
    try:
        written = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        if written["specification"] != specification:
            return False
        if any(sha256_of(folder / name) != digest for name, digest in written["sha256"].items()):
            return False
        drawn = [written["pictures"][name] for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return digests.of([folder / "images" / name for name in names]) == drawn


def _write(folder: Path, specification: dict[str, Any]) -> None:
    (folder / "images").mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        write_json(folder / f"{split}.json", _write_split(folder, specification, split, number))
    digests = {name: sha256_of(folder / name) for name in ("train.json", "val.json")}
    pictures = {path.name: sha256_of(path) for path in sorted((folder / "images").iterdir())}
    write_json(folder / "spec.json", {"specification": specification, "sha256": digests, "pictures": pictures})


def _write_split(folder: Path, specification: dict[str, Any], split: str, number: int) -> dict[str, Any]:
    size, classes = specification["size"], specification["classes"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, name in enumerate(_file_names(split, specification[split])):
        pixels, boxes = draw(size, classes, np.random.default_rng([specification["seed"], number, index]))
        style = specification.get("style", "plain")
        pixels = restyle(pixels, style, np.random.default_rng([specification["seed"], number, index, 1]))
        # The lowest compression: noise does not compress, and drawing should not wait for zlib.
        Image.fromarray(pixels).save(folder / "images" / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for box in boxes:
            x0, y0, x1, y1 = box.xyxy
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": box.label + 1,
                    "bbox": [round(x0, 2), round(y0, 2), round(x1 - x0, 2), round(y1 - y0, 2)],
                    "area": round(box.area, 1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(class_names(classes))]
    return {"images": images, "annotations": annotations, "categories": categories}


# --- drawing: canvas is float32 [3, size, size] in 0..255, channels first because numpy is faster so --------


def _background(size: int, rng: np.random.Generator) -> Array:
    """Four corner colours blended, soft clouds, and sometimes a faint texture."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    base = rng.uniform(40, 215)
    corners = np.clip(base + rng.normal(0, 28, (3, 2, 2)), 10, 245).astype(np.float32)
    ends = np.stack((1 - ramp, ramp))  # [2, size]
    clouds = rng.normal(0, rng.uniform(3, 14), (6, 6)).astype(np.float32)
    weights = _hat_weights(size, 6)
    canvas = ends.T @ corners @ ends + weights.T @ clouds @ weights
    if rng.random() < 0.3:
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.04, 0.2) * size
        step = 2 * math.pi / period * np.arange(size, dtype=np.float32)
        wave = np.sin(math.cos(angle) * step + math.sin(angle) * step[:, None])
        canvas += wave * np.float32(rng.uniform(3, 14))
    return canvas


@cache
def _hat_weights(size: int, knots: int) -> Array:
    """Linear interpolation from `knots` values to `size` pixels, as a matrix [knots, size]."""
    positions = np.linspace(0, knots - 1, size, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(positions - np.arange(knots, dtype=np.float32)[:, None]))


def _window(size: int, x: float, y: float, reach: float) -> tuple[slice, slice, Array, Array] | None:
    """The part of the canvas within `reach` of (x, y): slices, and pixel centres relative to (x, y)."""
    x0, x1 = max(0, math.floor(x - reach)), min(size, math.ceil(x + reach))
    y0, y1 = max(0, math.floor(y - reach)), min(size, math.ceil(y + reach))
    if x0 >= x1 or y0 >= y1:
        return None
    across = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - x)
    down = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    return slice(y0, y1), slice(x0, x1), across, down


def _blend(patch: Array, color: Array, alpha: Array) -> None:
    """`patch` [3, h, w] becomes `color` (broadcast to it) where `alpha` [h, w] is one."""
    patch += (color - patch) * alpha


def _blob(canvas: Array, rng: np.random.Generator) -> None:
    size = canvas.shape[1]
    radius = rng.uniform(0.05, 0.2) * size
    window = _window(size, rng.uniform(0, size), rng.uniform(0, size), 2.2 * radius)
    if window is None:
        return
    rows, columns, across, down = window
    alpha = np.exp(-(across**2) / radius**2) * np.exp(-(down**2) / radius**2) * np.float32(rng.uniform(0.3, 0.9))
    _blend(canvas[:, rows, columns], _color(rng), alpha)


def _stroke(canvas: Array, owner: NDArray[np.int16] | None, rng: np.random.Generator) -> None:
    """A straight capsule; over objects (`owner` given) it is thin and takes their pixels."""
    size = canvas.shape[1]
    half_length = rng.uniform(0.08, 0.3) * size
    half_width = rng.uniform(0.5, 1.2) if owner is not None else rng.uniform(0.6, 0.025 * size + 1)
    window = _window(size, rng.uniform(0, size), rng.uniform(0, size), half_length + half_width + 1)
    if window is None:
        return
    rows, columns, across, down = window
    angle = rng.uniform(0, math.pi)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    along = np.abs(c * across + s * down) - np.float32(half_length)
    beside = c * down - s * across
    distance = np.sqrt(np.maximum(along, 0) ** 2 + beside**2) - np.float32(half_width)
    alpha = np.clip(0.5 - distance, 0, 1)
    _blend(canvas[:, rows, columns], _color(rng), alpha)
    if owner is not None:
        owner[rows, columns][alpha > 0.5] = -1


Circle = tuple[float, float, float]
"""Centre x, centre y and radius in pixels."""


def _place(size: int, placed: list[Circle], rng: np.random.Generator) -> Circle:
    """A random place and radius. A few tries keep an object from hiding another completely."""
    # A shape fills about 0.9 of its radius: so the longer side runs from about MIN_OBJECT_PX to size / 2.
    low, high = math.log(0.56 * MIN_OBJECT_PX), math.log(0.25 * size)
    radius = math.exp(rng.uniform(low, high))
    margin = 0.35 * radius
    for _ in range(6):
        x, y = (float(value) for value in rng.uniform(margin, size - margin, 2))
        if all(math.hypot(x - px, y - py) > 0.75 * max(radius, r) + 0.15 * min(radius, r) for px, py, r in placed):
            break
    return x, y, radius


def _object(
    canvas: Array,
    owner: NDArray[np.int16],
    index: int,
    shape: str,
    texture: str,
    place: Circle,
    rng: np.random.Generator,
) -> tuple[tuple[float, float, float, float] | None, float, float]:
    """Draw one object. Returns its box inside the image (None if no pixel is), its area there and in all."""
    size = canvas.shape[1]
    x, y, radius = place
    stretch = math.exp(rng.uniform(-0.18, 0.18))
    radius_u, radius_v = radius * stretch, radius / stretch
    # A mild tilt around upright for most objects, any angle for the rest.
    angle = rng.normal(0, 0.35) if rng.random() < 0.6 else rng.uniform(0, 2 * math.pi)
    window = _window(size, x, y, 1.5 * max(radius_u, radius_v) + 1)
    full_area = unit_area(shape) * radius_u * radius_v
    if window is None:
        return None, 0.0, full_area
    rows, columns, across, down = window
    c, s = math.cos(angle), math.sin(angle)
    u = np.float32(c / radius_u) * across + np.float32(s / radius_u) * down
    v = np.float32(c / radius_v) * down - np.float32(s / radius_v) * across
    alpha = np.clip(0.5 - SHAPES[shape](u, v) * np.float32(min(radius_u, radius_v)), 0, 1)

    patch = canvas[:, rows, columns]
    light, dark = _two_colors(canvas[:, min(int(y), size - 1), min(int(x), size - 1)], rng)
    mix = texture_of(texture, u, v, radius, rng)
    shade = 1 + np.float32(rng.uniform(-0.14, 0.14)) * u + np.float32(rng.uniform(-0.14, 0.14)) * v
    _blend(patch, (dark + (light - dark) * mix) * shade, alpha)

    solid = alpha > 0.5
    owner[rows, columns][solid] = index
    if not solid.any():
        return None, 0.0, full_area
    left, right = _extent(alpha.max(axis=0), columns.start)
    top, bottom = _extent(alpha.max(axis=1), rows.start)
    return (left, top, right, bottom), float(alpha.sum()), full_area


def _extent(coverage: Array, start: int) -> tuple[float, float]:
    """Return both ends of an object along one axis, from the largest coverage of each pixel row or column.

    They lie in the outermost pixel that is half covered, or in what the next one outwards still holds.
    """
    inside = np.flatnonzero(coverage > 0.5)
    first, last = int(inside[0]), int(inside[-1])
    before = coverage[first - 1] if first > 0 else 0.0
    after = coverage[last + 1] if last + 1 < len(coverage) else 0.0
    return start + first + 1 - float(coverage[first] + before), start + last + float(coverage[last] + after)


def _color(rng: np.random.Generator) -> Array:
    return rng.uniform(15, 240, (3, 1, 1)).astype(np.float32)


_LUMA = np.array((0.299, 0.587, 0.114), np.float32)


def _two_colors(below: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Two random colours, apart in brightness from each other and visibly apart from what lies below.

    Of a dozen pairs the first that is far enough apart, or else the best of them.
    """
    pairs = rng.uniform(10, 250, (12, 2, 3)).astype(np.float32)
    gap = np.abs((pairs[:, 0] - pairs[:, 1]) @ _LUMA) / 80
    edge = np.abs(pairs - below).max(axis=2).min(axis=1) / 60
    first, second = pairs[np.argmax(np.minimum(np.minimum(gap, edge), 1))]
    return first.reshape(3, 1, 1), second.reshape(3, 1, 1)


# --- classes: pairs of a shape and a texture ---------------------------------------------------------------


def _class_order() -> list[tuple[str, str]]:
    """Shape and texture of every class. Each new shape or texture first appears with the other new one, then
    with all the older ones, so that any first few classes share shapes and textures among them."""
    order: list[tuple[str, str]] = []
    for rank in range(len(CLASS_SHAPES)):
        pairs = [(rank, rank)] + [pair for other in range(rank) for pair in ((rank, other), (other, rank))]
        order += [(CLASS_SHAPES[s], CLASS_TEXTURES[t]) for s, t in pairs if t < len(CLASS_TEXTURES)]
    return order


_CLASSES = _class_order()


def _distractor(classes: int, rng: np.random.Generator) -> tuple[str, str]:
    """A shape and texture that are no class: a class's shape with a foreign texture, a class's texture on a
    foreign shape, or a pair of which each half occurs in some class."""
    shapes = sorted({shape for shape, _ in _CLASSES[:classes]})
    textures = sorted({texture for _, texture in _CLASSES[:classes]})
    unused = [(s, t) for s in shapes for t in textures if (s, t) not in _CLASSES[:classes]]
    choice = rng.random()
    if unused and choice < 0.34:
        return unused[rng.integers(len(unused))]
    if choice < 0.67:
        return shapes[rng.integers(len(shapes))], FOREIGN_TEXTURES[rng.integers(len(FOREIGN_TEXTURES))]
    return FOREIGN_SHAPES[rng.integers(len(FOREIGN_SHAPES))], textures[rng.integers(len(textures))]
