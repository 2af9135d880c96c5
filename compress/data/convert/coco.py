"""COCO files as tools lay them out, to COCO files for a recipe: one a set, whose file names lead to the images.

Understood are Roboflow's folders (`train/_annotations.coco.json` beside its images), `annotations/instances_train.json`
with `images/train`, and a single file with its images beside it or in a folder there, also where its file names are
those of a server, as Label Studio writes them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from compress.data.convert.coco_file import by_folder, canonical, choose, nearest, read_size
from deploy.core.errors import UserError
from deploy.core.image_folder import IMAGE_SUFFIXES, find_files
from deploy.core.shown import some
from deploy.validate.coco import images_without_size, read_annotations

_ROBOFLOW = "_annotations.coco.json"


@dataclass(frozen=True)
class CocoSource:
    """COCO files by the name of their set, "" where there is one alone; `file_name`s are relative to `folder`."""

    folder: Path
    splits: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]


def read_coco(source: Path, images: Path | None = None, *, drop_unused: bool = False) -> CocoSource:
    """Read a COCO file, or the COCO files of a folder, and look for their images.

    Sizes that are missing or null are taken from the images; ids of annotations that are missing or repeat are given
    anew.

    images: the folder of the images. Default: that of the file, with the folders below it.
    drop_unused: leave out categories that no annotation of any set has, such as the root of Roboflow's.

    Raises UserError: no COCO file, sets with different categories, an image that is not there or cannot be read.
    """
    source = Path(source)
    files = _files(source)
    folder = images or (source if source.is_dir() else source.parent)
    contents = {name: read_annotations(file) for name, file in files.items()}
    notes: list[str] = []
    _same_categories(files, contents)
    places: dict[str, list[Path]] = {}
    for path in find_files(folder, IMAGE_SUFFIXES):
        places.setdefault(path.name, []).append(path)
    for name, file in files.items():
        _place_images(file, contents[name], folder, places, notes)
        _number_annotations(file, contents[name], notes)
    if drop_unused:
        notes += _drop_unused(list(contents.values()))
    return CocoSource(folder, contents, notes)


def coco_documents(source: CocoSource, out: Path, split: str | None = None) -> list[tuple[Path, Path, dict[str, Any]]]:
    """Files to write, each with the folder of its images and its content; see `coco_file.write_documents`."""
    sets = {name: content["images"] for name, content in source.splits.items()}
    files = choose(sets, out, split, source.folder)
    if len(files) == 1 and split is None:
        return [(out if out in files else next(iter(files)), source.folder, _together(list(source.splits.values())))]
    names = [split] if split is not None else list(source.splits)
    return [(file, source.folder, dict(source.splits[name])) for file, name in zip(files, names, strict=True)]


# --- details --------------------------------------------------------------------------------------------


def _files(source: Path) -> dict[str, Path]:
    """COCO files by set."""
    if source.is_file():
        return {"": source}
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    files = find_files(source, (".json",))
    if len(files) == 1:
        return {"": files[0]}  # reading it says what is wrong with it
    found = [file for file in files if file.name == _ROBOFLOW]
    sets = by_folder(found, source)
    if found and all(len(rows) == 1 for rows in sets.values()):
        return {name: rows[0] for name, rows in sets.items()}
    found = found or [file for file in files if _is_coco(file)]
    found = [file for file in found if file.name.startswith("instances_")] or found
    if len(found) == 1:
        return {"": found[0]}
    named = {canonical(file.stem.removeprefix("instances_").rstrip("0123456789")): file for file in found}
    if found and len(named) == len(found) and set(named) <= {"train", "val", "test"}:
        return dict(sorted(named.items(), key=lambda item: ("train", "val", "test").index(item[0])))
    if found:
        raise UserError(f"{source}: {len(found)} COCO files, {found[0]} and {found[1]} among them; name one of them")
    raise UserError(f"{source}: no COCO file in it (.json with images, annotations and categories)")


def _is_coco(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    sections = ("images", "annotations", "categories")
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(key), list) for key in sections)
        and (
            not content["annotations"]
            or (isinstance(content["annotations"][0], dict) and "bbox" in content["annotations"][0])
        )
    )


def _same_categories(files: Mapping[str, Path], contents: Mapping[str, Mapping[str, Any]]) -> None:
    named = {name: {row["id"]: row["name"] for row in content["categories"]} for name, content in contents.items()}
    first = next(iter(named))
    for name, categories in named.items():
        if categories != named[first]:
            raise UserError(f"{files[name]}: its categories are not those of {files[first]}; the sets must share them")


def _place_images(
    file: Path, content: dict[str, Any], folder: Path, places: Mapping[str, list[Path]], notes: list[str]
) -> None:
    """Make the file names relative to `folder`, and fill in the sizes."""
    missing, moved = [], []
    unsized = images_without_size(content, str(file))
    for row in content["images"]:
        given = row["file_name"]
        path = _find(given, file, folder, places)
        if path is None:
            missing.append(given)
            continue
        row["file_name"] = Path(os.path.relpath(path, folder)).as_posix()
        if PurePosixPath(given.replace("\\", "/")).name != path.name or not str(path).endswith(given.lstrip("./")):
            moved.append((given, row["file_name"]))
    if missing:
        raise UserError(
            f"{file}: {len(missing)} of its {len(content['images'])} images are not in {folder}, the first is "
            f"{missing[0]!r}; name their folder with --images"
        )
    for row in unsized:
        row["width"], row["height"] = read_size(folder / row["file_name"])
    if moved:
        notes.append(f"{file}: {len(moved)} file names led elsewhere, the first is {moved[0][0]}, now {moved[0][1]}")
    if unsized:
        notes.append(f"{file}: {len(unsized)} images had no size; it was read from their files")


def _find(name: str, file: Path, folder: Path, places: Mapping[str, list[Path]]) -> Path | None:
    for path in (folder / name, file.parent / name):
        if name and path.is_file() and os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), "")):
            return path
    # a server's name: /data/upload/1/a%20b.jpg, /data/local-files/?d=a.jpg, or a path of Windows
    named = PurePosixPath(unquote(name.rpartition("?d=")[2]).replace("\\", "/"))
    set_name = canonical(file.stem.removeprefix("instances_").rstrip("0123456789"))
    found = places.get(named.name, [])
    return nearest(found, named) or nearest(found, PurePosixPath(set_name) / named.name)


def _number_annotations(file: Path, content: dict[str, Any], notes: list[str]) -> None:
    seen: dict[Any, Any] = {}
    once = [
        row
        for row in content["annotations"]
        if "id" not in row or seen.setdefault(row["id"], row) is row or row != seen[row["id"]]
    ]
    copies = len(content["annotations"]) - len(once)
    if copies:
        content["annotations"] = once
        notes.append(f"{file}: {copies} annotations stand in it twice, with one id; the copies are left out")
    ids = [row.get("id") for row in content["annotations"]]
    repeated = sum(count - 1 for key, count in Counter(ids).items() if key is not None)
    absent = ids.count(None)
    if repeated or absent:
        for number, row in enumerate(content["annotations"], start=1):
            row["id"] = number
        notes.append(f"{file}: the ids of annotations were given anew: {repeated} repeated, {absent} were missing")


def _drop_unused(contents: Sequence[dict[str, Any]]) -> list[str]:
    used = {row["category_id"] for content in contents for row in content["annotations"]}
    unused = [row["name"] for row in contents[0]["categories"] if row["id"] not in used]
    for content in contents:
        content["categories"] = [row for row in content["categories"] if row["id"] in used]
    return [f"{len(unused)} categories without boxes are left out: {some(unused)}"] if unused else []


def _together(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One document of several; images and annotations are numbered anew where there are several."""
    if len(contents) == 1:
        return dict(contents[0])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for content in contents:
        numbers = {row["id"]: len(images) + index for index, row in enumerate(content["images"], start=1)}
        images += [{**row, "id": numbers[row["id"]]} for row in content["images"]]
        for row in content["annotations"]:
            image = numbers.get(row["image_id"])
            annotations.append({**row, "id": len(annotations) + 1, "image_id": 0 if image is None else image})
    return {"images": images, "annotations": annotations, "categories": contents[0]["categories"]}
