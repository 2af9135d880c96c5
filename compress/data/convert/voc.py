"""Pascal VOC: an XML file an image.

VOC itself counts pixels from 1 and includes the last: xmin 1, xmax 2 is two pixels wide. datumaro, CVAT, FiftyOne and
Label Studio write the same tags with coordinates from 0, where xmax is the edge: xmin 0, xmax 2. Nothing in a file says
which. A coordinate of 0 proves the second, because VOC has none; xmax equal to the width fits both. So without such a
proof the first is taken, and what was taken is said, with the reason.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.parsers import expat

from compress.data.convert.coco_file import Box, Picture, Source, by_folder, canonical, nearest, read_size
from deploy.core.errors import UserError
from deploy.core.image_folder import IMAGE_SUFFIXES, find_files

_LABEL_FOLDERS = ("annotations", "labels")
"""Folders of XML files, in any case; the pictures lie elsewhere below the folder that holds them."""


def read_voc(source: Path, first_pixel: int | None = None) -> Source:
    """Read a folder with its XML files, in `Annotations/`, `labels/` or anywhere below it, and its images.

    The classes are the names found, alphabetically. `ImageSets/Main/*.txt` divides the images into sets. Objects marked
    `difficult` become crowd regions: not learned, and not counted in evaluation.

    first_pixel: 1: coordinates count pixels from 1, as VOC's do; 0: they are edges from 0; None: decide, and say so.

    Raises:
        UserError: no XML files, bad XML or a bad value (file:line), a missing or unreadable image, an image that two
            files claim.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folder, labels = _folders(folder)
    files = find_files(labels, (".xml",))
    if not files:
        raise UserError(f"{labels}: no .xml files in it")
    documents = [(file, _parse_xml(file)) for file in files]
    objects = {file: [_object(file, node) for node in root.all("object")] for file, root in documents}
    names = sorted({found.name for rows in objects.values() for found in rows})
    if not names:
        raise UserError(f"{labels}: no file holds an object, so there are no classes")
    notes: list[str] = []
    first = _first_pixel(documents, objects, first_pixel, notes)
    pictures: dict[Path, Picture] = {}
    images = _pictures_of(folder)
    other_size: list[str] = []
    for (file, root), path in zip(documents, _images(documents, images, folder, notes), strict=True):
        width, height = read_size(path)
        boxes = [Box(names.index(found.name), found.pixels(first), found.difficult) for found in objects[file]]
        pictures[path] = Picture(path, width, height, boxes)
        said = _size(root)
        if said is not None and said != (width, height):
            other_size.append(f"{file} says {said[0]}x{said[1]}, {path.name} is {width}x{height}")
    if other_size:
        notes.append(f"{len(other_size)} files say another size than their image has, the first: {other_size[0]}")
    splits = _sets(folder, images, pictures, notes)
    return Source(folder, names, splits, notes)


# --- which files ---------------------------------------------------------------------------------------


def _folders(source: Path) -> tuple[Path, Path]:
    """(folder of everything, folder of the XML files)."""
    inside = [item for item in sorted(source.iterdir()) if item.name.lower() in _LABEL_FOLDERS and item.is_dir()]
    labels = next((item for item in inside if find_files(item, (".xml",))), None)
    if labels is not None:
        return source, labels
    full = Path(os.path.abspath(source))
    if full.name.lower() in _LABEL_FOLDERS and not find_files(source, IMAGE_SUFFIXES):
        return (source.parent if source.name == full.name else full.parent), source
    return source, source


def _pictures_of(folder: Path) -> list[Path]:
    """The images below a folder, without VOC's masks, which have their names."""
    masks = {"segmentationclass", "segmentationobject"}
    files = find_files(folder, IMAGE_SUFFIXES)
    return [file for file in files if not masks & {part.lower() for part in file.relative_to(folder).parts}]


def _images(
    documents: Sequence[tuple[Path, _Node]], images: Sequence[Path], folder: Path, notes: list[str]
) -> list[Path]:
    """The image of each XML file: the one it names, or the one called like itself.

    Where two files name one image, each takes the one called like itself. Raises UserError where there is none, or
    where two files are left with one.
    """
    search = _Search(images)
    chosen = [_image(file, root, folder, search) for file, root in documents]
    claims = Counter(chosen)
    for index, (file, _) in enumerate(documents):
        own = search.like(file, folder)
        if claims[chosen[index]] > 1 and own is not None:
            chosen[index] = own
    owner: dict[Path, Path] = {}
    for path, (file, _) in zip(chosen, documents, strict=True):
        other = owner.setdefault(path, file)
        if other != file:
            raise UserError(f"{file}: {other} names the same image, {path}; one image has one file")
    pairs = [(file, path) for path, (file, _) in zip(chosen, documents, strict=True)]
    renamed = [(file, path) for file, path in pairs if file.stem not in (path.stem, path.name)]
    if renamed:
        file, path = renamed[0]
        notes.append(
            f"{len(renamed)} XML files name an image that is not called like themselves, the first is {file}: {path}"
        )
    return chosen


class _Search:
    """Images by name, and by name without suffix."""

    def __init__(self, images: Iterable[Path]) -> None:
        self.named: dict[str, list[Path]] = {}
        self.stems: dict[str, list[Path]] = {}
        for path in images:
            self.named.setdefault(path.name, []).append(path)
            self.stems.setdefault(path.stem, []).append(path)

    def like(self, file: Path, folder: Path) -> Path | None:
        """The image called like an XML file, nearest to its place; None: there is none, or several as near."""
        named = self.named.get(file.stem) or self.stems.get(file.stem, [])  # a.jpg.xml, a.xml
        return nearest(named, file.relative_to(folder))


def _image(file: Path, root: _Node, folder: Path, search: _Search) -> Path:
    node = root.first("filename")
    given = node.text.strip() if node is not None else ""
    named = PurePosixPath(given.replace("\\", "/"))
    found = search.named.get(named.name, []) if given else []
    # Tools often rename the image and not the field inside: the XML's own name comes after what it says.
    path = nearest(found, named) or nearest(found, file.relative_to(folder)) or _by_path(root)
    if path is None and not found:
        path = search.like(file, folder)
        found = search.stems.get(file.stem, [])
    if path is not None:
        return path
    line = root.line if node is None else node.line
    if found:
        raise UserError(
            f"{file}:{line}: {len(found)} images have this name, {found[0]} and {found[1]}; keep one of them"
        )
    raise UserError(f"{file}:{line}: no image {given or file.stem!r} in {folder}")


def _by_path(root: _Node) -> Path | None:
    node = root.first("path")
    path = Path(node.text.strip()) if node is not None and node.text.strip() else None
    return path if path is not None and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() else None


def _size(root: _Node) -> tuple[int, int] | None:
    """(width, height) as the file says; None where it does not, or says 0."""
    node = root.first("size")
    values = [] if node is None else [child.text.strip() for tag in ("width", "height") for child in node.all(tag)]
    if len(values) != 2 or not all(value.isdecimal() and int(value) for value in values):
        return None
    return int(values[0]), int(values[1])


def _sets(
    folder: Path, images: Sequence[Path], pictures: dict[Path, Picture], notes: list[str]
) -> dict[str, list[Picture]]:
    """The sets of `ImageSets/Main`, or all in one. An image that a set lists and that has no XML has no objects."""
    lists = folder / "ImageSets" / "Main"
    found = {canonical(file.stem): _members(file) for file in find_files(lists, (".txt",))} if lists.is_dir() else {}
    found = {name: members for name, members in found.items() if members}
    if {"train", "val"} <= set(found):
        found.pop("trainval", None)  # both of them once more
    named = {path.relative_to(folder).with_suffix("").as_posix(): path for path in images}
    known = _Search(pictures).stems  # an image with objects comes before another of its name
    stems = {**_Search(images).stems, **known}
    sets: dict[str, list[Picture]] = {}
    for name, members in found.items():
        rows = []
        for member in members:
            if PurePosixPath(member).suffix.lower() in IMAGE_SUFFIXES:
                member = member[: -len(PurePosixPath(member).suffix)]
            path = nearest(stems.get(PurePosixPath(member).name, []), PurePosixPath(member)) or named.get(member)
            if path is None:
                raise UserError(f"{lists / name}.txt: there is no image of the name {member!r}")
            rows.append(pictures.get(path) or Picture(path, *read_size(path)))
        sets[name] = rows
    if not sets:
        left = [path for path in images if path not in pictures]
        if left:
            notes.append(f"{len(left)} images have no XML file and are left out, the first is {left[0]}")
        return {name: [pictures[path] for path in rows] for name, rows in by_folder(list(pictures), folder).items()}
    listed = {picture.path for rows in sets.values() for picture in rows}
    rest = [picture for path, picture in pictures.items() if path not in listed]
    if rest:
        notes.append(f"{len(rest)} images stand in no file of {lists}; they are the set `rest`")
        sets["rest"] = rest
    return sets


def _members(file: Path) -> list[str]:
    """Names in a list of images; none of the lists of one class, which say 1 or -1 after each name."""
    try:
        rows = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of images: {error}") from None
    if rows and all(len(row) > 1 and row[-1] in ("1", "-1", "0") for row in rows):
        return []
    return list(dict.fromkeys(" ".join(row) for row in rows))


# --- boxes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    """An object as it is written: corners (xmin, ymin, xmax, ymax), and its line."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool
    line: int

    def pixels(self, first: int) -> tuple[float, float, float, float]:
        """(x, y, w, h) in pixels, for coordinates that count from `first`."""
        xmin, ymin, xmax, ymax = self.corners
        x, y = max(0.0, xmin - first), max(0.0, ymin - first)
        return x, y, xmax - x, ymax - y


def _first_pixel(
    documents: Sequence[tuple[Path, _Node]],
    objects: dict[Path, list[_Object]],
    given: int | None,
    notes: list[str],
) -> int:
    """From which number the coordinates count, and a note why."""
    zero = [(file, found) for file, rows in objects.items() for found in rows if 0 <= min(found.corners[:2]) < 1]
    count = sum(map(len, objects.values()))
    proof = ""
    if zero:
        file, found = zero[0]
        proof = f"{len(zero)} of {count} boxes have an xmin or ymin below 1, the first in {file}:{found.line}"
    if given is not None:
        if given == 1 and zero:
            notes.append(
                f"coordinates count from 1, as --first-pixel says, although {proof}: those begin at the border"
            )
        return given
    named = next((file for file, root in documents if _is_of_label_studio(root)), None)
    if named is not None and not zero:
        notes.append(f"coordinates count from 0, because {named} is of Label Studio (--first-pixel 1 if that is wrong)")
        return 0
    if zero:
        ones = sum(min(found.corners[:2]) == 1 for rows in objects.values() for found in rows)
        doubt = f", although {ones} begin at 1" if ones > len(zero) else ""
        notes.append(f"coordinates count from 0: {proof}{doubt} (--first-pixel 1 if those are mistakes)")
        return 0
    notes.append(
        "coordinates count from 1, as VOC's do: no box has an xmin or ymin of 0, which would show another rule "
        "(--first-pixel 0 for files of CVAT, datumaro or FiftyOne)"
    )
    return 1


def _is_of_label_studio(root: _Node) -> bool:
    owner = root.first("owner")
    name = None if owner is None else owner.first("name")
    return name is not None and name.text.strip() == "Label Studio"


# --- XML -----------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """An XML element that remembers its line; the standard library's tree does not."""

    tag: str
    line: int
    text: str
    children: list[_Node]

    def all(self, tag: str) -> list[_Node]:
        return [child for child in self.children if child.tag == tag]

    def first(self, tag: str) -> _Node | None:
        return next(iter(self.all(tag)), None)


def _parse_xml(file: Path) -> _Node:
    top = _Node("", 1, "", [])
    stack = [top]
    parser = expat.ParserCreate()

    def start(tag: str, _: dict[str, str]) -> None:
        node = _Node(tag, parser.CurrentLineNumber, "", [])
        stack[-1].children.append(node)
        stack.append(node)

    def text(data: str) -> None:
        stack[-1].text += data

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    try:
        parser.Parse(file.read_bytes(), True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except expat.ExpatError as error:
        raise UserError(f"{file}:{error.lineno}: not valid XML: {expat.ErrorString(error.code)}") from None
    root = top.children[0]
    if root.tag != "annotation":
        raise UserError(f"{file}:{root.line}: a VOC file starts with <annotation>, found <{root.tag}>")
    return root


def _object(file: Path, node: _Node) -> _Object:
    name = node.first("name")
    if name is None or not name.text.strip():
        raise UserError(f"{file}:{node.line}: the object has no <name>")
    box = node.first("bndbox")
    if box is None:
        raise UserError(f"{file}:{node.line}: the object has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(file, box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if xmax < xmin or ymax < ymin:
        raise UserError(f"{file}:{box.line}: the box has corners swapped: x {xmin:g}..{xmax:g}, y {ymin:g}..{ymax:g}")
    difficult = node.first("difficult")
    marked = difficult is not None and difficult.text.strip() == "1"
    return _Object(name.text.strip(), (xmin, ymin, xmax, ymax), marked, node.line)


def _number(file: Path, box: _Node, tag: str) -> float:
    node = box.first(tag)
    if node is None:
        raise UserError(f"{file}:{box.line}: the box has no <{tag}>")
    try:
        value = float(node.text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{file}:{node.line}: <{tag}> must be a number, found {node.text.strip()!r}")
    return value
