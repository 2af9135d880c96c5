"""Files that are either whole or absent: write to a temporary name, then rename."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.storage import fetch, is_remote, shown

ONNX_SUFFIX, ENGINE_SUFFIX = ".onnx", ".engine"
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt")
"""Names of exported files end so; `deploy.runtimes.open.RUNNERS` says what runs each."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk answers that takes nothing more: full, quota, size limit, read-only, broken."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    The temporary name keeps the suffix, because writers such as ONNX and Pillow look at it.
    The rename is atomic on one file system: a reader sees the old file or the new one, never a part.

    Raises UserError for a place of what is at an address: it would be written over, or never be there.
    """
    _check_place(path)
    with whole_file(path) as temporary:
        yield temporary


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`atomic_path` for any place, also that of a copy."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = _make_temporary(path, path.parent)
    except OSError as error:  # the user knows `path`, not the temporary name
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600; the renamed file should look like any other
            os.replace(temporary, path)
    except UserError:
        raise
    except Exception as error:
        full = _no_room(error, temporary)
        if full is None:
            raise
        raise OSError(full.errno, full.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def work_folder(place: Path | None = None) -> Iterator[Path]:
    """Yield a hidden folder beside `place` for what is written while that is made, and remove it at the end. None: one
    where temporary files go.

    Raises OSError with the name of the place, or of where temporary files go, when the disk takes nothing more,
    whatever error of a library or program that becomes: some say nothing, and leave half a file that others cannot
    read.
    """
    parent, begins = (None, None) if place is None else (place.parent, f".{place.name}.")
    with tempfile.TemporaryDirectory(dir=parent, prefix=begins) as name:
        folder = Path(name)
        named = folder.parent if place is None else place
        try:
            with naming(named, folder.name):
                yield folder
        except Exception as error:
            files = [path for path in folder.rglob("*") if path.is_file()]
            full = _no_room(error, max(files, key=lambda path: path.stat().st_size, default=folder / "more"))
            if full is None:
                raise
            raise OSError(full.errno, full.strerror, str(named)) from error


@contextmanager
def naming(path: Path, *hidden: str) -> Iterator[None]:
    """Give an error of the disk that is raised in here the name of the file that was written: Python does not, when a
    write and not the opening fails. hidden: what else names of temporary files and folders for it begin with."""
    begins = (f".{path.stem}{_MARK}", *hidden)
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename
        unnamed = name is None or any(part.startswith(begins) for part in Path(os.fsdecode(name)).parts)
        if error.errno in NO_ROOM and unnamed:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def need_place(path: Path) -> None:
    """Find out before long work that `atomic_path` will be able to write `path`. Leaves nothing behind.

    Raises UserError when `path` is a folder, lies below a file, or its folder (the nearest one that exists; those below
    will be made) does not take a new file.
    """
    path = Path(path)
    _check_place(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        handle, name = _make_temporary(path, folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    os.close(handle)
    os.unlink(name)


def need_other(path: Path, source: Path) -> None:
    """Raise UserError where `path` is the file `source` that it is made of, which would be lost."""
    path = Path(path)
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise UserError(f"{path}: is what it is made of; give another name, or it would be lost")


def remove_temporaries(folder: Path, stem: str | None = None) -> None:
    """Remove what killed processes left of `atomic_path` in a folder and below it; of files of this stem alone, if one
    is given. Nobody else may write them now."""
    for path in folder.rglob(f".{'*' if stem is None else glob.escape(stem)}{_MARK}*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and infinity are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with open(fetch(Path(path)), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_place(path: Path) -> None:
    if is_remote(path):
        raise UserError(f"{shown(path)}: is at an address, where --out and --json write, and nothing else")


_MARK = ".partial-"
_TEMPORARY = re.compile(rf"\..*{re.escape(_MARK)}[a-z0-9_]{{8}}(\.[^.]+)?")
"""Names that `_make_temporary` gives, which no file of a user's has by chance."""


def _make_temporary(path: Path, folder: Path) -> tuple[int, str]:
    return tempfile.mkstemp(prefix=f".{path.stem}{_MARK}", suffix=path.suffix, dir=folder)


def _no_room(error: Exception, temporary: Path) -> OSError | None:
    """Whether an error is from the place of a file that takes nothing more: what it answers to a little more than it
    has. Writers in C++ and Rust say "unexpected pos" or the like, without a reason, and NumPy `OSError` without one."""
    if isinstance(error, OSError) and error.errno is not None:
        return None
    try:
        with open(temporary, "ab") as file:
            file.write(bytes(1 << 20))
    except OSError as full:
        return full if full.errno in NO_ROOM else None
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
