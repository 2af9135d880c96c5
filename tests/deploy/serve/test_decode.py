"""Pictures from unknown clients: every kind that is taken, and refusals for the rest."""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from deploy.core.canvas import fit_canvas
from deploy.core.image import decode_image
from deploy.serve.decode import decode, read_header
from deploy.serve.settings import RefusalError
from tests.helpers.encoded_pictures import encode, hostile, jpeg_of_many_scans, kinds, png_that_claims, with_exif
from tests.helpers.red_rectangle_model import CARD, picture

GOOD, BAD = kinds(), hostile()
LIMIT = 1_000_000
CARD_90X60 = CARD.model_copy(update={"input_size": (60, 90)})  # nothing is resized


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_is_what_validation_sees(name: str) -> None:
    """Canvas that `compress validate` makes of the file, equal to the bit."""
    found = decode(GOOD[name], CARD, max_pixels=LIMIT, where="image")
    pixels = decode_image(GOOD[name])
    canvas, scale = fit_canvas(pixels, CARD)
    assert np.array_equal(found.canvas, canvas) and found.scale == scale
    assert found.size_hw == pixels.shape[:2] == (60, 90)


@pytest.mark.parametrize("name", [name for name in GOOD if not any(word in name for word in ("grey", "16", "bile"))])
def test_the_first_frame_upright_and_in_colour(name: str) -> None:
    """Against the picture that was encoded: red inside the rectangle, grey outside."""
    pixels = decode(GOOD[name], CARD_90X60, max_pixels=LIMIT, where="image").canvas.transpose(1, 2, 0).astype(int)
    wanted = picture((60, 90), (20, 10, 70, 40)).astype(int)
    for y, x in ((25, 45), (15, 25), (35, 65), (5, 5), (50, 80), (25, 10)):
        assert np.abs(pixels[y, x] - wanted[y, x]).max() < 30, (name, y, x)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused(name: str) -> None:
    with pytest.raises(RefusalError) as caught:
        decode(BAD[name], CARD, max_pixels=LIMIT, where="image 3")
    assert caught.value.status in (413, 415, 422)
    assert caught.value.message.startswith("image 3: ")
    assert "0x" not in caught.value.message and "/" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "status"),
    [("tiff", 415), ("text", 415), ("truncated jpeg", 422), ("huge png", 413), ("huge webp", 413), ("huge gif", 413)],
)
def test_the_refusal_says_why(name: str, status: int) -> None:
    with pytest.raises(RefusalError) as caught:
        decode(BAD[name], CARD, max_pixels=LIMIT, where="image")
    assert caught.value.status == status


def test_a_claim_of_many_pixels_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pixel is decoded."""

    def decoded(*_: object) -> None:
        raise AssertionError("the pixels of a picture that is refused were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("huge png", "huge webp", "huge gif", "huge bmp", "a jpeg of 3000 scans"):
        with pytest.raises(RefusalError):
            decode(BAD[name], CARD, max_pixels=LIMIT, where="image")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000 * (
        1024 if sys.platform == "darwin" else 1
    )


def test_the_limit_is_the_limit() -> None:
    data = encode(picture((100, 100), None))
    assert decode(data, CARD, max_pixels=10_000, where="image").size_hw == (100, 100)
    with pytest.raises(RefusalError, match="100 x 100 pixels; at most 9999"):
        decode(data, CARD, max_pixels=9_999, where="image")
    decode(jpeg_of_many_scans(80), CARD, max_pixels=LIMIT, where="image")


def test_scans_are_those_of_the_picture() -> None:
    """Marker bytes do not count in what phones put into segments and behind the picture; a bomb behind those is
    found."""
    data = GOOD["progressive jpeg"]
    film = data + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08" * 500
    comment = data[:2] + b"\xff\xfe" + (1002).to_bytes(2, "big") + b"\xff\xda" * 500 + data[2:]
    for odd in (film, comment):
        assert np.array_equal(decode_image(odd), decode_image(data))
        found = decode(odd, CARD, max_pixels=LIMIT, where="image")
        assert np.array_equal(found.canvas, decode(data, CARD, max_pixels=LIMIT, where="image").canvas)
    bomb = jpeg_of_many_scans(200)
    with pytest.raises(RefusalError, match="more than 100 JPEG scans"):
        decode(bomb[:2] + comment[2:1006] + bomb[2:], CARD, max_pixels=LIMIT, where="image")


GIF = GOOD["gif"]  # its header and palette are 25 bytes


def _chunk(kind: bytes) -> bytes:
    return bytes(4) + kind + struct.pack(">I", zlib.crc32(kind))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff" * 20_000_000 + GOOD["jpeg"][2:],
        b"\xff\xd8\xff\xe0" + bytes(20_000_000),
        b"\xff\xd8" + b"\xff\xfe\0\2" * 5_000_000 + GOOD["jpeg"][2:],
        GOOD["jpeg"][:-2] + b"\xff\xfe\0\2" * 5_000_000 + GOOD["jpeg"][-2:],
        GOOD["png"][:33] + _chunk(b"aaAa") * 1_600_000 + GOOD["png"][33:],
        GOOD["png"][:-12] + _chunk(b"aaAa") * 1_600_000 + GOOD["png"][-12:],
        GIF[:25] + b"!\xfe\1a\0" * 4_000_000 + GIF[25:],
        GIF[:25] + b"!\xfe" + b"\1a" * 10_000_000 + b"\0" + GIF[25:],
        GIF[:25] + bytes(20_000_000) + GIF[25:],
    ],
    ids=[
        "fill",
        "no segment",
        "comments",
        "comments after a scan",
        "chunks",
        "chunks behind",
        "comments",
        "long",
        "junk",
    ],
)
def test_files_of_endless_parts_are_refused_at_once(data: bytes) -> None:
    """Pillow's parsers would take five to twenty-five seconds for each."""
    start = time.process_time()
    with pytest.raises(RefusalError, match="image: ") as caught:
        decode(data, CARD, max_pixels=LIMIT, where="image")
    assert caught.value.status == 422 and time.process_time() - start < 2


def test_files_of_many_parts_are_taken() -> None:
    """A JPEG of hundreds of segments with fill bytes between, a PNG in chunks of one kilobyte, a GIF with comments."""
    jpeg = GOOD["jpeg"][:2] + b"\xff\xff\xff\xfe\0\4ab" * 500 + GOOD["jpeg"][2:]
    gif = GIF[:25] + b"!\xfe\1a\0" * 500 + GIF[25:]
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    whole = encode(noise)
    start = whole.index(b"IDAT") - 4
    length = int.from_bytes(whole[start : start + 4], "big")
    pixels = whole[start + 8 : start + 8 + length]
    parts = [b"IDAT" + pixels[k : k + 16] for k in range(0, length, 16)]
    small = b"".join(struct.pack(">I", len(x) - 4) + x + struct.pack(">I", zlib.crc32(x)) for x in parts)
    png = whole[:start] + small + whole[start + 12 + length :]
    for odd, plain in ((jpeg, GOOD["jpeg"]), (gif, GOOD["gif"]), (png, whole)):
        found = decode(odd, CARD, max_pixels=LIMIT, where="image")
        assert np.array_equal(found.canvas, decode(plain, CARD, max_pixels=LIMIT, where="image").canvas)


TURN = (0x0112, 3, 1, b"\x06\0\0\0")


@pytest.mark.parametrize("odd", [(0x0102, 2, 4, b"8 8\0"), (0x0100, 2, 4, b"640\0"), (0x9999, 16, 1, b"\x08\0\0\0")])
def test_an_odd_exif_entry_is_no_obstacle(odd: tuple[int, int, int, bytes]) -> None:
    """A text where a number belongs, an unknown type: the picture is turned all the same."""
    data = with_exif(GOOD["jpeg"], [TURN, odd])
    found = decode(data, CARD, max_pixels=LIMIT, where="image")
    assert (found.size_hw, found.orientation) == ((90, 60), 6)
    assert np.array_equal(decode_image(data), np.rot90(decode_image(GOOD["jpeg"]), -1))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    data = with_exif(GOOD["jpeg"], [(0x0112, 3, 1, bytes([orientation, 0, 0, 0]))])
    with Image.open(io.BytesIO(data)) as file:
        wanted = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert np.array_equal(decode_image(data), wanted)
    found = decode(data, CARD, max_pixels=LIMIT, where="image").orientation
    assert found == (orientation if 1 <= orientation <= 8 else 1)


@pytest.mark.parametrize("name", [name for name in GOOD if "webp" in name])
def test_webp_sizes_are_read_by_hand_as_pillow_reads_them(name: str) -> None:
    assert read_header(GOOD[name], "image") == ("WEBP", 90, 60)


def test_webp_sizes_of_any_kind() -> None:
    for width, height in ((1, 1), (3, 500), (511, 2)):
        image = Image.new("RGB", (width, height))
        for more in ({"lossless": True}, {"quality": 50}, {"lossless": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}):
            assert read_header(encode(image, "WEBP", **more), "image")[1:] == (width, height)


@settings(max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    st.floats(0.2, 1),
    st.binary(max_size=20),
)
def test_damaged_files_are_decoded_or_refused(
    name: str, changes: list[tuple[float, int]], share: float, tail: bytes
) -> None:
    data = bytearray(GOOD[name][: max(16, int(share * len(GOOD[name])))] if share < 0.9 else GOOD[name])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        found = decode(bytes(data) + tail, CARD, max_pixels=LIMIT, where="image")
    except RefusalError as error:
        assert error.status in (413, 415, 422)
    else:
        assert found.canvas.shape == (3, *CARD.input_size)


def test_damaged_headers_are_refused() -> None:
    """Every byte of the first hundred of every kind, changed to 0, 255 and by one."""
    for name in ("png", "webp", "gif", "bmp"):
        data = GOOD[name]
        for place in range(0, 60, 2):
            for value in (0, 255, (data[place] + 1) % 256):
                changed = data[:place] + bytes([value]) + data[place + 1 :]
                try:
                    decode(changed, CARD, max_pixels=LIMIT, where="image")
                except RefusalError as error:
                    assert error.status in (413, 415, 422)


def test_png_claims_are_written_right() -> None:
    """The generator of hostile files itself: its small claim is only truncated."""
    with pytest.raises(RefusalError) as caught:
        decode(png_that_claims(100, 100), CARD, max_pixels=LIMIT, where="image")
    assert caught.value.status == 422
