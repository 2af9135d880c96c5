"""YOLO text folders and Pascal VOC to COCO JSON. Images stay where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

from deploy.core.errors import UserError
from deploy.core.files import write_json
from deploy.core.image import IMAGE_SUFFIXES, image_size


@dataclass(frozen=True)
class Converted:
    """Result of a conversion. `file_name`s in the JSON are relative to `image_folder`."""

    images: int
    annotations: int
    image_folder: Path


def from_yolo(folder: Path, names: Sequence[str], out: Path) -> Converted:
    """Convert YOLO labels to the COCO file `out`; class number i becomes category id i + 1.

    A label file has one `class cx cy w h` per line, in shares of the image's width and height. It lies beside
    its image, or in `labels/…` where the image is in `images/…`. An image without one has no objects.

    Raises:
        UserError: no images, a bad line (file:line), a label file without image, an unreadable image.
    """
    folder = _folder(folder)
    if not names:
        raise UserError("names: give the class names in the order of their numbers")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
    writer = _CocoWriter(folder, list(names))
    used: set[Path] = set()
    for path in paths:
        height, width = image_size(path)
        writer.add_image(path, width, height)
        label_file = _yolo_label_file(path, folder)
        if label_file is None:
            continue
        used.add(label_file)
        for number, line in enumerate(_lines(label_file), start=1):
            if line.strip():
                label, (cx, cy, w, h) = _yolo_line(line, len(names), f"{label_file}:{number}")
                box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
                writer.add_box(label, box, crowd=False)
    for label_file in sorted((folder / "labels").rglob("*.txt")) if (folder / "labels").is_dir() else ():
        if label_file not in used and label_file.name != "classes.txt":
            raise UserError(f"{label_file}: there is no image of this name; remove the file or add the image")
    return writer.write(out)


def from_voc(folder: Path, out: Path) -> Converted:
    """Convert Pascal VOC XML to the COCO file `out`. Categories are the names found, alphabetically.

    Reads `Annotations/*.xml` (or `*.xml` in `folder`); images are in `JPEGImages/`, `images/` or beside it.
    VOC counts pixels from 1 and includes the last: xmin 1, xmax 2 is two pixels wide. Objects marked
    `difficult` become crowd regions: not learned, and not counted in evaluation.

    Raises:
        UserError: no XML files, bad XML or a bad value (file:line), a missing or unreadable image.
    """
    folder = _folder(folder)
    source = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    files = sorted(source.glob("*.xml"))
    if not files:
        raise UserError(f"{source}: no .xml files in it")
    documents = [(file, _parse_xml(file)) for file in files]
    objects = {file: [_voc_object(file, node) for node in root.all("object")] for file, root in documents}
    names = sorted({name for rows in objects.values() for name, _, _ in rows})
    if not names:
        raise UserError(f"{source}: no file holds an object, so there are no classes")
    writer = _CocoWriter(folder, names)
    for file, root in documents:
        path = _voc_image(file, root, folder)
        height, width = image_size(path)
        writer.add_image(path, width, height)
        for name, (xmin, ymin, xmax, ymax), difficult in objects[file]:
            x, y = max(0.0, xmin - 1), max(0.0, ymin - 1)
            writer.add_box(names.index(name), [x, y, xmax - x, ymax - y], crowd=difficult)
    return writer.write(out)


# --- COCO -----------------------------------------------------------------------------------------------


class _CocoWriter:
    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder = folder
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]

    def add_image(self, path: Path, width: int, height: int) -> None:
        name = path.relative_to(self._folder).as_posix()
        self._images.append({"id": len(self._images) + 1, "file_name": name, "width": width, "height": height})

    def add_box(self, label: int, box: list[float], crowd: bool) -> None:
        """A box (x, y, w, h in pixels) of the image added last."""
        annotation = {
            "id": len(self._annotations) + 1,
            "image_id": len(self._images),
            "category_id": label + 1,
            "bbox": [round(value, 3) for value in box],
            "area": round(box[2] * box[3], 3),
            "iscrowd": int(crowd),
        }
        self._annotations.append(annotation)

    def write(self, out: Path) -> Converted:
        document = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        write_json(Path(out), document)
        return Converted(len(self._images), len(self._annotations), self._folder)


def _folder(folder: Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return folder


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None


# --- YOLO -----------------------------------------------------------------------------------------------


def _yolo_label_file(image: Path, folder: Path) -> Path | None:
    parts = image.relative_to(folder).with_suffix(".txt").parts
    candidates = [image.with_suffix(".txt")]
    candidates += [
        folder.joinpath(*parts[:i], "labels", *parts[i + 1 :]) for i, part in enumerate(parts) if part == "images"
    ]
    if folder.name == "images":
        candidates.append(folder.parent.joinpath("labels", *parts))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _yolo_line(line: str, classes: int, where: str) -> tuple[int, tuple[float, float, float, float]]:
    fields = line.split()
    if len(fields) != 5:
        hint = " (polygons are not supported)" if len(fields) > 6 else ""
        raise UserError(f"{where}: expected `class cx cy w h`, found {len(fields)} fields{hint}")
    try:
        label = int(fields[0])
    except ValueError:
        raise UserError(f"{where}: the class must be an integer, found {fields[0]!r}") from None
    if not 0 <= label < classes:
        raise UserError(f"{where}: class {label} has no name; {classes} names were given (0..{classes - 1})")
    try:
        cx, cy, w, h = (float(field) for field in fields[1:])
    except ValueError:
        raise UserError(f"{where}: the box must be four numbers, found {' '.join(fields[1:])!r}") from None
    # not (…): NaN is neither inside nor outside
    if not all(0 <= value <= 1 for value in (cx, cy, w, h)) or w == 0 or h == 0:
        raise UserError(f"{where}: the box must be shares of the image in (0, 1], found {line.strip()!r}")
    return label, (cx, cy, w, h)


# --- VOC ------------------------------------------------------------------------------------------------


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


def _voc_object(file: Path, node: _Node) -> tuple[str, tuple[float, float, float, float], bool]:
    name = node.first("name")
    if name is None or not name.text.strip():
        raise UserError(f"{file}:{node.line}: the object has no <name>")
    box = node.first("bndbox")
    if box is None:
        raise UserError(f"{file}:{node.line}: the object has no <bndbox>")
    xmin, ymin, xmax, ymax = (_voc_number(file, box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if xmax < xmin or ymax < ymin:
        raise UserError(f"{file}:{box.line}: the box has corners swapped: x {xmin:g}..{xmax:g}, y {ymin:g}..{ymax:g}")
    difficult = node.first("difficult")
    return (
        name.text.strip(),
        (xmin, ymin, xmax, ymax),
        difficult is not None and difficult.text.strip() == "1",
    )


def _voc_number(file: Path, box: _Node, tag: str) -> float:
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


def _voc_image(file: Path, root: _Node, folder: Path) -> Path:
    node = root.first("filename")
    given = Path(node.text.strip()).name if node is not None and node.text.strip() else ""
    # Tools often rename the image and not the field inside: the XML's own name comes second.
    names = ([given] if given else []) + [file.stem + suffix for suffix in IMAGE_SUFFIXES]
    for name in names:
        for parent in (folder / "JPEGImages", folder / "images", file.parent):
            if (parent / name).is_file():
                return parent / name
    line = root.line if node is None else node.line
    raise UserError(f"{file}:{line}: no image {given or file.stem!r} in JPEGImages/, images/ or beside the XML")
