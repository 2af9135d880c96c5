"""Image files onto the network's input canvas, and boxes back to the pixels of the file, without torch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from deploy.core.card import ModelCard
from deploy.core.errors import UserError

Picture = str | Path | bytes | np.ndarray | Image.Image
"""A file, its bytes, pixels uint8 [h, w, 3] RGB, or a PIL image."""


def load_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB uint8 [H, W, 3], turned as its EXIF orientation says.

    Transparency is dropped. Raises UserError when the file is missing, truncated or not an image.
    """
    return decode_image(read_image_bytes(path), str(path))


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
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the image: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{str(path)!r}: cannot read the image: {error}") from error


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """`load_image` from the encoded bytes; errors name `where`."""
    return decode_oriented(data, where)[0]


def decode_oriented(data: bytes, where: str = "image") -> tuple[np.ndarray, int]:
    """`decode_image`, and the EXIF orientation (1 to 8) from which the pixels were turned upright."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            return rgb(file), orientation(file)
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: cannot decode the image: unknown format") from error
    except MemoryError:
        raise
    except Exception as error:  # parsers raise anything on broken bytes: OSError, SyntaxError, struct.error …
        raise UserError(f"{where}: cannot decode the image: {error}") from error


def orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1 to 8; 1 where there is none that can be read. Pillow also takes that of
    XMP, where EXIF has none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block is no reason to refuse the pixels
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


_UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def rgb(image: Image.Image) -> np.ndarray:
    """An opened image as RGB uint8 [H, W, 3], turned as its EXIF orientation says; of 16 bits a channel the upper
    eight. Transparency is dropped."""
    image.load()  # some formats have their EXIF at the end
    turn = _UPRIGHT[orientation(image)]
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # grey of 16 bits, and what is stored in more: Pillow would cut at 255
        grey = (np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    return np.asarray(image.convert("RGB"))


def fit_canvas(image: np.ndarray, card: ModelCard) -> tuple[np.ndarray, tuple[float, float]]:
    """`letterbox` with the canvas, the limits and the padding of `card`."""
    return letterbox(image, card.input_size, card.pad_color, short=card.short, long=card.long)


def letterbox(
    image: np.ndarray,
    size_hw: tuple[int, int],
    pad_color: tuple[int, int, int],
    *,
    short: int | None = None,
    long: int | None = None,
) -> tuple[np.ndarray, tuple[float, float]]:
    """Fit an RGB uint8 image [h, w, 3] into a canvas uint8 [3, H, W]; return it with its scale (sx, sy).

    The image keeps its ratio: factor f = min(H/h, W/w), limited so that the sides do not exceed `short` and
    `long` pixels; new side = int(side·f + 0.5) (at least 1), bilinear with antialiasing; the rest, right and
    bottom, is `pad_color`. The scale is canvas pixels per image pixel
    on each axis; the two differ a little, because each side is rounded.
    """
    (height, width), (canvas_height, canvas_width) = image.shape[:2], size_hw
    factor = min(canvas_height / height, canvas_width / width)
    if short is not None:
        factor = min(factor, short / min(height, width))
    if long is not None:
        factor = min(factor, long / max(height, width))
    new_height = min(max(int(height * factor + 0.5), 1), canvas_height)
    new_width = min(max(int(width * factor + 0.5), 1), canvas_width)
    if (new_height, new_width) != (height, width):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    canvas = np.empty((3, canvas_height, canvas_width), dtype=np.uint8)
    canvas[:] = np.asarray(pad_color, dtype=np.uint8)[:, None, None]
    canvas[:, :new_height, :new_width] = image.transpose(2, 0, 1)
    return canvas, (new_width / width, new_height / height)


def to_original(boxes: np.ndarray, scale: tuple[float, float], original_hw: tuple[int, int]) -> np.ndarray:
    """Canvas boxes xyxy [n, 4] in pixels of the original image, clipped to it. Float32."""
    sx, sy = scale
    height, width = original_hw
    boxes = boxes / np.asarray([sx, sy, sx, sy], dtype=np.float32)
    return np.clip(boxes, 0.0, np.asarray([width, height, width, height], dtype=np.float32)).astype(np.float32)
