"""Read pictures: the one decoder of training, checks, conversion, calibration, validation, benchmarks and server.

The rules, with what follows from them, are in docs/pictures.md:

- The format is told by content, never by name: those of `FORMATS`, of which animations and pages give the first.
- The pixels are turned upright by the orientation in EXIF, or in XMP where EXIF has none.
- Of 16 bits a channel the upper eight are taken. Floats, signed integers and those of more bits are refused.
- Transparency is dropped: what remains are the colours that the file holds under it.
- CMYK becomes RGB by Pillow's formula, without a colour profile.
- A file that is truncated, or has more than `MAX_PIXELS` pixels, is refused. Pillow's own limit does not count.

Without torch. Everything that is wrong with a file is one UserError that begins with its path.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile

from deploy.core.errors import UserError, first_line
from deploy.core.image_folder import missing
from deploy.core.storage import is_remote, read_bytes

MAX_PIXELS = 2**29
"""Of a picture: 23,170 x 23,170. A larger one, at four bytes a pixel, leaves the 32-bit sizes of image libraries."""

FORMATS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "BMP": "BmpImagePlugin",
    "GIF": "GifImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "AVIF": "AvifImagePlugin",
}
"""Formats that are read: Pillow's name of each, and its module."""

Picture = str | Path | bytes | np.ndarray | Image.Image
"""A file, its bytes, pixels uint8 [h, w, 3] RGB, or a PIL image."""


def load_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB uint8 [H, W, 3], by the rules above: an array of its own, which may be written to.

    Raises UserError when the file is missing, not an image, broken, too large, or of pixels that are not taken.
    """
    try:
        return decode_image(read_image_bytes(path), str(path))
    except MemoryError as error:
        raise UserError(f"{path}: cannot be read as an image: it does not fit into memory") from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `load_image` gives, without decoding. Raises UserError as far as the header shows why."""
    try:
        with _opened(path) as stream, open_picture(stream, str(path)) as file:
            _check_kind(file, str(path))
            return _upright_size(file)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_picture(picture: Picture) -> np.ndarray:
    """RGB uint8 [h, w, 3] of a picture in any form; a PIL image is turned as its EXIF orientation says, like a file.

    Raises UserError as `load_image`, for an array of another kind, and for what is no picture.
    """
    if isinstance(picture, np.ndarray):
        return check_pixels(picture)
    if isinstance(picture, bytes):
        return decode_image(picture)
    if isinstance(picture, (str, Path)):
        return load_image(Path(picture))
    if not isinstance(picture, Image.Image):
        raise UserError(f"a picture is a path, bytes, pixels or a PIL image, got {type(picture).__name__}")
    return rgb(picture)


def check_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return the array. Raises UserError unless it is uint8 [height, width, 3] and not empty."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(f"pixels must be uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def read_image_bytes(path: Path) -> bytes:
    """The encoded image. Raises UserError when it cannot be read."""
    try:
        return read_bytes(path)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """`load_image` from the encoded bytes; errors name `where`."""
    return decode_oriented(data, where)[0]


def decode_oriented(data: bytes, where: str = "image") -> tuple[np.ndarray, int]:
    """`decode_image`, and the orientation (1 to 8) from which the pixels were turned upright."""
    with open_picture(io.BytesIO(data), where) as file:
        _check_kind(file, where)
        try:
            pixels = _jpeg_pixels(file, data)
            if pixels is not None:
                turn = orientation(file)
                return _turned(pixels, turn), turn
            _load(file)  # some formats have their EXIF at the end
            turn = orientation(file)
            return rgb(file), turn
        except UserError as error:
            raise UserError(f"{where}: cannot be read as an image: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # parsers raise anything on broken bytes: OSError, SyntaxError, struct.error …
            raise UserError(f"{where}: cannot be read as an image: {first_line(error)}") from error


def open_picture(stream: IO[bytes], where: str) -> ImageFile.ImageFile:
    """Open a picture by its content, as far as the header. Raises UserError that begins with `where`.

    `PIL.Image.open` would also ask Pillow's limit of pixels, which is one for the whole process.
    """
    prefix = stream.read(32)
    name = picture_format(prefix)
    if name is None:
        why = f"unknown format; known are {', '.join(FORMATS)}" if prefix else "the file is empty"
        raise UserError(f"{where}: cannot be read as an image: {why}")
    try:
        import_module(f"PIL.{FORMATS[name]}")
        opened = _factory(name, stream)
    except MemoryError:
        raise
    except Exception as error:  # parsers raise anything on broken bytes: OSError, SyntaxError, struct.error …
        raise UserError(f"{where}: cannot be read as an image: broken {name} file: {first_line(error)}") from error
    return opened


def rgb(image: Image.Image) -> np.ndarray:
    """A PIL image as RGB uint8 [H, W, 3], upright, by the rules above. Raises UserError for pixels not taken."""
    problem = _pixel_problem(image)
    if problem is not None:
        raise UserError(problem)
    image.load()
    turn = orientation(image)
    if image.mode.startswith("I"):  # grey of 16 bits: Pillow would cut at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
        return _turned(np.repeat(grey[..., None], 3, 2), turn)
    if image.mode != "RGB":
        if "transparency" in image.info:  # it is dropped; Pillow would warn, or add a channel
            image = image.copy()
            del image.info["transparency"]
        image = image.convert("RGBA").convert("RGB") if image.mode == "RGBa" else image.convert("RGB")
    return _turned(np.array(image), turn)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8, or that of XMP where EXIF has none; 1 where none can be read."""
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PngImageFile's own would decode
    except Exception:  # a broken EXIF block is no reason to refuse the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def picture_format(data: bytes) -> str | None:
    """Name in `FORMATS` of what begins with these bytes, 16 or more; None: unknown."""
    for name, magic in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return "AVIF"
    return "PPM" if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace() else None


def pixel_doubt(pixels: np.ndarray) -> str | None:
    """Say what is odd about decoded pixels uint8 [h, w, 3], although they could be read; None: nothing.

    A picture nearly without contrast is what remains of 12 bits stored in 16, of an empty frame, of a broken camera.
    """
    rows, columns = (max(1, side // _GRID) for side in pixels.shape[:2])
    if _spread(pixels[::rows, ::columns]) >= MIN_CONTRAST or _spread(pixels) >= MIN_CONTRAST:
        return None
    color = ", ".join(str(round(float(value))) for value in pixels.reshape(-1, 3).mean(0))
    return f"nearly one colour, about ({color}): 99 % of its pixels differ by less than {MIN_CONTRAST} of 255 levels"


# --- details --------------------------------------------------------------------------------------------

MIN_CONTRAST = 16
_LIMIT = Lock()
_GRID = 64

_MAGIC = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("GIF", b"GIF87a"),
    ("GIF", b"GIF89a"),
    ("BMP", b"BM"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),  # BigTIFF; that of the other byte order, MM, is none to Pillow
    ("JPEG2000", b"\xff\x4f\xff\x51"),
    ("JPEG2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
)


def _opened(path: Path) -> IO[bytes]:
    return io.BytesIO(read_bytes(path)) if is_remote(path) else open(path, "rb")


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: {missing(Path(path))}")
    if isinstance(error, OSError):
        return UserError(f"{path}: cannot be read as an image: {error.strerror or first_line(error)}")
    return UserError(f"{str(path)!r}: cannot be read as an image: {error}")  # a NUL in the name


def _factory(name: str, stream: IO[bytes]) -> ImageFile.ImageFile:
    stream.seek(0)
    try:
        return Image.OPEN[name][0](stream, "")
    except Image.DecompressionBombError:  # WebP's reader asks the limit itself
        with _no_limit_of_pillow():
            stream.seek(0)
            return Image.OPEN[name][0](stream, "")


def _load(file: ImageFile.ImageFile) -> None:
    if file.size[0] * file.size[1] <= (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        file.load()
    else:  # TIFF's reader asks, too
        with _no_limit_of_pillow():
            file.load()


@contextmanager
def _no_limit_of_pillow() -> Iterator[None]:
    """Lift `Image.MAX_IMAGE_PIXELS` while one picture that is larger is read; the next one waits for that."""
    with _LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_kind(file: Image.Image, where: str) -> None:
    """Raise UserError for what the header shows: too many pixels, none, pixels that are not taken."""
    width, height = file.size
    problem = _pixel_problem(file)
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} pixels; at most {MAX_PIXELS} are taken"
    if problem is not None:
        raise UserError(f"{where}: cannot be read as an image: {problem}")


def _pixel_problem(image: Image.Image) -> str | None:
    if not all(image.size):
        return "it has no pixels"
    if image.mode == "F":
        return "float pixels have no fixed range; convert to 8 or 16 bits"
    if image.mode == "I" and image.format not in ("PNG", "PPM", None):  # these two have 16 bits
        return "integer pixels of 32 bits or with a sign; convert to 8 or 16 bits"
    if image.mode in ("LAB", "HSV"):
        return f"{image.mode} pixels; convert to RGB"
    return None


def _jpeg_pixels(file: Image.Image, data: bytes) -> np.ndarray | None:
    """Pixels of an ordinary JPEG, not yet upright; None: Pillow decodes it, or says what is wrong with it.

    Both are libjpeg-turbo and give equal pixels (tested); this is the shorter way from there to an array.
    """
    if file.format not in ("JPEG", "MPO") or file.mode not in ("L", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Turn [h, w, 3] upright from EXIF orientation `turn`."""
    if turn == 1:
        return pixels
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = _FLIPS[turn]
    return pixels[::rows, ::columns].copy(order="C")  # torch takes no negative stride, not even of one pixel


_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
"""Directions along rows and columns; from 5 on after the two were exchanged."""


def _upright_size(file: ImageFile.ImageFile) -> tuple[int, int]:
    if file.format == "PNG" and "exif" not in file.info and file.fp and _has_late_chunks(file.fp):
        _load(file)  # EXIF may stand behind the pixels
    turned = orientation(file) >= 5
    if file.format == "TIFF":  # Pillow exchanges the sides itself, for a tag
        turned = turned and file.tag_v2.get(ExifTags.Base.Orientation) is None  # type: ignore[attr-defined]
    width, height = file.size
    return (width, height) if turned else (height, width)


def _has_late_chunks(stream: IO[bytes]) -> bool:
    """Do chunks with text or EXIF follow the pixels of a PNG?"""
    stream.seek(8)
    seen = False
    while len(head := stream.read(8)) == 8:
        kind = head[4:]
        seen = seen or kind == b"IDAT"
        if seen and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return True
        stream.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    return False


def _spread(pixels: np.ndarray) -> float:
    """Largest distance between the 0.5th and the 99.5th percentile of a channel, in levels."""
    low, high = np.percentile(pixels.reshape(-1, 3), (0.5, 99.5), axis=0)
    return float((high - low).max())
