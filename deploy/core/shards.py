"""Pictures in tar files: where each member lies, found once and kept, so that any is read alone.

    images/train-{000..099}.tar      # a hundred files, as WebDataset numbers them
    images/*.tar                     # those of a folder

Members are called by their names in the files, as a COCO file's `file_name` says. Tar files at an address are copied
into the cache when the first member is wanted; where the disk has no room for one, it is read once from end to end for
its index, and a member is then a request for a range of bytes.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deploy.core import remote
from deploy.core.errors import UserError, first_line
from deploy.core.files import atomic_path, whole_file, write_json
from deploy.core.storage import TAR, Missing, address_of, cache_folder, place, place_of_tar

ROOM = 1 << 30
"""Bytes that a copy of a tar file leaves free on the disk."""
FETCHED_TOGETHER = 4


def files_of(url: str) -> list[str]:
    """The addresses of the tar files that a pattern names, in order. Raises Missing where it names none."""
    found = [one for text in _braces(url) for one in (_matches(text) if _has_wildcard(text) else [text])]
    if not found:
        raise Missing(f"{_shown(url)}: no tar file is named so")
    return found


def names(folder: Path) -> list[str]:
    """The names of all members."""
    return _index(address_of(folder)).names()


def read(path: Path) -> bytes:
    """The bytes of a member. Raises Missing where no file has it."""
    index, member = _located(path)
    number, offset, size = index.find(member)
    return index.read(number, offset, size)


def extract(path: Path) -> None:
    """Put a member into its place, as a file."""
    index, member = _located(path)
    number, offset, size = index.find(member)
    line = {"in": index.identity, "at": [number, offset, size]}
    beside = cache_folder() / "versions" / path.relative_to(cache_folder())
    try:
        if json.loads(beside.read_bytes()) == line and path.stat().st_size == size:
            return
    except (OSError, ValueError):
        pass
    with whole_file(path) as temporary:
        temporary.write_bytes(index.read(number, offset, size))
    write_json(beside, line)


def size(path: Path) -> int | None:
    """Bytes of a member; None: there is none of this name."""
    index, member = _located(path)
    try:
        return index.find(member)[2]
    except Missing:
        return None


def versions(paths: Sequence[Path]) -> list[str | None]:
    """What identifies each member: its tar file as it is now, and its place in it; None for one that is in none."""
    found: list[str | None] = []
    for path in paths:
        index, member = _located(path)
        try:
            number, offset, size = index.find(member)
            found.append(f"{index.versions[number]} {offset} {size}")
        except Missing:
            found.append(None)
    return found


@dataclass(frozen=True)
class Index:
    """Where the members of tar files lie.

    files: their addresses. versions: of each. keys: uint64 [n], ascending, the first 8 bytes of the names' SHA-256.
    rows: int64 [n, 4]: number of the tar file, offset in it, size (bytes); place of the name in `text`, UTF-8 with a
    line a name. All three are read from the disk as they are needed, which processes share.
    """

    url: str
    files: list[str]
    versions: list[str]
    keys: np.ndarray
    rows: np.ndarray
    text: np.ndarray

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps([self.files, self.versions]).encode()).hexdigest()[:16]

    def find(self, member: str) -> tuple[int, int, int]:
        """(number of the tar file, offset, size) of a member. Raises Missing."""
        key = _key(member)
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key:
            raise Missing(f"{_shown(self.url)}/{member}: none of its {len(self.files)} tar files has a member {member}")
        number, offset, size, _ = (int(value) for value in self.rows[at])
        return number, offset, size

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of a tar file, of its copy where there is one."""
        url = self.files[number]
        copy = _copy_of(url)
        if copy is None:
            return remote.read_range(url, offset, size)
        with open(copy, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise UserError(f"{_shown(url)}: ends before its member at byte {offset}; the file is truncated")
        return data

    def names(self) -> list[str]:
        """All names."""
        return self.text.tobytes().decode("utf-8").splitlines()


# --- details --------------------------------------------------------------------------------------------


def _located(path: Path) -> tuple[Index, str]:
    """The index that a path asks, and the name of the member in it."""
    url = address_of(path)
    pattern, _, member = url.partition(f"{TAR}/")
    return _index(f"{pattern}{TAR}"), member


@lru_cache(maxsize=8)
def _index(url: str) -> Index:
    """The index of a pattern, from the cache or made. One process makes it, the others wait for that."""
    files = files_of(url)
    with ThreadPoolExecutor(remote.PARALLEL) as pool:
        versions = list(pool.map(_version, files))
    name = hashlib.sha256(json.dumps([files, versions]).encode()).hexdigest()[:32]
    folder = cache_folder() / "shards" / name
    with remote.alone(folder, "indices"):
        if not (folder / "index.json").is_file():
            _make(folder, files, versions)
    arrays: list[Any] = [_mapped(folder / f"{part}.npy") for part in ("keys", "rows", "text")]
    return Index(url, files, versions, *arrays)


def _mapped(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r")
    return array


def _make(folder: Path, files: Sequence[str], versions: Sequence[str]) -> None:
    with ThreadPoolExecutor(FETCHED_TOGETHER) as pool:
        found = list(pool.map(_members, files))
    members = [(name, number, offset, size) for number, rows in enumerate(found) for name, offset, size in rows]
    if not members:
        raise UserError(f"{_shown(files[0])}: no file is in it{f' and the other {len(files) - 1}' * (len(files) > 1)}")
    keys = np.array([_key(name) for name, *_ in members], np.uint64)
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(twice):
        first, second = (members[int(order[twice[0] + step])] for step in (0, 1))
        both = f"{_shown(files[first[1]])} and {_shown(files[second[1]])}"
        raise UserError(f"{both}: both have a member {first[0]}; names must be unique")
    rows = np.array([[number, offset, size, 0] for _, number, offset, size in members], np.int64)[order]
    text = np.frombuffer("\n".join(name for name, *_ in members).encode(), np.uint8)
    for part, array in (("keys", keys[order]), ("rows", rows), ("text", text)):
        with atomic_path(folder / f"{part}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    write_json(folder / "index.json", {"files": list(files), "versions": list(versions)})


def _members(url: str) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar file; one at an address is copied first, where there is room."""
    path = _copy_of(url, fetching=True)
    try:
        if path is not None:
            with tarfile.open(path, "r:") as archive:
                return list(_rows(archive))
        return remote.ask_for(url, _streamed)
    except tarfile.TarError as error:
        raise UserError(f"{_shown(url)}: not a plain tar file, or truncated: {first_line(error)}") from None


def _streamed(fs: Any, name: str) -> list[tuple[str, int, int]]:
    with fs.open(name, "rb") as file, tarfile.open(fileobj=file, mode="r|") as archive:
        return list(_rows(archive))


def _rows(archive: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    for member in archive:
        if member.isreg():
            yield member.name.removeprefix("./"), member.offset_data, member.size


def _copy_of(url: str, *, fetching: bool = False) -> Path | None:
    """The tar file on this machine: itself, or its copy; None where it is read at its address."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    path = place_of_tar(url)
    if fetching and not path.is_file():
        size = remote.ask_for(url, lambda fs, name: fs.info(name).get("size")) or 0
        there = next(parent for parent in path.parents if parent.is_dir())
        if shutil.disk_usage(there).free < size + ROOM:
            return None
    if fetching:
        remote.fetch(url, path, ask=True)
    return path if path.is_file() else None


def _version(url: str) -> str:
    if url.startswith("file://"):
        path = Path(url.removeprefix("file://"))
        try:
            state = path.stat()
        except OSError as error:
            raise Missing(f"{path}: {error.strerror}") from None
        return json.dumps([state.st_size, state.st_mtime_ns, state.st_ino])
    found = remote.versions([place_of_tar(url)])[0]
    if found is None:
        raise Missing(f"{url}: there is no such tar file")
    return found


def _matches(url: str) -> list[str]:
    if url.startswith("file://"):
        return [f"file://{name}" for name in sorted(glob.glob(url.removeprefix("file://")))]
    start, _, pattern = url.rpartition("/")
    if _has_wildcard(start):
        raise UserError(f"{url}: * and ? stand in the last part of an address")
    names = (name for name in remote.names(start, place(start)) if "/" not in name)
    return [f"{start}/{name}" for name in sorted(names) if fnmatchcase(name, pattern)]


def _braces(text: str) -> list[str]:
    """`a-{00..02}` → a-00, a-01, a-02; `{x,y}` → x, y."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    between = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if between is None:
        middle = found[1].split(",")
    else:
        first, last = int(between[1]), int(between[2])
        middle = [str(number).zfill(len(between[1])) for number in range(first, last + 1)]
    start, end = text[: found.start()], text[found.end() :]
    return list(itertools.chain.from_iterable(_braces(f"{start}{part}{end}") for part in middle))


def _has_wildcard(text: str) -> bool:
    return "*" in text or "?" in text


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _shown(url: str) -> str:
    return url.removeprefix("file://")
