"""What pictures are: the SHA-256 of their files, so that a finished stage knows when one of them was exchanged.

    digests = PictureDigests(runs / RECORD)
    together(digests.of(paths))         # one text for a list of pictures, in its order

Reading a large set takes a while, so a record remembers each file under its path, size, inode and times, as git's index
does: the first run of a set reads every file, the next one asks the file system for each. What it remembers is only
trusted where it must be right: a file that was changed in the two seconds before it was read is not remembered, since
another change could leave the same times. A time that was set back by hand deceives nobody: the time of the last change
of the inode counts too, which only the system sets.

Of pictures at an address nothing is read: what the server says of them (size, ETag or time) stands for them.

Several runs may use one record at once: each puts what it has read beside what is there, and the file is replaced as a
whole. A record that is damaged, of another version or cannot be written costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from compress.console import progress
from deploy.core.files import write_text
from deploy.core.storage import is_remote, refresh, shown

RECORD = ".pictures.json"
"""Name of the record beside the run folders."""
VERSION = 1
TOO_NEW_NS = 2_000_000_000
"""No file system counts time in coarser steps."""
MANY = 1000
"""From so many files to read on there is a progress display."""

Seen = tuple[int, int, int, int, str]
"""Size, modification time, change time (ns), inode, SHA-256."""


class PictureDigests:
    """SHA-256 of picture files, with a memory.

    record: file of what was read before; None: every file is read, once.
    """

    def __init__(self, record: Path | None = None) -> None:
        self._record = record
        self._seen: dict[str, Seen] | None = None  # read when it is needed: by one process of several
        self._new: dict[str, Seen] = {}

    def of(self, files: Sequence[Path]) -> list[str | None]:
        """64 hexadecimal digits for each file, in their order; None for one that is not there or cannot be read."""
        found = self._of(files)
        self._save()
        return found

    def __call__(self, file: Path) -> str:
        """The digest of one file; the record learns it with the next list. Raises OSError where it cannot be read."""
        (digest,) = self._of([file])
        if digest is None:
            raise _reason(file)
        return digest

    def _of(self, files: Sequence[Path]) -> list[str | None]:
        if self._seen is None:
            self._seen = _read(self._record)
        names = [os.path.abspath(file) for file in files]
        seen_before = self._seen
        found: dict[str, str | None] = _at_addresses(names)
        here = (name for name in dict.fromkeys(names) if name not in found)
        found |= {name: _remembered(name, self._new.get(name, seen_before.get(name))) for name in here}
        unread = [name for name, digest in found.items() if digest is None and not is_remote(name)]
        shown = progress("reading the pictures once") if len(unread) >= MANY else nullcontext(lambda done, total: None)
        with ThreadPoolExecutor(4) as pool, shown as advance:
            for done, (name, seen) in enumerate(zip(unread, pool.map(_look, unread), strict=True), start=1):
                if seen is not None:
                    found[name] = seen[0][-1]
                    if seen[1]:
                        self._new[name] = seen[0]
                advance(done, len(unread))
        return [found[name] for name in names]

    def _save(self) -> None:
        """Put what was read into the record; what another run put there meanwhile stays."""
        if self._record is None or not self._new:
            return
        self._seen = _read(self._record) | self._new
        self._new = {}
        text = json.dumps({"version": VERSION, "pictures": self._seen}, separators=(",", ":"))
        with contextlib.suppress(OSError):  # the next run reads the files again
            write_text(self._record, text)


def together(digests: Iterable[str | None]) -> str:
    """One SHA-256 of many, in their order."""
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(f"{digest or 'none'}\n".encode())
    return whole.hexdigest()


# --- details --------------------------------------------------------------------------------------------


def _read(record: Path | None) -> dict[str, Seen]:
    """The entries of a record; those of a damaged one do not count."""
    if record is None:
        return {}
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        entries = content["pictures"] if content["version"] == VERSION else {}
        return {name: tuple(seen) for name, seen in entries.items() if _is_entry(seen)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _at_addresses(names: Sequence[str]) -> dict[str, str | None]:
    """A digest of each of the files at addresses: of where it lies, and of what `refresh` says of it."""
    there = [name for name in dict.fromkeys(names) if is_remote(name)]
    versions = refresh([Path(name) for name in there])
    return {
        name: None if version is None else hashlib.sha256(f"{shown(name)} {version}".encode()).hexdigest()
        for name, version in zip(there, versions, strict=True)
    }


def _remembered(name: str, seen: Seen | None) -> str | None:
    if seen is None:
        return None
    try:
        return seen[-1] if _state(os.stat(name)) == seen[:-1] else None
    except OSError:
        return None


def _is_entry(seen: object) -> bool:
    return (
        isinstance(seen, list)
        and len(seen) == 5
        and all(type(value) is int for value in seen[:4])
        and isinstance(seen[4], str)
        and len(seen[4]) == 64
    )


def _look(name: str) -> tuple[Seen, bool] | None:
    """What a file is, and whether that may be remembered; None for one that cannot be read."""
    started = time.time_ns()
    try:
        with open(name, "rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError:
        return None
    settled = _state(before) == _state(after) and before.st_ctime_ns < started - TOO_NEW_NS
    return (*_state(after), digest), settled


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _reason(file: Path) -> OSError:
    try:
        with open(file, "rb"):
            return OSError(0, "changed while it was read", str(file))
    except OSError as error:
        return error
