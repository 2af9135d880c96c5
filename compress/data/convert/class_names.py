"""The class names of a YOLO data set, and what the file that holds them says about its sets of images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy.core.errors import UserError

FILES = ("data.yaml", "data.yml", "dataset.yaml", "obj.data", "classes.txt", "obj.names", "predefined_classes.txt")
"""Where the names are looked for when they are not given."""
_YAML = (".yaml", ".yml")
_LIKE_A_FILE = (*_YAML, ".txt", ".names", ".data", ".json", ".csv", ".xml", ".labels")


@dataclass(frozen=True)
class Classes:
    """Class names in the order of their numbers.

    file: where they were read; None: they were given as words. base: the folder that `sets` are relative to.
    sets: entries of train, val and test as they are written there. notes: what should be said.
    """

    names: Sequence[str]
    file: Path | None = None
    base: Path = Path()
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def find_classes(given: str | None, source: Path) -> Classes:
    """Classes of `--names`, `a,b,c` or a file; without it, of a file in `source`, or above the `images` it lies in.

    Raises UserError: nothing given and nothing found, a file that is not there or holds no names.
    """
    if given is None:
        for folder in (source, *_above(source)):
            for name in FILES:
                if (folder / name).is_file():
                    found = _read(folder / name, f"{folder / name}")
                    return Classes(
                        found.names, found.file, found.base, found.sets, (f"names: of {folder / name}", *found.notes)
                    )
        raise UserError(
            "--names: yolo files only have class numbers; give the names as a,b,c, or the file that holds them, "
            f"such as data.yaml or classes.txt (none is in {source})"
        )
    path = Path(given)
    if path.is_file() or path.suffix in _LIKE_A_FILE or ("," not in given and ("/" in given or os.sep in given)):
        return _read(path, f"--names: {given}")
    return Classes(_checked([name.strip() for name in given.split(",")], f"--names: {given}"))


# --- details --------------------------------------------------------------------------------------------


def _above(source: Path) -> list[Path]:
    """Folders in which the names of images/train, or train/images, may lie."""
    parents = [Path(os.path.abspath(source)), *Path(os.path.abspath(source)).parents]
    at = next((index for index, folder in enumerate(parents[:3]) if folder.name == "images"), None)
    return [] if at is None else list(parents[at + 1 : at + 3])


def _read(path: Path, where: str) -> Classes:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError):
        kind = "a YAML" if path.suffix in _YAML else "a text"
        raise UserError(f"{where}: not {kind} file in UTF-8") from None
    if path.suffix in _YAML:
        return _data_yaml(path, text, where)
    if path.suffix == ".data":
        return _obj_data(path, text, where)
    if path.suffix in (".json", ".csv", ".xml"):
        raise UserError(f"{where}: names are read from data.yaml, obj.data, or a text file with a name a line")
    return Classes(_checked([line.strip() for line in text.rstrip().split("\n")], where), path, path.parent)


def _data_yaml(path: Path, text: str, where: str) -> Classes:
    try:  # all scalars as text: a class may be called `no` or 2020-01-01
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        raise UserError(f"{where}: not a YAML file in UTF-8") from None
    found = content.get("names") if isinstance(content, dict) else None
    if found is None:
        raise UserError(f"{where}: no key 'names' in it")
    if isinstance(found, dict) and set(found) == {str(number) for number in range(len(found))}:
        found = [found[str(number)] for number in range(len(found))]
    names = _checked(found if isinstance(found, list) else [], where)
    count = content.get("nc")
    if isinstance(count, str) and count.strip().isdecimal() and int(count) != len(names):
        raise UserError(f"{where}: nc is {count}, and there are {len(names)} names; one of them is wrong")
    if "kpt_shape" in content:  # a line of key points cannot be told from a polygon
        raise UserError(f"{where}: kpt_shape: its labels are key points, which are not read; export the set as boxes")
    base, notes = _base(path, content.get("path"))
    return Classes(names, path, base, _sets(content, where), notes)


def _base(path: Path, given: Any) -> tuple[Path, tuple[str, ...]]:
    """The folder that the sets of a data.yaml are relative to: `path`, or where that is not there, the file's own."""
    if not isinstance(given, str) or not given.strip():
        return path.parent, ()
    for folder in (path.parent / given, Path(given)):
        if folder.is_dir():
            return Path(os.path.normpath(folder)), ()
    return path.parent, (f"{path}: path: {given} is not there; its own folder is taken",)


def _sets(content: dict[str, Any], where: str) -> dict[str, list[str]]:
    sets = {}
    for name, keys in {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}.items():
        entry = next((content[key] for key in keys if content.get(key)), None)
        entries = entry if isinstance(entry, list) else [entry] if entry else []
        if not all(isinstance(item, str) and item for item in entries):
            raise UserError(f"{where}: {name}: must be a folder, a text file, or a list of them")
        if entries:
            sets[name] = entries
    return sets


def _obj_data(path: Path, text: str, where: str) -> Classes:
    """`obj.data` of Darknet and CVAT: lines of key = value."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    values = {key.strip(): value.strip() for key, _, value in pairs}
    if not values.get("names"):
        raise UserError(f"{where}: no line 'names = ...' in it")
    file = next((place for place in places(values["names"], path.parent) if place.is_file()), None)
    if file is None:
        raise UserError(f"{where}: names = {values['names']}: there is no such file")
    names = _read(file, str(file)).names
    count = values.get("classes", "")
    if count.isdecimal() and int(count) != len(names):
        raise UserError(f"{where}: classes is {count}, and {file} has {len(names)} names; one of them is wrong")
    return Classes(names, path, path.parent, _sets(values, where))


def places(name: str, *bases: Path) -> list[Path]:
    """Where a path that stands in a list or in data.yaml may lead, most likely first.

    Relative to each of the bases; also without `../`, which Roboflow writes before it, and without `data/`, where
    Darknet's own examples keep everything.
    """
    name = name.replace("\\", "/")
    bare = name
    while bare.startswith(("./", "../")):
        bare = bare.split("/", 1)[1]
    names = list(dict.fromkeys([name, bare, bare.removeprefix("data/")]))
    return [base / each for base in bases for each in names]


def _checked(names: Sequence[Any], where: str) -> list[str]:
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where}: needs names numbered from 0 without a gap, and none empty")
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise UserError(f"{where}: the name {twice!r} is given twice")
    return list(names)
