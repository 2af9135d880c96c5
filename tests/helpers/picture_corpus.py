"""Picture files of every kind, with the pixels that each shows, or the words that refuse it.

`kinds(seed)` has one file a kind; `pairs(seed)` combines choices of a format at random. The names of the files say
nothing about what is in them: their endings are drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.encoded_pictures import png_that_claims
from tests.helpers.picture_files import (
    exif_block,
    jpeg_segment,
    jpeg_with,
    png,
    through_pillow,
    tiff,
    upright,
    xmp_packet,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".JPG", ".Png")


@dataclass(frozen=True)
class PictureFile:
    """pixels: uint8 [h, w, 3] as shown, None where it is refused with words that have `refusal` in them.
    off: by how many levels the pixels may differ (a formula with another rounding)."""

    kind: str
    data: bytes
    pixels: np.ndarray | None = None
    refusal: str = ""
    off: int = 0


def kinds(seed: int) -> list[PictureFile]:
    random = np.random.default_rng(seed)
    parts = (_pngs, _turned, _jpegs, _tiffs, _others, _refused)
    return [file for part in parts for file in part(random)]


def pairs(seed: int, count: int) -> list[PictureFile]:
    """Files of PNG, TIFF, JPEG and WebP in which all choices are drawn."""
    random = np.random.default_rng(seed)
    makers = (_any_png, _any_tiff, _any_jpeg, _any_webp)
    return [makers[index % len(makers)](random, index) for index in range(count)]


def suffix(file: PictureFile, seed: int) -> str:
    """An ending that depends on nothing that is in the file."""
    return SUFFIXES[(sum(file.kind.encode()) + seed) % len(SUFFIXES)]


# --- one file a kind ------------------------------------------------------------------------------------


def _pngs(random: np.random.Generator) -> Iterator[PictureFile]:
    for color, depth in PNG_KINDS:
        for interlaced in (False, True):
            samples, shown, more = _png_samples(random, color, depth)
            name = f"png {color} {depth} bits{' interlaced' * interlaced}"
            yield PictureFile(name, png(samples, color, depth, interlaced=interlaced, **more), shown)
    for color, depth, transparency in (
        ("grey", 8, b"\0\7"),
        ("grey", 16, b"\1\2"),
        ("rgb", 8, b"\0\1\0\2\0\3"),
        ("palette", 8, bytes(range(0, 250, 10))),
        ("palette", 2, b"\0"),
    ):
        samples, shown, more = _png_samples(random, color, depth)
        data = png(samples, color, depth, transparency=transparency, **more)
        yield PictureFile(f"png {color} {depth} bits transparent", data, shown)
    shown = _picture(random)
    frames = [Image.fromarray(255 - shown)]
    yield PictureFile("png animated", through_pillow(shown, "PNG", save_all=True, append_images=frames), shown)


PNG_KINDS = [("grey", 1), ("grey", 2), ("grey", 4), ("grey", 8), ("grey", 16), ("rgb", 8), ("rgb", 16)]
PNG_KINDS += [("palette", 1), ("palette", 2), ("palette", 4), ("palette", 8)]
PNG_KINDS += [("grey alpha", 8), ("grey alpha", 16), ("rgb alpha", 8), ("rgb alpha", 16)]


def _turned(random: np.random.Generator) -> Iterator[PictureFile]:
    """Every orientation in every container of EXIF or XMP; EXIF wins, even where it says 1."""
    a = _picture(random)
    image = Image.fromarray(a)
    for o in range(1, 9):
        exif, xmp, shown = exif_block(o, big=o % 2 == 0), xmp_packet(o, as_element=o % 3 == 0), upright(a, o)
        jpeg = through_pillow(a, "JPEG", quality=95)
        plain = _plain(jpeg)
        yield PictureFile(f"png exif {o}", png(a, "rgb", 8, exif=exif), shown)
        yield PictureFile(f"png exif behind {o}", png(a, "rgb", 8, exif=exif, late=True, interlaced=o > 4), shown)
        yield PictureFile(f"png xmp {o}", png(a, "rgb", 8, xmp=xmp, late=o > 5), shown)
        yield PictureFile(f"jpeg exif {o}", jpeg_with(jpeg, exif=exif), upright(plain, o))
        yield PictureFile(f"jpeg xmp {o}", jpeg_with(jpeg, xmp=xmp), upright(plain, o))
        yield PictureFile(f"webp exif {o}", through_pillow(a, "WEBP", lossless=True, exif=b"Exif\0\0" + exif), shown)
        yield PictureFile(f"webp xmp {o}", through_pillow(a, "WEBP", lossless=True, xmp=xmp), shown)
        yield PictureFile(f"tiff tag {o}", tiff(a, 2, 8, orientation=o, big_endian=o > 4), shown)
        yield PictureFile(f"tiff xmp {o}", tiff(a, 2, 8, xmp=xmp), shown)
        yield PictureFile(f"tiff deflate tag {o}", tiff(a, 2, 8, orientation=o, deflate=True), shown)
        yield PictureFile(f"png exif 1, xmp {o}", png(a, "rgb", 8, exif=exif_block(1), xmp=xmp), a)
        avif = through_pillow(image, "AVIF", quality=90, exif=b"Exif\0\0" + exif)
        yield PictureFile(f"avif exif {o}", avif, upright(_plain(through_pillow(image, "AVIF", quality=90)), o))
    broken = b"II*\0\xff\xff\xff\xff"
    yield PictureFile("png exif broken", png(a, "rgb", 8, exif=broken), a)
    yield PictureFile("jpeg exif broken", jpeg_with(jpeg, exif=broken), plain)
    for wrong in (0, 9):
        yield PictureFile(f"jpeg exif {wrong}", jpeg_with(jpeg, exif=exif_block(wrong)), plain)


def _jpegs(random: np.random.Generator) -> Iterator[PictureFile]:
    a = _picture(random)
    variants: dict[str, dict[str, Any]] = {
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "4:2:0": {"subsampling": 2},
        "progressive": {"progressive": True},
        "progressive 4:4:4": {"progressive": True, "subsampling": 0},
        "restart markers": {"restart_marker_blocks": 1},
        "of rgb": {"keep_rgb": True},
        "quality 5": {"quality": 5},
    }
    for name, more in variants.items():
        data = through_pillow(a, "JPEG", **more)
        yield PictureFile(f"jpeg {name}", data, _plain(data))
    grey = through_pillow(Image.fromarray(a).convert("L"), "JPEG")
    yield PictureFile("jpeg grey", grey, _plain(grey))
    cmyk = through_pillow(Image.fromarray(np.dstack([a, a[..., :1]]), "CMYK"), "JPEG", quality=95)
    yield PictureFile("jpeg cmyk", cmyk, _plain(cmyk))
    place = cmyk.index(b"Adobe") + 11
    ycck = cmyk[:place] + b"\2" + cmyk[place + 1 :]
    yield PictureFile("jpeg ycck", ycck, _plain(ycck))
    jpeg = through_pillow(a, "JPEG")
    mpo = through_pillow(a, "MPO", save_all=True, append_images=[Image.fromarray(255 - a)])
    yield PictureFile("mpo", mpo, _plain(jpeg))
    yield PictureFile("jpeg, more behind it", jpeg + b"film" * 50, _plain(jpeg))
    yield PictureFile("jpeg, comment", jpeg_segment(jpeg, 0xFE, b"x" * 999), _plain(jpeg))
    yield PictureFile(
        "jpeg exif and xmp", jpeg_with(jpeg, exif=exif_block(6), xmp=xmp_packet(3)), upright(_plain(jpeg), 6)
    )
    scan = jpeg.index(b"\xff\xda")
    middle = scan + (len(jpeg) - scan) // 2
    damaged = jpeg[:middle] + bytes(byte ^ 0x15 for byte in jpeg[middle : middle + 8]) + jpeg[middle + 8 :]
    yield PictureFile("jpeg, noticed by nobody", damaged, _plain(damaged))


def _tiffs(random: np.random.Generator) -> Iterator[PictureFile]:
    for kind in TIFF_KINDS:
        for big_endian in (False, True):
            data, shown, off = _tiff_file(random, kind, big_endian=big_endian)
            yield PictureFile(f"tiff {kind} {'MM' if big_endian else 'II'}", data, shown, off=off)
    for kind in ("rgb 8", "grey 16"):
        data, shown, off = _tiff_file(random, kind, big_tiff=True)
        yield PictureFile(f"bigtiff {kind}", data, shown, off=off)
    a = _picture(random)
    yield PictureFile("tiff planar", tiff(a, 2, 8, planar=True), a)
    yield PictureFile("tiff of pages", tiff(a, 2, 8, pages=3), a)
    yield PictureFile("tiff lzw", through_pillow(a, "TIFF", compression="tiff_lzw"), a)
    yield PictureFile("tiff packbits", through_pillow(a, "TIFF", compression="packbits"), a)
    inside = through_pillow(a, "TIFF", compression="jpeg", quality=95)
    yield PictureFile("tiff of jpeg", inside, _plain(inside))
    twelve = random.integers(0, 4096, (9, 14, 1))
    yield PictureFile("tiff 12 bits in 16", tiff(twelve, 1, 16), _grey(twelve >> 8))


TIFF_KINDS = ("grey 1", "grey 8", "grey 16", "white 0", "rgb 8", "rgb 16", "palette", "cmyk", "grey alpha", "rgb alpha",
              "rgb premultiplied")  # fmt: skip


def _others(random: np.random.Generator) -> Iterator[PictureFile]:
    a = _picture(random)
    image, other = Image.fromarray(a), Image.fromarray(255 - a)
    alpha = np.dstack([a, random.integers(0, 256, a.shape[:2], dtype=np.uint8)])
    colors = image.quantize(32)
    shown = np.asarray(colors.convert("RGB"))
    few = Image.fromarray(np.asarray(image.convert("L")) // 16 * 16).quantize(16)
    yield PictureFile("webp lossless", through_pillow(a, "WEBP", lossless=True), a)
    lossy = through_pillow(a, "WEBP", quality=70)
    yield PictureFile("webp lossy", lossy, _plain(lossy))
    yield PictureFile("webp alpha", through_pillow(alpha, "WEBP", lossless=True, exact=True), a)
    animated = through_pillow(a, "WEBP", lossless=True, save_all=True, append_images=[other])
    yield PictureFile("webp animated", animated, a)
    yield PictureFile("gif", through_pillow(colors, "GIF", interlace=0), shown)
    yield PictureFile("gif interlaced", through_pillow(colors, "GIF", interlace=1), shown)
    yield PictureFile("gif transparent", through_pillow(colors, "GIF", transparency=3), shown)
    frames = [other.quantize(32)]
    yield PictureFile("gif animated", through_pillow(colors, "GIF", save_all=True, append_images=frames), shown)
    yield PictureFile("bmp", through_pillow(a, "BMP"), a)
    yield PictureFile("bmp of 8 bits", through_pillow(colors, "BMP"), shown)
    yield PictureFile(
        "bmp of 1 bit", through_pillow(Image.fromarray(a[..., 0] > 99), "BMP"), _grey((a[..., 0] > 99) * 255)
    )
    yield PictureFile("bmp of 32 bits", through_pillow(alpha, "BMP"), a)
    yield PictureFile("png of few colours", through_pillow(few, "PNG", bits=4), np.asarray(few.convert("RGB")))
    yield PictureFile("ppm", through_pillow(a, "PPM"), a)
    yield PictureFile("pgm", through_pillow(a[..., 0], "PPM"), _grey(a[..., 0]))
    deep = random.integers(0, 65536, (9, 14), dtype=np.uint16)
    yield PictureFile("pgm of 16 bits", b"P5 14 9 65535\n" + deep.astype(">u2").tobytes(), _grey(deep >> 8))
    yield PictureFile("ppm as text", b"P3 2 1 255\n1 2 3 4 5 6\n", np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    yield PictureFile("jpeg 2000", through_pillow(a, "JPEG2000"), a)
    yield PictureFile("jpeg 2000 codestream", through_pillow(a, "JPEG2000", no_jp2=True), a)
    yield PictureFile("jpeg 2000 alpha", through_pillow(alpha, "JPEG2000"), a)
    avif = through_pillow(a, "AVIF", quality=80)
    yield PictureFile("avif", avif, _plain(avif))


def _refused(random: np.random.Generator) -> Iterator[PictureFile]:
    a = _picture(random, 24, 32)
    number = a[..., :1].astype(np.int64)
    for name, bits, kind, refusal in (
        ("float32", 32, 3, "float pixels have no fixed range; convert to 8 or 16 bits"),
        ("float64", 64, 3, ""),
        ("int32", 32, 2, "integer pixels of 32 bits or with a sign; convert to 8 or 16 bits"),
        ("uint32", 32, 1, ""),
        ("int16", 16, 2, "integer pixels of 32 bits or with a sign"),
    ):
        for big_endian in (False, True):
            data = tiff(number, 1, bits, kind=kind, big_endian=big_endian)
            yield PictureFile(f"tiff {name} {'MM' if big_endian else 'II'}", data, refusal=refusal)
    lab = through_pillow(Image.fromarray(a, "LAB"), "TIFF")
    yield PictureFile("tiff lab", lab, refusal="LAB pixels; convert to RGB")
    jpeg, lossless = through_pillow(a, "JPEG"), png(a, "rgb", 8)
    frame = jpeg.index(b"\xff\xc0") + 4
    yield PictureFile("jpeg of 12 bits", jpeg[:frame] + b"\x0c" + jpeg[frame + 1 :])
    yield PictureFile("jpeg without rows", jpeg[: frame + 1] + b"\0\0" + jpeg[frame + 3 :])
    cut: dict[str, bytes] = {
        "jpeg": jpeg,
        "progressive jpeg": through_pillow(a, "JPEG", progressive=True),
        "png": lossless,
        "interlaced png": png(a, "rgb", 8, interlaced=True),
        "webp": through_pillow(a, "WEBP", lossless=True),
        "gif": through_pillow(Image.fromarray(a).quantize(64), "GIF"),
        "bmp": through_pillow(a, "BMP"),
        "tiff": through_pillow(a, "TIFF"),
        "lzw tiff": through_pillow(a, "TIFF", compression="tiff_lzw"),
        "ppm": through_pillow(a, "PPM"),
        "avif": through_pillow(a, "AVIF"),
    }
    for name, data in cut.items():
        yield PictureFile(f"half of a {name}", data[: len(data) // 2])
        yield PictureFile(f"the first 40 bytes of a {name}", data[:40])
    yield PictureFile("jpeg without its end", jpeg[:-200])
    yield PictureFile("png without its rows", png_that_claims(30, 20))
    yield PictureFile("png with a broken sum", lossless.replace(b"IDAT", b"IDAU"))
    yield PictureFile("png without pixels", png_that_claims(0, 10))
    too_many = "23171 x 23171 pixels; at most 536870912 are taken"
    yield PictureFile("png beyond the limit", png_that_claims(23171, 23171), refusal=too_many)
    yield PictureFile("empty", b"", refusal="the file is empty")
    unknown = "unknown format; known are JPEG, PNG, WEBP"
    for name, data in {
        "text": b"not a picture at all, only words",
        "html": b"<html><img src=x></html>" * 3,
        "zip": b"PK\x03\x04" + bytes(100),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "bigtiff of big endian": tiff(a, 2, 8, big_tiff=True, big_endian=True),
        "ico": through_pillow(a, "ICO"),
        "tga": through_pillow(a, "TGA"),
        "zeros": bytes(5000),
    }.items():
        yield PictureFile(name, data, refusal=unknown)


# --- drawn ----------------------------------------------------------------------------------------------


def _any_png(random: np.random.Generator, index: int) -> PictureFile:
    color, depth = PNG_KINDS[random.integers(len(PNG_KINDS))]
    samples, shown, more = _png_samples(random, color, depth)
    o, told = _marker(random)
    if color in ("grey", "rgb") and random.random() < 0.4:
        more["transparency"] = b"\0\1" * (3 if color == "rgb" else 1)
    if color == "palette" and random.random() < 0.4:
        more["transparency"] = bytes(random.integers(0, 256, 2, dtype=np.uint8))
    interlaced, late = random.random(2) < 0.5
    data = png(samples, color, depth, interlaced=bool(interlaced), late=bool(late), **told, **more)
    return PictureFile(f"{index} png {color} {depth} {o} {sorted(told)} {interlaced} {late}", data, upright(shown, o))


def _any_tiff(random: np.random.Generator, index: int) -> PictureFile:
    kind = TIFF_KINDS[random.integers(len(TIFF_KINDS))]
    o = int(random.integers(1, 9))
    by_tag, deflate, big_endian, big_tiff = (bool(x) for x in random.random(4) < 0.5)
    big_tiff = big_tiff and not big_endian
    more: dict[str, Any] = {"orientation": o} if by_tag else {"xmp": xmp_packet(o)}
    more |= {"deflate": deflate, "big_endian": big_endian, "big_tiff": big_tiff, "pages": int(random.integers(1, 3))}
    data, shown, off = _tiff_file(random, kind, **more)
    return PictureFile(f"{index} tiff {kind} {more}", data, upright(shown, o), off=off)


def _any_jpeg(random: np.random.Generator, index: int) -> PictureFile:
    a = _picture(random)
    mode = ("RGB", "L", "CMYK")[random.integers(3)]
    image = Image.fromarray(a).convert(mode)
    more: dict[str, Any] = {"progressive": bool(random.random() < 0.5), "quality": int(random.integers(20, 100))}
    if mode == "RGB":
        more["subsampling"] = int(random.integers(3))
    plain = through_pillow(image, "JPEG", **more)
    o, told = _marker(random)
    return PictureFile(
        f"{index} jpeg {mode} {more} {o} {sorted(told)}", jpeg_with(plain, **told), upright(_plain(plain), o)
    )


def _any_webp(random: np.random.Generator, index: int) -> PictureFile:
    a = _picture(random)
    alpha, animated = random.random(2) < 0.4
    opacity = np.full((*a.shape[:2], 1), 255, np.uint8) if animated else 255 - a[..., :1]  # an animation is composed
    image = Image.fromarray(np.dstack([a, opacity]) if alpha else a)
    o, told = _marker(random)
    more: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(180)]} if animated else {}
    if "exif" in told:
        told["exif"] = b"Exif\0\0" + told["exif"]
    data = through_pillow(image, "WEBP", lossless=True, exact=True, **told, **more)
    return PictureFile(f"{index} webp {alpha} {animated} {o} {sorted(told)}", data, upright(a, o))


def _marker(random: np.random.Generator) -> tuple[int, dict[str, Any]]:
    """An orientation, and the blocks that say so: EXIF, XMP, or an EXIF that is right and an XMP that is not."""
    o, kind = int(random.integers(1, 9)), random.integers(3)
    if kind == 0:
        return o, {"exif": exif_block(o, big=bool(random.random() < 0.5))}
    if kind == 1:
        return o, {"xmp": xmp_packet(o, as_element=bool(random.random() < 0.5))}
    return o, {"exif": exif_block(o), "xmp": xmp_packet(int(random.integers(1, 9)))}


# --- details --------------------------------------------------------------------------------------------


def _picture(random: np.random.Generator, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Smooth with some noise, unlike in every corner, never square: uint8 [h, w, 3]."""
    height = int(random.integers(9, 20)) if height is None else height
    width = height + int(random.integers(1, 12)) if width is None else width
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)]
    noise = random.normal(0, 12, (height, width, 3))
    return (np.dstack(planes) + noise).clip(0, 255).astype(np.uint8)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.reshape(*values.shape[:2], 1).astype(np.uint8), 3, 2)


def _png_samples(random: np.random.Generator, color: str, depth: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(samples, pixels shown, further arguments of `png`)."""
    channels = {"grey": 1, "rgb": 3, "palette": 1, "grey alpha": 2, "rgb alpha": 4}[color]
    height, width = (int(side) for side in random.integers(1, 20, 2))
    samples = random.integers(0, 2**depth, (height, width, channels))
    if color == "palette":
        palette = random.integers(0, 256, (2**depth, 3))
        return samples, palette[samples[..., 0]].astype(np.uint8), {"palette": palette}
    eight = samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)
    return samples, _grey(eight[..., :1]) if channels < 3 else eight[..., :3].astype(np.uint8), {}


def _tiff_file(random: np.random.Generator, kind: str, **more: Any) -> tuple[bytes, np.ndarray, int]:
    """(file, pixels shown, by how much they may differ)."""
    a = _picture(random)
    deep = random.integers(0, 65536, a.shape)
    alpha = random.choice([128, 200, 255], (*a.shape[:2], 1))
    palette = random.integers(0, 256, (256, 3))
    bit = random.integers(0, 2, (*a.shape[:2], 1))
    premultiplied = np.dstack([a.astype(int) * alpha // 255, alpha])
    cmyk = random.integers(0, 256, (*a.shape[:2], 4))
    files: dict[str, Callable[[], tuple[bytes, np.ndarray, int]]] = {
        "grey 1": lambda: (tiff(bit, 1, 1, **more), _grey(bit * 255), 0),
        "grey 8": lambda: (tiff(a[..., :1], 1, 8, **more), _grey(a[..., :1]), 0),
        "grey 16": lambda: (tiff(deep[..., :1], 1, 16, **more), _grey(deep[..., :1] >> 8), 0),
        "white 0": lambda: (tiff(a[..., :1], 0, 8, **more), _grey(255 - a[..., :1]), 0),
        "rgb 8": lambda: (tiff(a, 2, 8, **more), a, 0),
        "rgb 16": lambda: (tiff(deep, 2, 16, **more), (deep >> 8).astype(np.uint8), 0),
        "palette": lambda: (
            tiff(a[..., :1], 3, 8, palette=palette, **more), palette[a[..., 0]].astype(np.uint8), 0),
        "cmyk": lambda: (tiff(cmyk, 5, 8, **more), _of_cmyk(cmyk), 1),
        "grey alpha": lambda: (tiff(np.dstack([a[..., :1], alpha]), 1, 8, extra=2, **more), _grey(a[..., :1]), 0),
        "rgb alpha": lambda: (tiff(np.dstack([a, alpha]), 2, 8, extra=2, **more), a, 0),
        "rgb premultiplied": lambda: (tiff(premultiplied, 2, 8, extra=1, **more), a, 2),
    }  # fmt: skip
    return files[kind]()


def _of_cmyk(cmyk: np.ndarray) -> np.ndarray:
    return ((255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255).round().astype(np.uint8)


def _plain(data: bytes) -> np.ndarray:
    """What Pillow alone makes of a file whose pixels are lossy."""
    with Image.open(io.BytesIO(data)) as file:
        return np.asarray(file.convert("RGB"))
