"""Videos in and out, by PyAV (FFmpeg): frames one after the other, upright, with their times.

The extra is `compress-detectors[video]`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from deploy.core.errors import UserError, first_line

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".mts")
"""Files that count as videos; lower case."""
RATE = Fraction(25)
"""Frames a second where a video does not say."""
CODECS = ("libx264", "mpeg4")
"""What is written, the first that this FFmpeg has."""


@dataclass(frozen=True)
class Video:
    """A video that could be opened.

    address: a path, an address or a device. count: of frames, as far as the file says. rate: frames a second.
    seconds: its length, as far as the file says.
    """

    address: str
    format: str | None
    count: int | None
    rate: Fraction
    seconds: float | None = None

    @classmethod
    def open(cls, address: str, format: str | None = None) -> Video:
        """Look at the first of the video streams. Raises UserError when there is none, or it cannot be read."""
        av = need_pyav(address)
        with _open(address, format) as container:
            if not container.streams.video:
                raise UserError(f"{address}: there is no video in it")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or RATE
            seconds = None if container.duration is None else container.duration / av.time_base
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            count = stream.frames or (None if seconds is None else round(seconds * rate))
            return cls(address, format, count, Fraction(rate), seconds)

    @classmethod
    def camera(cls, number: int) -> Video:
        """A camera of this machine."""
        device, format = {
            "linux": (f"/dev/video{number}", "v4l2"),
            "darwin": (str(number), "avfoundation"),
            "win32": (f"video={number}", "dshow"),
        }[sys.platform]
        if sys.platform == "linux" and not Path(device).exists():
            raise UserError(f"camera:{number}: there is no {device}")
        return cls.open(device, format)

    def pictures(self) -> Iterator[tuple[np.ndarray, float]]:
        """Pixels uint8 [h, w, 3] RGB, turned upright as the video says, and times in seconds. Raises UserError for a
        frame that cannot be decoded, and behind the last one when the file says that the video is longer by a tenth."""
        import av

        with _open(self.address, self.format) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            time_s = 0.0
            try:
                for index, frame in enumerate(container.decode(stream)):
                    pixels = frame.to_ndarray(format="rgb24")
                    turns = round(frame.rotation / 90) % 4
                    time_s = float(frame.time) if frame.time is not None else index / float(self.rate)
                    yield np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels, time_s
            except av.FFmpegError as error:
                raise UserError(f"{self.address}: cannot be read further: {_reason(error)}") from error
        if self.seconds is not None and time_s < 0.9 * self.seconds - 1:
            raise UserError(f"{self.address}: breaks off after {time_s:.1f} of {self.seconds:.1f} seconds")


class VideoWriter:
    """An MP4 file of frames at their times, all of the size of the first. A side that is odd loses a row or a column:
    the codec wants even ones. Raises UserError where the file cannot be written."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        av = need_pyav(str(path))
        self._rate, self._base, self._last = rate, Fraction(1, 90_000), -1
        self._stream: Any = None
        try:
            self._container = av.open(str(path), "w", format="mp4")
        except av.FFmpegError as error:
            raise UserError(f"{path}: cannot be written: {first_line(error)}") from error

    def add(self, pixels: np.ndarray, time_s: float) -> None:
        """pixels: uint8 [h, w, 3] RGB, resized where they are of another size than the first. time_s: later than that
        of the frame before, or moved behind it."""
        import av

        if self._stream is None:
            height, width = (max(2, side - side % 2) for side in pixels.shape[:2])
            codec = next(name for name in CODECS if name in av.codecs_available)
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._base
        height, width = self._stream.height, self._stream.width
        if pixels.shape[0] - height not in (0, 1) or pixels.shape[1] - width not in (0, 1):
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height)))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
        self._last = max(self._last + 1, round(time_s / self._base))
        frame.pts, frame.time_base = self._last, self._base
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left. A file without a frame is none that plays."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def need_pyav(where: str) -> Any:
    """The package. Raises UserError, naming `where`, without it."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: videos need PyAV: pip install 'compress-detectors[video]'") from error
    av.logging.set_level(None)
    return av


# --- details --------------------------------------------------------------------------------------------


def _open(address: str, format: str | None) -> Any:
    av = need_pyav(address)
    try:
        return av.open(address, format=format, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{address}: cannot be read as a video: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
