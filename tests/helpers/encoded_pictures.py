"""Encoded pictures of every kind that is taken, and files that only look like some."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.red_rectangle_model import picture


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **more)
    return out.getvalue()


def kinds() -> dict[str, bytes]:
    """A red rectangle in every format and pixel type; of animations the first frame has it."""
    rgb = Image.fromarray(picture((60, 90), (20, 10, 70, 40)))
    empty = Image.fromarray(picture((60, 90), None))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(128)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    return {
        "jpeg": encode(rgb, "JPEG", quality=95),
        "progressive jpeg": encode(rgb, "JPEG", quality=95, progressive=True),
        "grey jpeg": encode(rgb.convert("L"), "JPEG"),
        "cmyk jpeg": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "turned jpeg": encode(rgb.rotate(90, expand=True), "JPEG", quality=95, exif=exif),
        "png": encode(rgb),
        "png with alpha": encode(alpha),
        "palette png": encode(rgb.convert("P", palette=Image.Palette.ADAPTIVE)),
        "palette png, transparent": encode(rgb.convert("P", palette=Image.Palette.ADAPTIVE), transparency=0),
        "grey png": encode(rgb.convert("L")),
        "grey png with alpha": encode(rgb.convert("LA")),
        "bilevel png": encode(rgb.convert("1")),
        "16-bit png": encode(np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)),
        "animated png": encode(rgb, save_all=True, append_images=[empty, empty]),
        "webp": encode(rgb, "WEBP", quality=95),
        "lossless webp": encode(rgb, "WEBP", lossless=True),
        "webp with alpha": encode(alpha, "WEBP", lossless=True),
        "animated webp": encode(rgb, "WEBP", save_all=True, append_images=[empty], lossless=True),
        "bmp": encode(rgb, "BMP"),
        "gif": encode(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        "animated gif": encode(rgb, "GIF", save_all=True, append_images=[empty, empty]),
    }


def png_that_claims(width: int, height: int) -> bytes:
    """A valid header, and nothing behind it that would fill so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def webp_that_claims(width: int, height: int) -> bytes:
    """An animation's canvas: a decoder that is opened allocates it."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides + b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each costs a pass over all pixels."""
    data = encode(picture((200, 200), None), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def with_exif(jpeg: bytes, entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """A JPEG with these EXIF entries (tag, type, count, four bytes), however wrong they are."""
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    tiff += b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def hostile() -> dict[str, bytes]:
    """Files that must be refused, each with a 4xx."""
    good = kinds()
    return {
        "text": b"hello",
        "html": b"<html><img src=x onerror=alert(1)></html>",
        "zip": b"PK\x03\x04" + b"\0" * 100,
        "pdf": b"%PDF-1.7\n" + b"\0" * 100,
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "tiff": encode(picture((8, 8), None), "TIFF"),
        "ppm": encode(picture((8, 8), None), "PPM"),
        "ico": encode(picture((32, 32), None), "ICO"),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "only a jpeg's first bytes": b"\xff\xd8\xff",
        "only a png's first bytes": b"\x89PNG\r\n\x1a\n",
        "only a webp's first bytes": b"RIFF\0\0\0\0WEBP",
        "only a gif's first bytes": b"GIF89a",
        "only a bmp's first bytes": b"BM",
        "truncated jpeg": good["jpeg"][:-200],
        "truncated png": good["png"][:-40],
        "truncated webp": good["webp"][:-40],
        "truncated gif": good["gif"][: len(good["gif"]) // 2],
        "truncated bmp": good["bmp"][:200],
        "png with a broken sum": good["png"].replace(b"IDAT", b"IDAU"),
        "huge png": png_that_claims(50_000, 50_000),
        "huge webp": webp_that_claims(16_000, 16_000),
        "huge gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + good["gif"][10:],
        "huge bmp": good["bmp"][:18] + struct.pack("<ii", 60_000, 60_000) + good["bmp"][26:],
        "empty png": png_that_claims(0, 10),
        "a jpeg of 3000 scans": jpeg_of_many_scans(3000),
        "nothing but zeros": b"\0" * 5000,
    }
