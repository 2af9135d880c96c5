"""Files that are either whole or absent: write to a temporary name, then rename."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError

ONNX_SUFFIX, ENGINE_SUFFIX = ".onnx", ".engine"
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt")
"""Names of exported files end so; `deploy.runtimes.open.RUNNERS` says what runs each."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    The temporary name keeps the suffix, because writers such as ONNX and Pillow look at it.
    The rename is atomic on one file system: a reader sees the old file or the new one, never a part.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = _make_temporary(path, path.parent)
    except OSError as error:  # the user knows `path`, not the temporary name
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600; the renamed file should look like any other
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def need_place(path: Path) -> None:
    """Find out before long work that `atomic_path` will be able to write `path`. Leaves nothing behind.

    Raises UserError when `path` is a folder, lies below a file, or its folder (the nearest one that exists; those below
    will be made) does not take a new file.
    """
    path = Path(path)
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


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and infinity are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_temporary(path: Path, folder: Path) -> tuple[int, str]:
    return tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
