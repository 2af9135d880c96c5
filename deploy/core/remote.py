"""What storage servers are asked, through fsspec: copies into the cache, listings, uploads; with retries, and errors of
one line.

The cache is our own. fsspec's `filecache` keeps what it knows of all files in one JSON file, which it writes anew as a
whole without a lock; `simplecache` never asks whether a file changed; both fetch under the final name, where another
process meets half a file.

Layout: `files/s3/bucket/key` is a copy, and `versions/files/s3/bucket/key` says of what: size and ETag (or time) at the
address, and size, time and inode of the copy that it speaks of. A copy without such a line does not count. Copies are
renamed into their place as a whole. One process at a time fetches a file; pictures, which are small and many, are
fetched by whoever wants them, and the last one stays.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from zlib import crc32

from deploy.core.errors import UserError, first_line
from deploy.core.files import whole_file, write_json
from deploy.core.storage import LAST, Missing, address_of, cache_folder

Result = TypeVar("Result")

ATTEMPTS = 5
"""Times that a server is asked before that is an error. What the libraries repeat themselves counts once."""
FIRST_PAUSE_S = 0.5
"""Before the second time; it doubles, and up to half of it comes on top by chance."""
PARALLEL = 16
"""Requests at the same time for lists of files."""
FEW = 64
"""Files up to which each is asked for alone, not their whole folder listed."""
LOCKS = 256
NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
IN_EXTRA = ("s3fs", "fsspec", "aiohttp")
"""Packages that the extra `storage` installs; others are installed by their name."""


def fetch(url: str, path: Path, *, ask: bool, anew: bool = False) -> None:
    """Copy a file into its place unless it is there; see `deploy.core.storage.fetch`."""
    held = before = _held(path)
    if held is not None and ask and (anew or path not in _asked):
        found = ask_for(url, lambda fs, name: _version(_file(fs.info(name), url)))
        held = held if held == found else None
    if held is None and ask:
        with alone(path):
            if _held(path) in (None, before):  # else another process has fetched it meanwhile
                _download(url, path)
    elif held is None:
        _download(url, path)
    if ask:
        _asked.add(path)


def read_range(url: str, start: int, size: int) -> bytes:
    """Some bytes of a file, which is not copied."""

    def read(fs: Any, name: str) -> bytes:
        data: bytes = fs.cat_file(name, start=start, end=start + size)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came of {size}")
        return data

    return ask_for(url, read)


def size(url: str, path: Path) -> int | None:
    """Bytes of a file; of one that was listed before, nobody is asked."""
    if path not in _sizes:
        held = _held(path)
        version = _known(path) if held is None else held
        _sizes[path] = None if version is None else version[0]
    return _sizes[path]


def is_folder(url: str) -> bool:
    """Whether something lies below an address. Web servers do not say: what has no ending is one."""
    if url.startswith("http"):
        return not PurePosixPath(url).suffix
    return ask_for(url, lambda fs, name: bool(fs.isdir(name)))


def names(url: str, folder: Path) -> list[str]:
    """The names of all files below an address, relative to it. Copies that changed there are removed."""
    found = _listing(url, folder)
    for name, version in found.items():
        _forget_other(folder / name, version)
        _sizes[folder / name] = version[0]
    return list(found)


def versions(paths: Sequence[Path]) -> list[str | None]:
    """What identifies each file at its address; None for one that is not there. Of many in a folder, the folder is
    listed: a request for a thousand files."""
    folders: dict[Path, int] = {}
    for path in paths:
        folders[path.parent] = folders.get(path.parent, 0) + 1
    many = {folder for folder, count in folders.items() if count > FEW and not address_of(folder).startswith("http")}
    listed = {folder: _listing(address_of(folder), folder, below=False) for folder in many}
    with ThreadPoolExecutor(PARALLEL) as pool:
        alone = iter(list(pool.map(_known, [path for path in paths if path.parent not in many])))
    found = [listed[path.parent].get(path.name) if path.parent in many else next(alone) for path in paths]
    for path, version in zip(paths, found, strict=True):
        _forget_other(path, version)
        _sizes[path] = None if version is None else version[0]
    return [None if version is None else json.dumps(version) for version in found]


def push(path: Path) -> list[str]:
    """Upload a workplace; see `deploy.core.storage.push`. What was uploaded is recorded as what was fetched is."""
    for file in _removed(path):
        ask_for(address_of(file), lambda fs, name: fs.rm_file(name) if fs.exists(name) else None)
        _line(file).unlink()
    written = []
    for file in sorted(_made(path), key=_order):
        state = _state(file)
        if _recorded(file).get("copy") != state:
            version = ask_for(address_of(file), partial(_upload, file=file))
            write_json(_line(file), {"at": version, "copy": state})
            written.append(address_of(file))
    return written


def pull(folder: Path) -> None:
    """Fetch what is newer at the address of a workplace than what was last uploaded from here, or fetched."""
    try:
        found = _listing(address_of(folder), folder)
    except Missing:
        return
    for file in sorted((folder / name for name in found), key=_order):
        there = found[file.relative_to(folder).as_posix()]
        if not file.exists() or _recorded(file).get("at") != there:
            _download(address_of(file), file)


def ask_for(url: str, what: Callable[[Any, str], Result]) -> Result:
    """`what(file system, name)` for an address, tried again with growing pauses where that may help.

    Raises:
        Missing: nothing is there, and the line says whether the bucket is.
        UserError: no permission, no such protocol, a package that is missing, or the last reason after `ATTEMPTS`.
    """
    fs, name = None, ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            fs, name = _file_system(url)  # some connect already
            fs.invalidate_cache()  # fsspec remembers listings for ever
            return what(fs, name)
        except UserError:
            raise
        except Exception as error:  # each library has exceptions of its own
            final = _final(error, fs, name, url)
            if final is not None:
                raise final from None
            if attempt == ATTEMPTS:
                raise UserError(f"{url}: cannot be reached: {_reason(error)} (tried {ATTEMPTS} times)") from error
            _say_once(f"note: {url}: {_reason(error)}; trying again, here and later, up to {ATTEMPTS} times")
        time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(1, 1.5))
    raise AssertionError("unreachable")


@contextmanager
def alone(path: Path, kind: str = "files") -> Iterator[None]:
    """One process and one thread at a time for a file; the others wait. There are few locks, which stay, so two files
    may share one: who holds one of a kind may not wait for another of that kind."""
    folder = cache_folder() / "locks" / kind
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f"{crc32(str(path).encode()) % LOCKS:02x}", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- details --------------------------------------------------------------------------------------------

Version = list[Any]
"""Size in bytes, and ETag or time at the address, as JSON; None and an empty text for what a server does not say."""
TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest")
TIMES = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")
"""What fsspec's file systems call them."""
_told: list[str] = []
_sizes: dict[Path, int | None] = {}
"""Of files that this process has listed."""
_asked: set[Path] = set()
"""Files of which this process knows that they did not change."""


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of an address, and what it calls the file. Asked for anew each time: fsspec keeps one for each
    process, and those of a parent do not work in a child."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        fs, name = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = NEEDS.get(scheme, error.name or "fsspec") if error.name != "fsspec" else "fsspec"
        how = "'compress-detectors[storage]'" if package in IN_EXTRA else package
        raise UserError(f"{url}: {scheme}:// needs {package}, which is not installed: pip install {how}") from None
    except ValueError as error:
        raise UserError(f"{url}: {first_line(error)}") from None
    return fs, name


def _version(info: dict[str, Any]) -> Version:
    """A time counts where there is no ETag: lists of some servers say it finer than answers about one file."""
    tag = next((str(info[key]) for key in TAGS if info.get(key)), "")
    changed = next((str(info[key]) for key in TIMES if info.get(key)), "")
    return [info.get("size"), tag or changed]


def _file(info: dict[str, Any], url: str) -> dict[str, Any]:
    if info.get("type") == "directory":
        raise Missing(f"{url}: is a folder; name the file")
    return info


def _download(url: str, path: Path) -> None:
    version = _copy(url, path)
    write_json(_line(path), {"at": version, "copy": _state(path)})


def _copy(url: str, path: Path) -> Version:
    """Write what is at an address into a file, whole or not at all."""

    def read(fs: Any, name: str) -> Version:
        version = _version(_file(fs.info(name), url))
        with whole_file(path) as temporary:
            fs.get_file(name, str(temporary))
            size = temporary.stat().st_size
            if version[0] is not None and size != version[0]:
                raise OSError(f"{size} bytes came of {version[0]}")
        return version

    return ask_for(url, read)


def _upload(fs: Any, name: str, file: Path) -> Version:
    least = file.stat().st_size  # a log may grow meanwhile
    fs.put_file(str(file), name)
    fs.invalidate_cache()
    version = _version(fs.info(name))
    if not least <= version[0] <= file.stat().st_size:
        raise OSError(f"{version[0]} bytes arrived of {least}")
    return version


def _listing(url: str, folder: Path, *, below: bool = True) -> dict[str, Version]:
    """Name below `folder` → version, of all files in it, and `below` it."""

    def read(fs: Any, name: str) -> dict[str, Version]:
        found = fs.find(name, maxdepth=None if below else 1, detail=True)
        if not found and not fs.isdir(name):
            raise FileNotFoundError(name)
        start = len(name.rstrip("/")) + 1
        files = {key[start:]: _version(info) for key, info in found.items() if info.get("type") == "file"}
        return {name: version for name, version in files.items() if name}  # an empty object may stand for the folder

    return ask_for(url, read)


def _known(path: Path) -> Version | None:
    url = address_of(path)
    try:
        return ask_for(url, lambda fs, name: _version(_file(fs.info(name), url)))
    except Missing:
        return None


def _held(path: Path) -> Version | None:
    """What the copy of a file is of; None: there is none, or nothing says so."""
    line = _recorded(path)
    try:
        return line["at"] if line["copy"] == _state(path) else None
    except (OSError, KeyError):
        return None


def _recorded(path: Path) -> dict[str, Any]:
    """What is known of a file in the cache; empty: nothing."""
    try:
        line = json.loads(_line(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return line if isinstance(line, dict) else {}


def _forget_other(path: Path, version: Version | None) -> None:
    held = _held(path)
    if held is not None and held != version:
        path.unlink(missing_ok=True)


def _state(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _line(path: Path) -> Path:
    return cache_folder() / "versions" / path.relative_to(cache_folder())


def _made(path: Path) -> Iterator[Path]:
    """The files below a folder, or a file and those beside it that are called alike; without hidden ones and locks."""
    root, found = (path, path.rglob("*")) if path.is_dir() else (path.parent, path.parent.glob(_alike(path)))
    for file in found:
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.is_file() and not hidden and file.suffix != ".lock":
            yield file


def _alike(path: Path) -> str:
    return f"{glob.escape(path.name.partition('.')[0])}.*"


def _removed(path: Path) -> list[Path]:
    """Files that were uploaded from here and are not here any more."""
    root, line = cache_folder(), _line(path)
    lines = line.rglob("*") if path.is_dir() else line.parent.glob(_alike(path))
    files = (root / one.relative_to(root / "versions") for one in list(lines) if one.is_file())
    return [file for file in files if not file.exists()]


def _order(file: Path) -> tuple[int, str]:
    return (LAST.index(file.name) + 1 if file.name in LAST else 0), str(file)


def _say_once(line: str) -> None:
    if not _told:
        print(line, file=sys.stderr)
        _told.append(line)


def _final(error: Exception, fs: Any, name: str, url: str) -> UserError | None:
    """The error for what does not go away by asking again; None: it may."""
    status = getattr(error.__cause__, "status", None)  # fsspec's web servers: everything is "not found", for a reason
    if isinstance(error, PermissionError) or status in (401, 403):
        return UserError(f"{url}: no permission ({_reason(error)}); {_credentials(url)}")
    if "credentials" in type(error).__name__.lower():
        return UserError(f"{url}: no credentials; {_credentials(url)}")
    web = fs is not None and "http" in fs.protocol
    unreachable = (web and isinstance(error.__cause__, OSError)) or (status or 0) >= 500
    if isinstance(error, FileNotFoundError) and not unreachable:
        return Missing(f"{url}: {_what_is_missing(fs, name)}")
    return None


def _what_is_missing(fs: Any, name: str) -> str:
    bucket = name.lstrip("/").partition("/")[0]
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if not set(protocols) & set(NEEDS):
        return "nothing is there"
    try:
        fs.ls(bucket, detail=False, refresh=True)
    except FileNotFoundError:
        return f"there is no bucket '{bucket}'"
    except Exception:  # the bucket may not be listed: its key is missing all the same
        pass
    return f"there is no such key in bucket '{bucket}'"


def _credentials(url: str) -> str:
    if url.startswith("s3"):
        return "credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role"
    return "see docs/data.md for where credentials come from"


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    text = first_line(cause)
    return text if len(text) <= 200 else f"{text[:200]}…"
