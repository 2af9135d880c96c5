"""Files at addresses (`s3://`, `gs://`, `az://`, `https://`, what else fsspec opens) and in tar files, as plain paths.

An address has a place in a cache on this machine, and everything works with that place, a plain `Path`:

    place("s3://data/coco/val.json")     # ~/.cache/compress/storage/files/s3/data/coco/val.json; nothing is read
    fetch(path)                          # whoever opens a path asks for it first; paths of this machine cost nothing
    url_of(path)                         # s3://data/coco/val.json; None for a file of this machine
    workplace("s3://runs")               # where what will be uploaded is made; `push` uploads it

A picture in tar files has a place, too: `shards/train-{000..099}.tar/street/1.jpg`, by the name that its member has.

Here is what needs no packages. `deploy.core.remote` talks to servers, by the extra `storage`, and `deploy.core.shards`
reads tar files; both are loaded where there is an address.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from deploy.core.errors import UserError

CACHE = "COMPRESS_STORAGE_CACHE"
"""Environment variable: the folder of the cache, instead of ~/.cache/compress/storage."""
ENDPOINTS = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Environment variables that name another server for s3://."""
STREAMS = ("rtsp", "rtmp", "rtmps", "udp", "tcp", "srt", "hls")
"""Addresses of moving pictures, which are no files."""
FILES, TARS, WORK = "files", "tars", "work"
"""Folders of the cache: copies, copies of tar files that pictures are read from, and what will be uploaded."""


def place(where: str | Path) -> Path:
    """The path of a file or folder: of an address its place in the cache, of tar files one for their members, else
    `where` itself. Nothing is looked at.

    Raises UserError for an address that has no name of a bucket or host, and for one with `..` or an empty part.
    """
    return _place(where, FILES)


def place_of_tar(url: str) -> Path:
    """The place of the copy of a tar file that pictures are read from."""
    return _place(url, TARS)


def workplace(where: str | Path) -> Path:
    """Where that which will lie at `where` is made: `where` itself, unless it is an address. See `push`."""
    return _place(where, WORK)


def url_of(path: str | Path) -> str | None:
    """The address that a path is the place of; None: it is a file of this machine."""
    return next(filter(None, (_url_in(tree, path) for tree in (FILES, TARS, WORK))), None)


def address_of(path: str | Path) -> str:
    """`url_of` what is known to be the place of an address."""
    url = url_of(path)
    assert url is not None, path
    return url


def shown(text: object) -> str:
    """A text for people, or a path for another machine: addresses in the place of their places here."""
    written = str(text)
    for tree in (FILES, TARS, WORK):
        start = _tree(tree)
        if start in written:
            written = re.sub(
                re.escape(start) + r"([a-z0-9+.-]+)(@[^/]*)?/",
                lambda found: "/" if found[1] == "file" else f"{found[1]}://",
                written,
            )
    return written


def fetch(path: Path, *, ask: bool = True, anew: bool = False) -> Path:
    """Return `path`, after copying it from its address into its place if it is not there as it is at its address.

    ask: whether it changed at its address, once in each process; False takes what is there. anew: ask also again.

    Raises UserError where it cannot be read. A path of this machine, and one in a workplace, is not looked at.
    """
    url = _url_in(FILES, path)
    if url is None:
        return path
    if is_in_tar(url):
        from deploy.core import shards

        shards.extract(Path(path))
    else:
        from deploy.core import remote

        remote.fetch(url, Path(path), ask=ask, anew=anew)
    return path


def read_bytes(path: Path) -> bytes:
    """The bytes of a picture. One at an address comes from the cache, if it is there, without asking whether it changed
    (`refresh` does, for many at once); a member of a tar file is read where it lies.

    Raises UserError for what is at an address, OSError for a file of this machine.
    """
    url = _url_in(FILES, path)
    if url is not None and is_in_tar(url):
        from deploy.core import shards

        return shards.read(Path(path))
    return fetch(Path(path), ask=False).read_bytes()


def is_file(path: Path, *, ask: bool = True) -> bool:
    """Whether there is a file, which then lies in its place. ask: as of `fetch`."""
    try:
        return fetch(Path(path), ask=ask).is_file()
    except Missing:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder, which then has its place, or tar files that a pattern names. Of a web server, which
    lists nothing, one is taken to be there."""
    url = _url_in(FILES, path)
    if url is None:
        return Path(path).is_dir()
    from deploy.core import remote, shards

    try:
        found = bool(shards.files_of(url)) if url.endswith(TAR) else remote.is_folder(url)
    except Missing:
        return False
    if found:
        Path(path).mkdir(parents=True, exist_ok=True)
    return found


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The places of the files below an address with one of these endings (lower case); see `find_files`."""
    url = address_of(folder)
    from deploy.core import remote, shards

    names = shards.names(Path(folder)) if url.endswith(TAR) else remote.names(url, Path(folder))
    shown_names = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    return [Path(folder, name) for name in sorted(shown_names) if PurePosixPath(name).suffix.lower() in suffixes]


def size(path: Path) -> int | None:
    """Bytes of a file at an address, which is not fetched for that; None: there is none."""
    url = address_of(path)
    from deploy.core import remote, shards

    return shards.size(Path(path)) if is_in_tar(url) else remote.size(url, Path(path))


def refresh(paths: Sequence[Path]) -> list[str | None]:
    """What identifies each of many pictures at addresses, without reading them; None where there is none, and for files
    of this machine. Copies in the cache that are not these any more are removed."""
    if not all(map(is_remote, paths)):
        found = iter(refresh([path for path in paths if is_remote(path)]))
        return [next(found) if is_remote(path) else None for path in paths]
    if not paths:
        return []
    from deploy.core import remote, shards

    urls = [url_of(path) for path in paths]
    in_tar = [url is not None and is_in_tar(url) for url in urls]
    versions = iter(remote.versions([path for path, tar in zip(paths, in_tar, strict=True) if not tar]))
    members = iter(shards.versions([path for path, tar in zip(paths, in_tar, strict=True) if tar]))
    return [next(members) if tar else next(versions) for tar in in_tar]


def is_remote(path: str | Path) -> bool:
    """Whether a path is the place of something at an address or in tar files, which `fetch` would copy."""
    return os.fspath(path).startswith(_tree(FILES))


def push(path: Path, *, must: bool = True) -> list[str]:
    """Upload what changed in a workplace since the last time, and remove what is gone: a folder with all below it, or a
    file and those beside it that are called alike (`student.onnx`, `student.int8.onnx`). Returns the addresses written.

    Files of the names in `LAST` come after the others, so that what names a file comes when that is whole.
    must: False says in a line what failed, for work that goes on and pushes again. Raises UserError otherwise.
    """
    if _url_in(WORK, path) is None:
        return []
    from deploy.core import remote

    try:
        return remote.push(Path(path))
    except UserError as error:
        if must:
            raise
        print(f"note: not uploaded, and tried again later: {shown(error)}", file=sys.stderr)
        return []


def pull(folder: Path) -> None:
    """Bring the workplace of a folder up to date with its address, where somebody else worked on it."""
    if _url_in(WORK, folder) is not None:
        from deploy.core import remote

        remote.pull(Path(folder))


class Missing(UserError):
    """There is nothing at an address."""


TAR = ".tar"
LAST = ("last.ckpt", "manifest.json")


def is_in_tar(url: str) -> bool:
    """Whether an address is that of a member of tar files: one that has a part ending in .tar before its last."""
    return f"{TAR}/" in url


def cache_folder() -> Path:
    """The folder of the cache."""
    return Path(_root())


# --- details --------------------------------------------------------------------------------------------

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_COLLAPSED = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss|https?|memory|file):/+(.+)", re.DOTALL)
"""What is left of an address after `Path` made one slash of two."""


def _url_in(tree: str, path: str | Path) -> str | None:
    text, start = os.fspath(path), _tree(tree)
    if not text.startswith(start):
        return None
    if "/.." in text and ".." in text.split("/"):  # a name in a downloaded file must not lead out of the cache
        raise UserError(f"{text[len(start) :]}: a name at an address cannot have .. in it")
    scheme, _, rest = text[len(start) :].partition("/")
    return f"{scheme.partition('@')[0]}://{'/' if scheme == 'file' else ''}{rest}"


def _tree(name: str) -> str:
    return f"{_root()}/{name}/"


def _root() -> str:
    given = os.environ.get(CACHE)
    return os.path.abspath(given) if given else os.path.expanduser("~/.cache/compress/storage")


def _place(where: str | Path, tree: str) -> Path:
    text = os.fspath(where)
    found = (_COLLAPSED if isinstance(where, Path) else _URL).fullmatch(text)
    scheme, rest = ("", "") if found is None else (found[1].lower(), found[2])
    if found is None or scheme in STREAMS:
        if not text.endswith(TAR) or url_of(text) is not None:
            return Path(where)
        scheme, rest = "file", os.path.abspath(text)
    if scheme in ("file", "local"):
        rest = os.path.abspath(f"/{rest.lstrip('/')}")
        return Path(_tree(tree), "file", rest[1:]) if rest.endswith(TAR) else Path(rest)
    parts = rest.rstrip("/").split("/")
    if not parts[0]:
        raise UserError(f"{text}: names no bucket or host; an address is {scheme}://NAME/...")
    if any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{text}: has an empty part, . or .. in it; name the file as it is stored")
    return Path(_tree(tree), scheme + _server(scheme), *parts)


def _server(scheme: str) -> str:
    """The server that one of `ENDPOINTS` names: two may have buckets of one name."""
    address = next(filter(None, map(os.environ.get, ENDPOINTS)), "")
    name = re.sub(r"^[a-z]+://", "", address.rstrip("/")).replace("/", "_")
    return f"@{name}" if name and scheme in ("s3", "s3a") else ""
