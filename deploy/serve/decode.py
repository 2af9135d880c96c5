"""Encoded picture from any client → network canvas, through the same functions as `compress validate`.

The header is read before anything is decoded: format by content (never by name or Content-Type), number of parts and
of JPEG scans, pixel count. Only then `deploy.core.image.decode_oriented` decodes: the first frame of an animation,
turned as EXIF says, transparency dropped, CMYK and palettes converted.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deploy.core.canvas import fit_canvas
from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.core.image import decode_oriented, open_picture, picture_format
from deploy.serve.settings import RefusalError
from deploy.serve.structure import check_structure

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "GIF")
"""What a stranger may send: of those that `deploy.core.image` reads, the ones that browsers know."""
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif")


@dataclass(frozen=True)
class Decoded:
    """canvas: uint8 [3, H, W] of the card's input size. scale: canvas pixels per image pixel (x, y). size_hw: of the
    picture after it was turned from its EXIF orientation, 1 to 8."""

    canvas: np.ndarray
    scale: tuple[float, float]
    size_hw: tuple[int, int]
    orientation: int


def decode(data: bytes, card: ModelCard, *, max_pixels: int, where: str) -> Decoded:
    """Raises RefusalError: 415 for another format, 413 for too many pixels, 422 for a broken file; it names `where`."""
    _, width, height = read_header(data, where)
    if width * height > max_pixels:
        raise RefusalError(413, f"{where}: {width} x {height} pixels; at most {max_pixels} are taken")
    if width < 1 or height < 1:
        raise RefusalError(422, f"{where}: the picture has no pixels")
    try:
        pixels, orientation = decode_oriented(data, where)
        canvas, scale = fit_canvas(pixels, card)
    except UserError as error:
        raise RefusalError(422, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # what a parser raises on hostile bytes: struct.error, KeyError, zlib.error …
        raise RefusalError(422, f"{where}: cannot decode the image") from error
    return Decoded(canvas, scale, (pixels.shape[0], pixels.shape[1]), orientation)


def check_together(pictures: Sequence[bytes], *, max_pixels: int) -> None:
    """Raises RefusalError 413 when they have too many pixels together, and what `read_header` raises."""
    total = 0
    for index, data in enumerate(pictures):
        _, width, height = read_header(data, f"image {index}")
        total += width * height
    if total > max_pixels:
        raise RefusalError(413, f"the pictures have {total} pixels together; at most {max_pixels} are taken at a time")


def read_header(data: bytes, where: str) -> tuple[str, int, int]:
    """Format, width and height, without decoding. Raises RefusalError 415 or 422."""
    name = picture_format(data)
    if name not in {known.upper() for known in FORMATS}:
        raise RefusalError(415, f"{where}: not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file")
    try:
        check_structure(name, data)
    except ValueError as error:
        raise RefusalError(422, f"{where}: {error}") from error
    try:
        if name == "WEBP":  # Pillow allocates the whole canvas when it opens one
            return (name, *_webp_size(data))
        with open_picture(io.BytesIO(data), where) as file:
            return (name, *file.size)
    except Exception as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise RefusalError(413, f"{where}: too many pixels") from error
        raise RefusalError(422, f"{where}: broken {name} file") from error


# ----------------------------------------------------------------------------------------------------


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649, sections 2.5 to 2.7)."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ValueError("truncated")
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ValueError("unknown WebP")
