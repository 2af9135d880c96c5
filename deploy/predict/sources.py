"""What a detector looks at: picture files, folders, patterns, addresses, videos, cameras, lists on stdin.

    for source in open_sources(["photos", "clip.mp4", "shots/*.png", "http://…/a.jpg", "camera:0", "-"]):
        for frame in source.frames(): ...

A folder gives the pictures and the videos in it and below it, by name. Names are those of files below a folder that
was given, else the last part of a path or an address; the second of a name is called `name-2`.
"""

from __future__ import annotations

import glob
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol, TextIO

import numpy as np

from deploy.core.errors import UserError
from deploy.core.image import decode_image, load_image
from deploy.core.image_folder import IMAGE_SUFFIXES, find_files
from deploy.core.storage import STREAMS, fetch, is_file, is_folder, place
from deploy.predict.video import VIDEO_SUFFIXES, Video, need_pyav

MAX_BYTES = 2**28
"""Of a picture at an address."""
TIMEOUT_S = 30.0
MARK = ".predictions"
"""File in a folder that predictions were written into."""


@dataclass(frozen=True)
class Frame:
    """A picture, or one of a video. `read` gives its pixels uint8 [h, w, 3] RGB; it raises UserError."""

    source: Source
    read: Callable[[], np.ndarray]
    index: int = 0
    """Its number in the video, from 0."""
    time_s: float | None = None
    """Its time in the video; None for a picture."""

    @property
    def path(self) -> Path | None:
        """The file of a picture; None for a frame of a video and for a picture at an address."""
        return self.source.path if isinstance(self.source, PictureFile) else None


class Source(Protocol):
    """Something with frames. `name`: a relative path with `/`, of which there is one in a list of sources."""

    @property
    def name(self) -> str: ...
    @property
    def where(self) -> str:
        """Its path or address."""

    @property
    def count(self) -> int | None:
        """Number of frames; None: unknown. Of a video, what its file says, which may be wrong by some."""

    @property
    def live(self) -> bool:
        """It goes on while nobody looks, and ends when it is stopped."""

    def frames(self) -> Iterator[Frame]:
        """Raises UserError where it breaks off, or cannot be read at all."""


@dataclass(frozen=True)
class PictureFile:
    path: Path
    name: str
    count = 1
    live = False

    @property
    def where(self) -> str:
        return str(self.path)

    def frames(self) -> Iterator[Frame]:
        yield Frame(self, partial(load_image, self.path))


@dataclass(frozen=True)
class PictureAddress:
    where: str
    name: str
    count = 1
    live = False

    def frames(self) -> Iterator[Frame]:
        yield Frame(self, lambda: decode_image(_download(self.where), self.where))


@dataclass(frozen=True)
class VideoSource:
    """A video file, an address, or a camera."""

    video: Video
    name: str
    live: bool = False

    @property
    def where(self) -> str:
        return self.video.address

    @property
    def count(self) -> int | None:
        return None if self.live else self.video.count

    def frames(self) -> Iterator[Frame]:
        for index, (pixels, time_s) in enumerate(self.video.pictures()):
            yield Frame(self, lambda pixels=pixels: pixels, index, time_s)  # type: ignore[misc]


@dataclass(frozen=True)
class Unreadable:
    """What is called like a video and cannot be opened as one."""

    where: str
    name: str
    problem: str
    count = 1
    live = False

    def frames(self) -> Iterator[Frame]:
        raise UserError(self.problem)


def open_sources(texts: Iterable[str | Path], stdin: TextIO | None = None) -> list[Source]:
    """Find what the words name, in their order. `-` is a list of words on `stdin`, one a line.

    A folder in which predictions were written (`MARK`) is left out of the one that it lies in.

    Raises UserError for what is not there, for videos without PyAV, and when there is nothing at all.
    """
    taken: set[str] = set()
    found: list[Source] = []
    for text in texts:
        for made in _sources(str(text), stdin):
            name = _free_name(made.name, taken)
            taken.add(name.lower())
            found.append(made if name == made.name else _renamed(made, name))
    if not found:
        raise UserError("no pictures and no videos: name files, folders, addresses, or - for a list on stdin")
    return found


# --- details --------------------------------------------------------------------------------------------


def _sources(text: str, stdin: TextIO | None) -> Iterator[Source]:
    if text == "-":
        for line in sys.stdin if stdin is None else stdin:
            if word := line.strip():
                if word == "-":
                    raise UserError("-: a list on stdin names itself")
                yield from _sources(word, None)
        return
    scheme = urllib.parse.urlsplit(text).scheme.lower() if "://" in text else ""
    number = text.removeprefix("camera:")
    if number.isdecimal() and (number != text or not Path(text).exists()):
        yield VideoSource(Video.camera(int(number)), f"camera{number}.mp4", live=True)
    elif scheme in STREAMS:
        yield VideoSource(Video.open(text), f"{_last_part(text, 'stream')}.mp4", live=True)
    elif scheme in ("http", "https"):
        name = _last_part(text, "picture")
        video = PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES
        yield _video(text, name) if video else PictureAddress(text, name)
    else:
        yield from _files(str(place(text)))


def _files(text: str) -> Iterator[Source]:
    path = Path(text)
    if is_folder(path):
        files = find_files(path, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES), dead_links=True)
        below = {folder for file in files for folder in _between(file, path)}
        written = {folder for folder in below if (folder / MARK).exists()}
        files = [file for file in files if written.isdisjoint(_between(file, path))]
        if not files:
            raise UserError(f"{path}: no pictures and no videos in it")
        yield from (_file(file, file.relative_to(path).as_posix()) for file in files)
    elif is_file(path) or path.is_symlink() or path.exists():
        yield _file(path, path.name)
    elif glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            raise UserError(f"{text}: nothing is named so")
        for match in matches:
            yield from _files(match) if Path(match).is_dir() else [_file(Path(match), Path(match).name)]
    else:
        raise UserError(f"{path}: no such file or folder")


def _between(file: Path, folder: Path) -> list[Path]:
    """The folders that `file` lies in below `folder`."""
    return [folder / part for part in list(file.relative_to(folder).parents)[:-1]]


def _file(path: Path, name: str) -> Source:
    """What is called like a video is one; a picture is told by its content."""
    return _video(str(path), name) if path.suffix.lower() in VIDEO_SUFFIXES else PictureFile(path, name)


def _video(address: str, name: str) -> Source:
    need_pyav(address)
    try:
        fetch(Path(address))
        return VideoSource(Video.open(address), name)
    except UserError as error:
        return Unreadable(address, name, str(error))


def _last_part(address: str, otherwise: str) -> str:
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name or otherwise


def _free_name(name: str, taken: set[str]) -> str:
    path, number = PurePosixPath(name), 2
    while name.lower() in taken:
        name = path.with_name(f"{path.stem}-{number}{path.suffix}").as_posix()
        number += 1
    return name


def _renamed(source: Source, name: str) -> Source:
    assert isinstance(source, PictureFile | PictureAddress | VideoSource | Unreadable)
    return replace(source, name=name)


def _download(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "compress"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: the server answers {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{address}: cannot be fetched: {getattr(error, 'reason', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{address}: more than {MAX_BYTES >> 20} MiB")
    return data


def total(sources: Sequence[Source]) -> int | None:
    """Frames of all sources; None where one does not know."""
    counts = [source.count for source in sources]
    return None if None in counts else sum(count for count in counts if count is not None)
