"""Decoding, letterboxing and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from compress.data.coco import load_tensor
from deploy.core.canvas import letterbox, to_original
from deploy.core.errors import UserError
from deploy.core.image import load_image, read_picture

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


def test_the_resize_is_the_one_of_training_within_one_grey_level() -> None:
    """The trainer resizes tensors with torchvision (bilinear, antialias): the same filter as Pillow's."""
    image = np.random.default_rng(1).integers(0, 255, (75, 133, 3), np.uint8)
    canvas, (sx, sy) = letterbox(image, (64, 96), PAD)
    new_h, new_w = round(sy * 75), round(sx * 133)
    expected = F.resize(torch.from_numpy(image).permute(2, 0, 1), [new_h, new_w], antialias=True).numpy()
    assert np.abs(canvas[:, :new_h, :new_w].astype(int) - expected).max() <= 1


def test_limits_keep_the_scale_of_training() -> None:
    """A portrait image on a square canvas is not enlarged beyond short and long: 800 x 1333 gives 800 x 1067."""
    image = np.zeros((640, 480, 3), np.uint8)
    canvas, scale = letterbox(image, (1344, 1344), PAD, short=800, long=1333)
    assert scale == (800 / 480, 1067 / 640)
    assert (canvas[:, 1067:] == np.array(PAD, np.uint8)[:, None, None]).all()
    assert letterbox(image, (1344, 1344), PAD)[1] == (1008 / 480, 1344 / 640)
