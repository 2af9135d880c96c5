"""What was read from a foreign layout, and the COCO files that it becomes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from deploy.core.errors import UserError
from deploy.core.files import atomic_path, write_json
from deploy.core.image import image_size
from deploy.validate.coco import NO_NUMBERS

_OTHER_NAMES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}
_SET = re.compile(r"(train|training|val|valid|validation|test|testing)(\d{4})?", re.IGNORECASE)


@dataclass(frozen=True)
class Box:
    """One object. label: place of its class in the list of names. box: x, y, w, h in pixels. crowd: not learned, and
    not counted in evaluation."""

    label: int
    box: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class Picture:
    """An image file with its size in pixels, upright, and its objects."""

    path: Path
    width: int
    height: int
    boxes: Sequence[Box] = ()


@dataclass(frozen=True)
class Source:
    """What a layout holds.

    folder: what the file names of the JSON are relative to, where all images are in it.
    names: the classes, in the order of their categories.
    splits: images by the name of their set; a layout that is not divided has one, called "".
    notes: what was chosen or left out while reading, one line each.
    """

    folder: Path
    names: Sequence[str]
    splits: Mapping[str, Sequence[Picture]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Converted:
    """A file that was written. `file_name`s in it are relative to `image_folder`."""

    out: Path
    images: int
    annotations: int
    image_folder: Path


@dataclass
class _Numbered:
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)


def documents(source: Source, out: Path, split: str | None = None) -> list[tuple[Path, Path, dict[str, Any]]]:
    """Files to write, each with the folder of its images and its content.

    out: a `.json` file takes all images, or those of `split`; any other name is a folder that gets a file for each set,
        `train.json`, `val.json` and so on.

    Raises UserError: no such split, or `out` is a folder and the source is not divided.
    """
    categories = [{"id": number, "name": name} for number, name in enumerate(source.names, start=1)]
    base = _image_folder(source.folder, source.splits)
    chosen = choose(source.splits, out, split, source.folder)
    chosen = {file: list({picture.path: picture for picture in rows}.values()) for file, rows in chosen.items()}
    return [(file, base, _document(pictures, base, categories)) for file, pictures in chosen.items()]


def choose(
    splits: Mapping[str, Sequence[Any]], out: Path, split: str | None, folder: Path
) -> dict[Path, Sequence[Any]]:
    """Which of the sets goes into which file: `out` is one file, or a folder for a file each."""
    known = ", ".join(f"{name} ({len(rows)} images)" for name, rows in splits.items() if name)
    if split is not None and split not in splits:
        raise UserError(
            f"--split: {folder} has no set '{split[:60]}'; " + (f"it has {known}" if known else "it has none")
        )
    chosen = dict(splits) if split is None else {split: splits[split]}
    if out.suffix == ".json":
        return {out: [row for rows in chosen.values() for row in rows]}
    if "" in chosen:
        raise UserError(
            f"{out}: {folder} is not divided into train and val, so it becomes one file: name it, for example "
            f"{out}.json, and divide that with `compress data split`"
        )
    return {out / f"{name}.json": rows for name, rows in chosen.items()}


def write_documents(
    files: Sequence[tuple[Path, Path, dict[str, Any]]], *, allow_empty: bool = False
) -> list[Converted]:
    """Write (file, folder of its images, content), all or none.

    allow_empty: a file without any box is no mistake.

    Raises UserError for a file without boxes.
    """
    for file, _, content in files:
        if not content["annotations"] and not allow_empty:
            raise UserError(
                f"{file}: {len(content['images'])} images, and not one box in all of them; nothing was written "
                "(are the label files where they are looked for? --allow-empty takes images without objects)"
            )
    made = []
    with ExitStack() as stack:
        places = [(stack.enter_context(atomic_path(file)), content) for file, _, content in files]
        for temporary, content in places:
            try:
                write_json(temporary, content)
            except ValueError:
                raise UserError(f"the source of {files[0][0]} {NO_NUMBERS}") from None
    for file, folder, content in files:
        made.append(Converted(file, len(content["images"]), len(content["annotations"]), folder))
    return made


def canonical(name: str) -> str:
    """`train`, `val` or `test` for the other names that these sets have."""
    return _OTHER_NAMES.get(name.lower(), name)


def by_folder(paths: Sequence[Path], source: Path) -> dict[str, list[Path]]:
    """Files by the set that their folder in `source` is called after; all in one, "", where one has no such name."""
    sets: dict[str, list[Path]] = {}
    for path in paths:
        parts = [part for part in path.relative_to(source).parent.parts if part not in ("images", "JPEGImages")]
        match = _SET.fullmatch(parts[0]) if parts else None
        if match is None:
            return {"": list(paths)}
        sets.setdefault(canonical(match[1]), []).append(path)
    return sets


def nearest(paths: Sequence[Path], name: PurePosixPath | Path) -> Path | None:
    """The path that ends most like `name`, folders included; None where several do."""

    def agreeing(path: Path) -> int:
        pairs = zip(reversed(path.parent.parts), reversed(name.parent.parts), strict=False)
        return next((index for index, (one, two) in enumerate(pairs) if one != two), len(name.parent.parts))

    if len(paths) < 2:
        return paths[0] if paths else None
    best = max(agreeing(path) for path in paths)
    nearest = [path for path in paths if agreeing(path) == best]
    return nearest[0] if len(nearest) == 1 else None


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright picture; reads the header only."""
    height, width = image_size(path)
    return width, height


# --- details --------------------------------------------------------------------------------------------


def _document(pictures: Sequence[Picture], base: Path, categories: list[dict[str, Any]]) -> dict[str, Any]:
    rows = _Numbered()
    for picture in pictures:
        name = Path(os.path.relpath(picture.path, base)).as_posix()
        number = len(rows.images) + 1
        rows.images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        for box in picture.boxes:
            rows.annotations.append(
                {
                    "id": len(rows.annotations) + 1,
                    "image_id": number,
                    "category_id": box.label + 1,
                    "bbox": [round(value, 3) for value in box.box],
                    "area": round(box.box[2] * box.box[3], 3),
                    "iscrowd": int(box.crowd),
                }
            )
    return {"images": rows.images, "annotations": rows.annotations, "categories": categories}


def _image_folder(folder: Path, splits: Mapping[str, Sequence[Picture]]) -> Path:
    """`folder`, or the one that holds all of the pictures where some are outside of it."""
    top = os.path.abspath(folder)
    places = {os.path.dirname(os.path.abspath(picture.path)) for rows in splits.values() for picture in rows}
    inside = all(place == top or place.startswith(os.path.join(top, "")) for place in places)
    return folder if inside else Path(os.path.commonpath(list(places)))
