"""The label tables of large COCO files, kept on disk: a file is read once, then its columns are mapped into memory.

    tables = label_tables(annotations, images)

An index lies in `$XDG_CACHE_HOME/compress/labels` (~/.cache without it), under the SHA-256 of the file's content, so a
file that is changed has another one, and copies share one. It is a safetensors file of some tenth of the size, and all
processes of a machine share its pages. Pickled, tables are the name of their index, so that a loader's worker maps them
again. One that is damaged is made anew; one that nobody has opened for 30 days is removed when the next one is made. Of
several processes one makes it, and the others wait. Where nothing can be written, the tables are made every time.

Files below SMALLEST are read without an index, and so are those that do not say the size of every image: what their
tables are depends on the images.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from compress.data.digests import PictureDigests
from compress.data.label_tables import LabelTables, plain_tables
from deploy.core.files import atomic_path, sha256_of
from deploy.core.lock import InUse, locked
from deploy.core.storage import fetch, is_remote

SMALLEST = 4 << 20
"""Bytes: the general reader takes less than half a second for that."""
VERSION = 1
"""Of what an index holds; a change gives it another name."""
UNUSED_DAYS = 30
PATIENCE_S = 600
"""So long is waited for another process that makes the same index."""


@dataclass(frozen=True, eq=False)
class MappedTables(LabelTables):
    """Tables that lie in a file."""

    place: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped, (self.place,)


def label_tables(annotations: Path, images: Path) -> LabelTables:
    """The labels of a COCO file. images: the folder of its images, for sizes that it does not say.

    Raises UserError as `compress.data.label_tables.plain_tables`.
    """
    if not _is_large(fetch(annotations)):
        return plain_tables(annotations, images)[0]
    folder = index_folder()
    before = _state(annotations)
    if is_remote(annotations):  # what its server says of it is not what is in it
        digest: str | None = sha256_of(annotations)
    else:
        (digest,) = PictureDigests(folder / "digests.json").of([annotations])
    place = folder / f"{digest}-{VERSION}.safetensors"
    if digest is None:
        return plain_tables(annotations, images)[0]
    until, waited = time.monotonic() + PATIENCE_S, False
    found: LabelTables | None = _checked(place)
    while found is None:
        try:
            with locked(place.with_suffix(".lock"), str(place)):
                found = _checked(place)
                if found is None and not waited:
                    return _made(place, annotations, images, before)
            break  # whoever was waited for has made it, or could not
        except InUse:
            if time.monotonic() > until:
                break
            waited = True
            time.sleep(0.2)
        except OSError:  # there is no place for it
            break
    return found or _read(annotations, images)[0]


def index_folder() -> Path:
    """Where the indices are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "compress" / "labels"


# --- details --------------------------------------------------------------------------------------------

_ABOUT, _SUMS = "about", "crc32"
_PLAIN = ("category_ids", "categories", "unlabeled", "dropped", "notes")
_COLUMNS = tuple(field.name for field in fields(LabelTables) if field.name not in _PLAIN)


def _is_large(annotations: Path) -> bool:
    try:
        return annotations.is_file() and annotations.stat().st_size >= SMALLEST
    except OSError:
        return False


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _made(place: Path, annotations: Path, images: Path, before: tuple[int, int, int] | None) -> LabelTables:
    """Read the file and keep its tables, if it still is what its digest says."""
    tables, keep = _read(annotations, images)
    if not keep or _state(annotations) != before:
        return tables
    try:
        _write(place, tables)
        _remove_unused(place.parent)
        return _mapped(place)
    except OSError:  # the disk is full
        return tables


def _read(annotations: Path, images: Path) -> tuple[LabelTables, bool]:
    """Also whether they may be kept."""
    try:
        from compress.data.quick_tables import Unusual, quick_tables
    except ImportError:  # without msgspec it takes longer
        return plain_tables(annotations, images)
    try:
        return quick_tables(annotations), True
    except (Unusual, OSError):  # the general reader says what is wrong
        return plain_tables(annotations, images)


def _write(place: Path, tables: LabelTables) -> None:
    columns = {name: np.ascontiguousarray(column) for name, column in _columns(tables).items()}
    about: dict[str, Any] = {name: getattr(tables, name) for name in _PLAIN}
    about["dropped"] = list(tables.dropped.items())
    about[_SUMS] = {name: zlib.crc32(column.data) for name, column in columns.items()}
    with atomic_path(place) as temporary:
        save_file(columns, temporary, {_ABOUT: json.dumps(about)})


def _columns(tables: LabelTables) -> dict[str, np.ndarray]:
    return {name: column for name in _COLUMNS if (column := getattr(tables, name)) is not None}


def _mapped(place: Path) -> MappedTables:
    """The tables of an index. Raises OSError, SafetensorError, ValueError, KeyError and TypeError for what is none."""
    return _tables(*_content(place), place)


def _content(place: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(place, framework="pt") as file:
        about = json.loads(file.metadata()[_ABOUT])
        return about, {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118


def _tables(about: dict[str, Any], columns: dict[str, np.ndarray], place: Path) -> MappedTables:
    plain: dict[str, Any] = {name: tuple(about[name]) for name in _PLAIN}
    plain["dropped"] = Counter(dict(about["dropped"]))
    return MappedTables(**plain, **{name: columns.get(name) for name in _COLUMNS}, place=place)  # type: ignore[arg-type]


def _checked(place: Path) -> MappedTables | None:
    """The tables of an index, all of whose bytes are as they were written; None: there is none."""
    try:
        about, columns = _content(place)
        if about[_SUMS] != {name: zlib.crc32(column.data) for name, column in columns.items()}:
            return None
        found = _tables(about, columns, place)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # of another user, or on a disk that is read-only
        os.utime(place)  # it is in use
    return found


def _remove_unused(folder: Path) -> None:
    """Indices, and what killed processes left of one."""
    old = time.time() - UNUSED_DAYS * 24 * 3600
    for file in folder.iterdir():
        with suppress(OSError):
            if file.is_file() and file.stat().st_mtime < old:
                file.unlink()
