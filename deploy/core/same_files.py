"""Files with the same bytes, found without reading most of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deploy.core.files import sha256_of
from deploy.core.storage import fetch, is_remote, refresh, size

_SAMPLE = 4096  # bytes from the middle of a file, compared before the whole is


class FileContents:
    """`file in contents`: has one of `files` the same bytes? `contents.same(file)` gives the first that has.

    A file is only opened when another has its length, and only read as a whole when the bytes in the middle agree as
    well. Files that are not there are like no other.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._by_size: dict[int, list[Path]] = {}
        self._samples: dict[int, dict[bytes, list[Path]]] = {}
        self._whole: dict[tuple[int, bytes], dict[str, Path]] = {}
        given = list(files)
        refresh(given)  # lists those at addresses once, for their sizes
        for file in given:
            length = _size(file)
            if length is not None:
                self._by_size.setdefault(length, []).append(file)

    def same(self, file: Path) -> Path | None:
        """The first of the files with the bytes of `file`, which may be the file itself; None: there is none."""
        length = _size(file)
        if length is None or length not in self._by_size:
            return None
        if length not in self._samples:
            self._samples[length] = {}
            for other in self._by_size[length]:
                self._samples[length].setdefault(_sample(other, length), []).append(other)
        sample = _sample(file, length)
        others = self._samples[length].get(sample)
        if others is None or others == [file]:
            return None if others is None else file
        if (length, sample) not in self._whole:
            hashes = self._whole[length, sample] = {}
            for other in others:
                hashes.setdefault(sha256_of(other), other)
        return self._whole[length, sample].get(sha256_of(file))

    def __contains__(self, file: Path) -> bool:
        return self.same(file) is not None


def shared(files: Iterable[Path], others: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Pairs of a file and the first of the others with the same bytes, in the order of `files`."""
    contents = FileContents(others)
    return [(file, other) for file in files if (other := contents.same(file)) is not None]


def _size(file: Path) -> int | None:
    if is_remote(file):
        return size(file)
    try:
        return file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):
        return None


def _sample(file: Path, size: int) -> bytes:
    with open(fetch(file, ask=False), "rb") as opened:
        opened.seek(max(0, size // 2 - _SAMPLE // 2))
        return opened.read(_SAMPLE)
