"""Count the parts of a picture's file before a decoder parses it.

Pillow reads headers in Python, a part after the other: a file of nothing but comments, or of fill bytes, would keep it
busy for half a minute. Here the parts are counted until there are too many.
"""

from __future__ import annotations

import re

MAX_PARTS = 10_000
"""Segments of a JPEG (bytes between them count too), chunks of a PNG, blocks of a GIF before its first picture. A PNG
of 20 MiB in libpng's chunks has 2,600."""
MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten. Every scan costs a pass over all pixels, and takes twenty bytes."""


def check_structure(kind: str, data: bytes) -> None:
    """Raises ValueError, with a few words for the client, for a file of too many parts. `kind` is Pillow's name of the
    format; those that are not JPEG, PNG or GIF are parsed by libraries, and quickly."""
    if kind == "JPEG":
        _check_jpeg(data)
    elif kind == "PNG":
        _check_png(data)
    elif kind == "GIF":
        _check_gif(data)


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # those within a scan's data left out


def _check_jpeg(data: bytes) -> None:
    """Count parts and scans. What applications put into segments and behind the picture (previews, short films) is
    not looked at."""
    place, parts, scans = 2, 0, 0
    while parts <= MAX_PARTS and scans <= MAX_JPEG_SCANS:
        until = len(data) if scans else min(len(data), place + MAX_PARTS + 2)
        marker = _MARKER.search(data, place, until)
        if marker is None:
            if until == len(data):
                return
            break
        kind, between = marker[1], marker.start() - place
        parts += 1 if scans else 1 + between
        if kind == b"\xd9":
            return
        scans += kind == b"\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    raise ValueError(f"more than {MAX_JPEG_SCANS} JPEG scans" if scans > MAX_JPEG_SCANS else _TOO_MANY)


def _check_png(data: bytes) -> None:
    place = 8
    for _ in range(MAX_PARTS):
        if place >= len(data):
            return
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    raise ValueError(_TOO_MANY)


def _check_gif(data: bytes) -> None:
    flags = data[10] if len(data) > 10 else 0
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False
    for _ in range(MAX_PARTS):
        if place >= len(data):
            return
        byte = data[place]
        if in_extension:
            in_extension = byte > 0
            place += 1 + byte
        elif byte in b",;":  # a picture, the end
            return
        else:
            in_extension = byte == 0x21
            place += 2 if in_extension else 1
    raise ValueError(_TOO_MANY)


_TOO_MANY = f"more than {MAX_PARTS} parts in the file"
