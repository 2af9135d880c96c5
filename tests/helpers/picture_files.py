"""Writers of picture files, with every choice that a format has: PNG and TIFF by hand, the rest through Pillow.

They are independent of the code under test: what a file shows is known from the array that went in.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

PNG_COLOR = {"grey": 0, "rgb": 2, "palette": 3, "grey alpha": 4, "rgb alpha": 6}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a file with these stored pixels shows, by the definition of EXIF's orientation."""
    if orientation in (2, 4, 5, 7):  # mirrored
        pixels = pixels[:, ::-1]
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, turns))


def exif_block(orientation: int, *, big: bool = False) -> bytes:
    """EXIF without its name in front: one IFD with one tag."""
    order = ">" if big else "<"
    head = b"MM\0*" if big else b"II*\0"
    return head + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def xmp_packet(orientation: int, *, as_element: bool = False) -> bytes:
    tag = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if as_element else ""
    attribute = "" if as_element else f' tiff:Orientation="{orientation}"'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{attribute}>{tag}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def png(
    samples: np.ndarray,
    color: str,
    depth: int,
    *,
    interlaced: bool = False,
    palette: np.ndarray | None = None,
    transparency: bytes | None = None,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    late: bool = False,
) -> bytes:
    """A PNG of samples [h, w, channels]. late: EXIF and XMP stand behind the pixels."""
    height, width = samples.shape[:2]
    lines = (
        b"".join(
            _png_lines(samples[y::dy, x::dx], depth)
            for x, y, dx, dy in _ADAM7
            if samples[y::dy, x::dx].size  # a pass without pixels has no lines
        )
        if interlaced
        else _png_lines(samples, depth)
    )
    told = b""
    if exif is not None:
        told += _chunk(b"eXIf", exif)
    if xmp is not None:
        told += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    body = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, PNG_COLOR[color], 0, 0, int(interlaced)))
    if palette is not None:
        body += _chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    if transparency is not None:
        body += _chunk(b"tRNS", transparency)
    pixels = zlib.compress(lines)
    half = len(pixels) // 2
    body += b"" if late else told
    body += _chunk(b"IDAT", pixels[:half]) + _chunk(b"IDAT", pixels[half:])
    body += told if late else b""
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


def tiff(
    samples: np.ndarray,
    photometric: int,
    bits: int,
    *,
    kind: int = 1,
    big_endian: bool = False,
    big_tiff: bool = False,
    planar: bool = False,
    deflate: bool = False,
    extra: int | None = None,
    palette: np.ndarray | None = None,
    orientation: int | None = None,
    xmp: bytes | None = None,
    pages: int = 1,
) -> bytes:
    """A TIFF of samples [h, w, channels], one strip a page; pages after the first are its negative.

    kind: SampleFormat: 1 unsigned, 2 signed, 3 float. extra: ExtraSamples of the last channel, 1 premultiplied, 2 not.
    """
    order = ">" if big_endian else "<"
    height, width, channels = samples.shape
    head = (b"MM" if big_endian else b"II") + struct.pack(f"{order}H", 43 if big_tiff else 42)
    out = bytearray(head + (struct.pack(f"{order}HHQ", 8, 0, 0) if big_tiff else struct.pack(f"{order}I", 0)))
    link = len(out) - (8 if big_tiff else 4)
    for page in range(pages):
        flat = _tiff_bytes(samples if page == 0 else samples.max() - samples, bits, kind, order)
        planes = (
            [_tiff_bytes(samples[..., i : i + 1], bits, kind, order) for i in range(channels)] if planar else [flat]
        )
        strips = [zlib.compress(plane) if deflate else plane for plane in planes]
        tags: list[tuple[int, int, list[int] | bytes]] = [
            (256, 4, [width]),
            (257, 4, [height]),
            (258, 3, [bits] * channels),
            (259, 3, [8 if deflate else 1]),
            (262, 3, [photometric]),
            (277, 3, [channels]),
            (278, 4, [height]),
            (284, 3, [2 if planar else 1]),
            (339, 3, [kind] * channels),
        ]
        places = []
        for strip in strips:
            places.append(len(out))
            out += strip + b"\0" * (len(strip) % 2)
        tags += [(273, 4, places), (279, 4, [len(strip) for strip in strips])]
        if orientation is not None:
            tags.append((274, 3, [orientation]))
        if palette is not None:
            tags.append((320, 3, (palette.astype(int).T * 257).reshape(-1).tolist()))
        if extra is not None:
            tags.append((338, 3, [extra]))
        if xmp is not None:
            tags.append((700, 1, xmp))
        offset = _write_ifd(out, sorted(tags), order, big_tiff)
        struct.pack_into(f"{order}{'Q' if big_tiff else 'I'}", out, link, offset)
        link = len(out) - (8 if big_tiff else 4)
    return bytes(out)


def through_pillow(pixels: np.ndarray | Image.Image, kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **more)
    return out.getvalue()


def jpeg_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment in front."""
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def jpeg_with(jpeg: bytes, *, exif: bytes | None = None, xmp: bytes | None = None) -> bytes:
    if xmp is not None:
        jpeg = jpeg_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    return jpeg if exif is None else jpeg_segment(jpeg, 0xE1, b"Exif\0\0" + exif)


# --- details --------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_lines(samples: np.ndarray, depth: int) -> bytes:
    """Filter type 0 before each line; fewer than eight bits are packed from the left."""
    rows = samples.reshape(len(samples), -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8).reshape(len(rows), -1)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(len(rows), -1), axis=1)
    return np.pad(packed, ((0, 0), (1, 0))).astype(np.uint8).tobytes()


def _tiff_bytes(samples: np.ndarray, bits: int, kind: int, order: str) -> bytes:
    if bits < 8:
        rows = samples.astype(np.uint8).reshape(len(samples), -1, 1)
        return np.packbits(np.unpackbits(rows, axis=-1)[..., 8 - bits :].reshape(len(rows), -1), axis=1).tobytes()
    letter = {1: "u", 2: "i", 3: "f"}[kind]
    return samples.astype(f"{order}{letter}{bits // 8}").tobytes()


def _write_ifd(out: bytearray, tags: list[tuple[int, int, list[int] | bytes]], order: str, big: bool) -> int:
    """Append values that need room, then the IFD, whose last bytes are the link to the next. Returns where it is."""
    room, count_type = (8, "Q") if big else (4, "I")
    rows = b""
    for tag, kind, values in tags:
        packed = (
            values
            if isinstance(values, bytes)
            else struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        )
        if len(packed) > room:
            place = len(out)
            out += packed + b"\0" * (len(packed) % 2)
            packed = struct.pack(f"{order}{count_type}", place)
        rows += struct.pack(f"{order}HH{count_type}", tag, kind, len(values)) + packed.ljust(room, b"\0")
    place = len(out)
    out += struct.pack(f"{order}{'Q' if big else 'H'}", len(tags)) + rows + bytes(room)
    return place
