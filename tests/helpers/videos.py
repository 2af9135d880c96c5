"""Videos of the red rectangle, which is elsewhere in each frame."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from deploy.predict.video import VideoWriter
from tests.helpers.red_rectangle_model import picture

RATE = Fraction(10)


def box_of(index: int) -> tuple[int, int, int, int]:
    """Of frame `index`, in a picture of 480 x 640."""
    x, y = 16 + index * 4 % 400, 16 + index * 2 % 300
    return x, y, x + 120, y + 80


def frames(count: int) -> Iterable[np.ndarray]:
    return (picture((480, 640), box_of(index)) for index in range(count))


def write_video(path: Path, pictures: Iterable[np.ndarray]) -> Path:
    with VideoWriter(path, RATE) as writer:
        for index, pixels in enumerate(pictures):
            writer.add(pixels, index / float(RATE))
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Let the file say that its pictures are shown turned: (a, b, c, d) of the track header of an MP4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    start += 4 + (32 if data[start] else 20) + 16
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
