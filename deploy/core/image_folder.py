"""Pictures of a folder: the one search of folders, for conversion, labelling, calibration, checks and measurements.

image_files(Path("data/images"))     # every picture in it and in the folders below, by name
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

from deploy.core.errors import UserError
from deploy.core.storage import is_folder, is_remote, list_files

Item = TypeVar("Item")

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".jpe", ".jfif", ".gif", ".avif", ".jp2", ".pgm", ".ppm"),
)
"""Files that count as images where a folder is searched; lower case. What is read is decided by content."""


def image_files(folder: Path, where: str = "") -> list[Path]:
    """The image files of a folder and of the folders below it, as `find_files`.

    Raises UserError, beginning with `where`, as `find_files`, and when there is none.
    """
    files = find_files(folder, IMAGE_SUFFIXES, where)
    if not files:
        raise UserError(f"{where}{folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return files


def spread(files: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, spread evenly over all, in their order; the same ones every time."""
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def find_files(folder: Path, suffixes: Collection[str], where: str = "", *, dead_links: bool = False) -> list[Path]:
    """The files with one of these endings (lower case) in `folder` and below it, by their names relative to it.

    Links are followed, those to files and those to folders, and keep the name that they have here. A folder that can be
    reached twice is entered once, by its own name before any link, so circles of links end. Names that begin with a dot
    are hidden, and left out: `._a.jpg` of macOS is no picture.

    dead_links: find links to nothing too that are named like what is looked for, for who tells of each file that cannot
    be read.

    Raises UserError, beginning with `where`, when `folder` is none or cannot be read, and for a link to nothing that is
    named like what is looked for (without `dead_links`), or like a folder.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise UserError(f"{where}{folder}: no such folder")
    if is_remote(folder):
        return list_files(folder, suffixes)
    found: list[str] = []
    links = [os.fspath(folder)]
    entered: set[str] = set()
    while links:
        links = sorted(_enter(links.pop(0), entered, found, suffixes, where, dead_links) + links)
    start = os.path.join(os.fspath(folder), "")
    return [Path(name) for name in sorted(found, key=lambda name: name.removeprefix(start).replace(os.sep, "/"))]


def missing(path: Path) -> str:
    """Why nothing can be read at `path`: the file is missing, or is a link to what is missing."""
    return f"a link to {os.readlink(path)}, where nothing is" if path.is_symlink() else "the file is missing"


def _enter(
    top: str, entered: set[str], found: list[str], suffixes: Collection[str], where: str, dead_links: bool
) -> list[str]:
    """Add the files below `top` without following links to folders; those are returned, to be entered later."""
    later: list[str] = []
    folders = [top]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"{where}{folder}: cannot be read: {error.strerror}") from None
        for entry in shown:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif os.path.isdir(entry.path):
                later.append(entry.path)
            elif suffix in suffixes and (os.path.isfile(entry.path) or (dead_links and entry.is_symlink())):
                found.append(entry.path)
            elif not os.path.exists(entry.path) and entry.is_symlink() and (suffix in suffixes or not suffix):
                raise UserError(
                    f"{where}{entry.path}: a link to {os.readlink(entry.path)}, where nothing is; mend it or remove it"
                )
    return later
