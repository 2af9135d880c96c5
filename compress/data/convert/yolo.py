"""YOLO text labels: one `.txt` an image with `class cx cy w h` a line, in shares of the image's width and height; of a
polygon, `class x1 y1 x2 y2 x3 y3 …`, the box around it.

Understood are the layouts of Ultralytics (`images/train` with `labels/train`, or `train/images` with `train/labels`;
`data.yaml`), of Darknet and CVAT (`obj.data`, lists of images), and labels beside the images.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.data.convert.class_names import FILES, Classes, find_classes, places
from compress.data.convert.coco_file import Box, Picture, Source, by_folder, read_size
from deploy.core.errors import UserError
from deploy.core.image_folder import find_files, image_files, missing

TOLERANCE = 1e-3
"""Shares may leave 0..1 by this much: what tools round. Boxes that reach out so little are cut."""
_NO_LABELS = (*FILES, "train.txt", "val.txt", "valid.txt", "test.txt")


def read_yolo(source: Path, names: str | None = None) -> Source:
    """Read a folder, or a data.yaml or obj.data with all that it names. Class number i is `names[i]`.

    The label file of an image lies beside it, or under `labels` where the image is under `images`. An image without one
    has no objects.

    names: `a,b,c`, or a file with the names; None: of a file in the folder.

    Raises:
        UserError: no images, a bad line (file:line), a label file without image, an image with two label files, an
            unreadable image.
    """
    source = Path(source)
    if source.is_file() and source.suffix not in (".yaml", ".yml", ".data"):
        raise UserError(f"{source}: is a file; give the folder of the images, a data.yaml or an obj.data")
    if source.is_file():
        source, names = source.parent, str(source) if names is None else names
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    try:
        classes = find_classes(names, source)
    except UserError:
        if names is None:
            image_files(source)  # a folder of labels has neither: that it has no images says more
        raise
    reader = _Reader(source, classes.names)
    notes = list(classes.notes)
    if _sets_are_of(classes, source):
        sets = {name: _of_set(name, entries, classes, notes) for name, entries in classes.sets.items()}
        splits = {name: reader.pictures(paths) for name, paths in sets.items() if paths}
        notes += _in_two_sets(sets)
    else:
        paths = image_files(source)
        splits = {name: reader.pictures(rows) for name, rows in by_folder(paths, source).items()}
        reader.refuse_orphans()
    return Source(source, classes.names, splits, [*notes, *reader.notes()])


# --- which images --------------------------------------------------------------------------------------


def _sets_are_of(classes: Classes, source: Path) -> bool:
    """Whether the sets that stand beside the names are those of `source`: it holds that file, or the sets."""
    if not classes.sets or classes.file is None:
        return False
    top = os.path.abspath(source)
    holds = [os.path.abspath(classes.file.parent), os.path.abspath(classes.base)]
    return any(place == top or place.startswith(os.path.join(top, "")) for place in holds)


def _of_set(name: str, entries: Sequence[str], classes: Classes, notes: list[str]) -> list[Path]:
    """The images of a set: of folders, of text files that list them, or listed one by one."""
    assert classes.file is not None
    paths: list[Path] = []
    for entry in entries:
        there = [place for place in places(entry, classes.base, classes.file.parent) if place.exists()]
        if not there and name == "test":
            notes.append(f"{classes.file}: test: {entry} is not there; it is left out")
        elif not there:
            raise UserError(f"{classes.file}: {name}: {entry} is not there (looked in {classes.base})")
        elif there[0].is_dir():
            paths += image_files(Path(os.path.normpath(there[0])), f"{classes.file}: {name}: ")
        elif there[0].suffix.lower() == ".txt":
            paths += _listed(there[0], classes.base)
        else:
            paths.append(there[0])
    return list(dict.fromkeys(paths))


def _listed(file: Path, base: Path) -> list[Path]:
    """The images that a text file names, one a line."""
    found, absent = [], []
    lines = [(number, line.strip()) for number, line in enumerate(_lines(file), start=1) if line.strip()]
    for number, line in lines:
        there = [place for place in places(line, file.parent, base, Path()) if place.is_file()]
        found += [Path(os.path.normpath(place)) for place in there[:1]]
        absent += [] if there else [(number, line)]
    if absent:
        number, line = absent[0]
        raise UserError(
            f"{file}:{number}: there is no image {line!r}; {len(absent)} of the {len(lines)} listed are not there "
            "(was the set exported without its images?)"
        )
    return found


def _in_two_sets(sets: dict[str, list[Path]]) -> list[str]:
    names = list(sets)
    pairs = [(one, two) for index, one in enumerate(names) for two in names[index + 1 :]]
    common = [(one, two, len(set(sets[one]) & set(sets[two]))) for one, two in pairs]
    return [f"{count} images are in {one} and in {two}" for one, two, count in common if count]


# --- labels --------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Reads the label files of images, and counts what is to be said about them."""

    folder: Path
    names: Sequence[str]
    read: int = 0
    without: list[Path] = field(default_factory=list)
    images_of: dict[Path, Path] = field(default_factory=dict)
    """The image of each label file that was used."""
    polygons: list[str] = field(default_factory=list)
    """Where the lines stand that are polygons."""
    twice: list[tuple[Path, Path, Path]] = field(default_factory=list)

    def pictures(self, paths: Iterable[Path]) -> list[Picture]:
        return [self._picture(path) for path in paths]

    def _picture(self, path: Path) -> Picture:
        width, height = read_size(path)
        label_file = _label_file(path, self.folder)
        self.read += 1
        if label_file is None:
            self.without.append(path)
            return Picture(path, width, height)
        other = self.images_of.setdefault(label_file, path)
        if other != path:
            self.twice.append((label_file, other, path))
        boxes = []
        for number, line in enumerate(_lines(label_file), start=1):
            if line.strip():
                where = f"{label_file}:{number}"
                label, shares = parse_line(line, len(self.names), where)
                self.polygons += [where] if len(line.split()) > 5 else []
                boxes.append(Box(label, _in_pixels(shares, width, height)))
        return Picture(path, width, height, boxes)

    def refuse_orphans(self) -> None:
        """Raise UserError for a label file whose image is not there."""
        looked_in = {file.parent for file, image in self.images_of.items() if file.parent != image.parent}
        if (self.folder / "labels").is_dir():
            looked_in.add(self.folder / "labels")
        files = {file for folder in sorted(looked_in) for file in find_files(folder, (".txt",))}
        known = {os.path.realpath(file) for file in self.images_of}
        left = [file for file in sorted(files) if os.path.realpath(file) not in known and file.name not in _NO_LABELS]
        if left:
            more = f" (one of {len(left)} such files)" if len(left) > 1 else ""
            raise UserError(f"{left[0]}: there is no image of this name{more}; remove the file or add the image")

    def notes(self) -> list[str]:
        notes = []
        if self.without and len(self.without) < self.read:
            notes.append(
                f"{len(self.without)} of {self.read} images have no label file and count as images without objects, "
                f"the first is {self.without[0]}"
            )
        if self.polygons:
            notes.append(
                f"{len(self.polygons)} labels are polygons, of which the box around them is taken; the first is "
                f"{self.polygons[0]}"
            )
        if self.twice:
            file, one, two = self.twice[0]
            notes.append(f"{len(self.twice)} label files belong to two images each, the first is {file}: {one}, {two}")
        return notes


def _label_file(image: Path, folder: Path) -> Path | None:
    """The label file of an image: beside it, or with `labels` in the place of `images` in its path."""
    beside = image.with_suffix(".txt")
    apart = next((file for file in _under_labels(image, folder) if _is_there(file)), None)
    if apart is None or not _is_there(beside):
        return apart or (beside if beside.is_file() else None)
    if apart.read_bytes() != beside.read_bytes():
        raise UserError(f"{image}: has two label files that differ, {apart} and {beside}; remove one of them")
    return apart


def _is_there(file: Path) -> bool:
    if file.is_file():
        return True
    if file.is_symlink():
        raise UserError(f"{file}: {missing(file)}; mend it or remove it")
    return False


def _under_labels(image: Path, folder: Path) -> Iterator[Path]:
    """Where the label file of an image may lie: for its name as it was given, in full, and without links. Of several
    folders `images` in it the last one counts, then those within `folder`."""
    for path in (image, Path(os.path.abspath(image)), Path(os.path.realpath(image))):
        parts = path.with_suffix(".txt").parts
        spots = [index for index, part in enumerate(parts[:-1]) if part == "images"]
        for index in reversed(spots):
            if index == spots[-1] or (path == image and index >= len(folder.parts)):
                yield Path(*parts[:index], "labels", *parts[index + 1 :])


def parse_line(line: str, classes: int, where: str) -> tuple[int, tuple[float, float, float, float]]:
    """Class number and (cx, cy, w, h) of a line, of a polygon those of the box around it. Raises UserError, beginning
    with `where`."""
    fields = line.split()
    polygon = len(fields) > 6 and len(fields) % 2 == 1
    if len(fields) != 5 and not polygon:
        hint = ""
        if len(fields) == 6:
            hint = "; a sixth, such as the score of a prediction, has no place in a label"
        elif len(fields) > 6:
            hint = "; turned boxes with an angle and key points are not boxes, export the set as boxes"
        raise UserError(f"{where}: expected `class cx cy w h`, found {len(fields)} fields{hint}")
    try:
        number = float(fields[0])
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise UserError(f"{where}: the class must be an integer, found {fields[0]!r}")
    label = int(number)
    if not 0 <= label < classes:
        raise UserError(f"{where}: class {label} has no name; {classes} names were given (0..{classes - 1})")
    try:
        numbers = [float(field) for field in fields[1:]]
    except ValueError:
        what = "the polygon must be" if polygon else "the box must be four"
        raise UserError(f"{where}: {what} numbers, found {' '.join(fields[1:])!r}") from None
    cx, cy, w, h = _around(numbers) if polygon else numbers
    # not (…): NaN is neither inside nor outside
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in (*numbers, cx, cy, w, h)) or w <= 0 or h <= 0:
        raise UserError(f"{where}: the box must be shares of the image in (0, 1], found {line.strip()!r}")
    return label, (cx, cy, w, h)


def _around(polygon: Sequence[float]) -> tuple[float, float, float, float]:
    """(cx, cy, w, h) of the box around x1, y1, x2, y2, …"""
    (low_x, high_x), (low_y, high_y) = ((min(ends), max(ends)) for ends in (polygon[::2], polygon[1::2]))
    return (low_x + high_x) / 2, (low_y + high_y) / 2, high_x - low_x, high_y - low_y


def _in_pixels(shares: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """(x, y, w, h) in pixels; what rounding put outside of the image is cut off."""
    cx, cy, w, h = shares
    low_x, high_x = _cut(cx - w / 2, cx + w / 2)
    low_y, high_y = _cut(cy - h / 2, cy + h / 2)
    return low_x * width, low_y * height, (high_x - low_x) * width, (high_y - low_y) * height


def _cut(low: float, high: float) -> tuple[float, float]:
    """Ends of a box, in shares: what is out of 0..1 by no more than TOLERANCE is not out of it."""
    ends = [0.0 if -TOLERANCE <= end < 0 else 1.0 if 1 < end <= 1 + TOLERANCE else end for end in (low, high)]
    return ends[0], ends[1]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
