"""Decoding, letterboxing and the way back."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compress.data.coco import load_tensor
from compress.data.transforms import eval_transform, train_transform
from deploy.core.canvas import fit_size, letterbox, resize, to_original
from deploy.core.errors import UserError
from deploy.core.image import load_image, pixel_doubt, read_picture

PAD = (124, 116, 104)


def test_exif_orientation_and_modes(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = (255, 0, 0)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png")
    assert turned.shape == (6, 4, 3) and turned.dtype == np.uint8
    assert tuple(turned[0, 3]) == (255, 0, 0)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        suffix = "jpg" if mode == "CMYK" else "png"
        image.convert(mode).save(tmp_path / f"{mode}.{suffix}")
        assert load_image(tmp_path / f"{mode}.{suffix}").shape == (4, 6, 3)


def test_16_bits_are_scaled_the_same_for_training_and_serving(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    wanted = np.repeat((pixels >> 8).astype(np.uint8)[..., None], 3, 2)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.array_equal(load_image(tmp_path / name), wanted)
        assert np.array_equal(load_tensor(tmp_path / name).permute(1, 2, 0).numpy(), wanted)


@pytest.mark.parametrize("thing", [None, 3, ["a.png"]])
def test_what_is_no_picture_is_one_line(thing: Any) -> None:
    with pytest.raises(UserError, match=f"a path, bytes, pixels or a PIL image, got {type(thing).__name__}"):
        read_picture(thing)


def test_unreadable_images_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the file is missing"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        load_image(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "full.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "full.jpg").read_bytes()[:1500])
    with pytest.raises(UserError, match="cannot be read as an image"):
        load_image(tmp_path / "cut.jpg")


@settings(max_examples=60)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    canvas_h=st.integers(1, 160),
    canvas_w=st.integers(1, 160),
)
def test_letterbox_fits_pads_and_inverts(height: int, width: int, canvas_h: int, canvas_w: int) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    canvas, (sx, sy) = letterbox(image, (canvas_h, canvas_w), PAD)
    assert canvas.shape == (3, canvas_h, canvas_w) and canvas.dtype == np.uint8
    new_w, new_h = round(sx * width), round(sy * height)
    assert 1 <= new_w <= canvas_w and 1 <= new_h <= canvas_h
    assert new_w == canvas_w or new_h == canvas_h  # it touches one border
    assert (canvas[:, :new_h, :new_w] == 200).all()
    for channel in range(3):
        assert (canvas[channel, new_h:] == PAD[channel]).all() and (canvas[channel, :, new_w:] == PAD[channel]).all()
    corner = to_original(np.asarray([[0, 0, new_w, new_h]], np.float32), (sx, sy), (height, width))
    np.testing.assert_allclose(corner, [[0, 0, width, height]], rtol=1e-5)
    outside = to_original(np.asarray([[-9, -9, canvas_w * 9, canvas_h * 9]], np.float32), (sx, sy), (height, width))
    np.testing.assert_allclose(outside, [[0, 0, width, height]], rtol=1e-5)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), short=st.integers(1, 120), more=st.integers(0, 120))
def test_evaluation_has_the_pixels_of_the_file_and_training_those_within_two_levels(
    seed: int, short: int, more: int
) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (*random.integers(1, 150, 2), 3), np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    none = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.bool)
    limits: dict[str, Any] = {"short": short, "long": short + more}
    height, width = fit_size(*image.shape[:2], **limits)
    canvas, scale = letterbox(image, (256, 256), PAD, **limits)
    fitted = canvas[:, :height, :width]
    assert scale == (width / image.shape[1], height / image.shape[0])
    assert np.array_equal(eval_transform(**limits)(tensor, *none)[0].numpy(), fitted)
    step = train_transform(**limits, flip=0.0)(tensor, *none)[0].numpy()
    # each of the two passes rounds, so two ties may add up: in noise, one value of 60 million
    assert step.shape == fitted.shape and np.abs(step.astype(int) - fitted).max() <= 2


@settings(max_examples=60)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 300), st.integers(1, 300))
def test_a_size_is_the_largest_of_its_ratio_within_all_limits(height: int, width: int, short: int, long: int) -> None:
    """Against exact fractions: f is the smallest of the four, and a side the whole number nearest to side · f."""
    canvas = (short + 7, long + 3)
    factor = min(
        Fraction(canvas[0], height), Fraction(canvas[1], width),
        Fraction(short, min(height, width)), Fraction(long, max(height, width)),
    )  # fmt: skip
    found = fit_size(height, width, short=short, long=long, canvas=canvas)
    for side, new, limit in ((height, found[0], canvas[0]), (width, found[1], canvas[1])):
        assert 1 <= new <= limit and (new == 1 or abs(new - side * factor) <= Fraction(1, 2))


def test_resized_by_hand() -> None:
    """A triangle of two pixels where it enlarges, of twice the factor where it makes smaller."""
    grey = np.array([[0, 100, 200]], np.uint8)[..., None].repeat(3, 2)
    assert resize(grey, (1, 6))[0, :, 0].tolist() == [0, 25, 75, 125, 175, 200]
    # each sum weighs its pixels by 1 - |distance| / 3, with centres 0.5, 1.5, 2.5 and the result's at 1.5
    assert resize(grey, (1, 1))[0, :, 0].tolist() == [100]
    assert resize(grey, (1, 3)) is grey


@pytest.mark.parametrize(
    ("pixels", "doubt"),
    [
        (
            np.full((40, 60, 3), 7),
            r"nearly one colour, about \(7, 7, 7\): 99 % of its pixels differ by less than",
        ),
        (np.full((1, 1, 3), (250, 0, 9)), r"about \(250, 0, 9\)"),
        (
            np.random.default_rng(0).integers(0, 4096, (300, 400, 3)) >> 8,
            r"about \([78], [78], [78]\)",
        ),
        (np.random.default_rng(0).integers(90, 120, (300, 400, 3)), None),
        (np.mgrid[0:300, 0:400, 0:3][1] * 255 // 400, None),
    ],
)
def test_doubts_about_pixels(pixels: np.ndarray, doubt: str | None) -> None:
    found = pixel_doubt(pixels.astype(np.uint8))
    assert found is None if doubt is None else re.search(doubt, found or "")


def test_a_small_object_is_no_doubt() -> None:
    """A hundredth of the pixels is enough to say that something is there."""
    pixels = np.full((500, 500, 3), 200, np.uint8)
    pixels[3:63, 3:63] = 90
    assert pixel_doubt(pixels) is None


def test_limits_keep_the_scale_of_training() -> None:
    """A portrait image on a square canvas is not enlarged beyond short and long: 800 x 1333 gives 800 x 1067."""
    image = np.zeros((640, 480, 3), np.uint8)
    canvas, scale = letterbox(image, (1344, 1344), PAD, short=800, long=1333)
    assert scale == (800 / 480, 1067 / 640)
    assert (canvas[:, 1067:] == np.array(PAD, np.uint8)[:, None, None]).all()
    assert letterbox(image, (1344, 1344), PAD)[1] == (1008 / 480, 1344 / 640)
