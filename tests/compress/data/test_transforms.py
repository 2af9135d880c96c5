from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.data.batch import Target, collate
from compress.data.transforms import eval_transform, train_transform
from deploy.core.canvas import fit_size
from deploy.core.card import PAD_COLOR

SIDES = st.integers(33, 120)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    height, width, count = draw(SIDES), draw(SIDES), draw(st.integers(0, 5))
    rows = []
    for _ in range(count):
        x, y = draw(st.floats(0, width - 2, width=32)), draw(st.floats(0, height - 2, width=32))
        x1, y1 = draw(st.floats(x + 1, width + 4, width=64)), draw(st.floats(y + 1, height + 4, width=64))
        rows.append([x, y, x1, y1])
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return noise(height, width), boxes, torch.zeros(count, dtype=torch.bool)


@pytest.mark.parametrize(
    ("size", "expected"),
    # mmdet's rule, worked by hand: 800 / 480 = 1.6667; 1333 / 1000 = 1.333; int(side * f + 0.5)
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((300, 1000), (400, 1333)),
        ((427, 640), (800, 1199)),
    ],
)
def test_fit_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_size(*size, short=800, long=1333) == expected


@given(SIDES, SIDES, st.integers(16, 300), st.integers(0, 300))
def test_fit_size_keeps_within_and_touches_a_limit(height: int, width: int, short: int, extra: int) -> None:
    long = short + extra
    new = fit_size(height, width, short=short, long=long)
    assert min(new) <= short and max(new) <= long
    assert min(new) == short or max(new) == long


@settings(max_examples=40)
@given(scenes(), st.integers(32, 160))
def test_resize_scales_boxes(scene: tuple[Tensor, Tensor, Tensor], short: int) -> None:
    image, boxes, ignore = scene
    height, width = image.shape[1:]
    out, moved, _ = eval_transform(short, 200)(image, boxes, ignore)
    new_h, new_w = out.shape[1:]
    assert (new_h, new_w) == fit_size(height, width, short=short, long=200)
    factor = torch.tensor([new_w / width, new_h / height] * 2, dtype=torch.float64)
    limit = torch.tensor([new_w, new_h] * 2, dtype=torch.float64)
    expected = torch.minimum(boxes.double() * factor, limit)
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=1e-3)
    assert out.dtype == torch.uint8 and type(moved) is Tensor and moved.dtype == torch.float32


@settings(max_examples=25)
@given(scenes())
def test_flip_twice_is_nothing(scene: tuple[Tensor, Tensor, Tensor]) -> None:
    image, boxes, ignore = scene
    side = min(image.shape[1:])
    straight = eval_transform(side, 1000)(image, boxes, ignore)
    flip = train_transform(side, 1000, flip=1.0)
    once = flip(image, boxes, ignore)
    twice = flip(*once)
    assert torch.equal(once[0], straight[0].flip(-1))
    assert torch.equal(twice[0], straight[0])
    torch.testing.assert_close(twice[1], straight[1], rtol=0, atol=1e-4)
    width = image.shape[2]
    torch.testing.assert_close(once[1][:, 0], width - straight[1][:, 2], rtol=0, atol=1e-4)


@settings(max_examples=60)
@given(scenes(), st.integers(0, 2**31), st.booleans())
def test_boxes_stay_inside_whatever_happens(scene: tuple[Tensor, Tensor, Tensor], seed: int, photometric: bool) -> None:
    image, boxes, ignore = scene
    torch.manual_seed(seed)
    transform = train_transform((40, 80), 120, photometric=photometric, scale_jitter=(0.5, 2.0))
    out, moved, ignored = transform(image, boxes, ignore)
    height, width = out.shape[1:]
    assert len(moved) == len(boxes) == len(ignored)
    assert (moved >= 0).all() and (moved[:, 0::2] <= width).all() and (moved[:, 1::2] <= height).all()
    assert (moved[:, 2:] >= moved[:, :2]).all()
    assert min(height, width) <= 80 and max(height, width) <= 120


@settings(max_examples=40)
@given(st.integers(0, 2**31))
def test_zoom_and_flip_move_boxes_with_pixels(seed: int) -> None:
    """Oracle: a white rectangle on black; the box must be where the white pixels are."""
    image = torch.zeros((3, 90, 120), dtype=torch.uint8)
    image[:, 30:60, 40:80] = 255
    torch.manual_seed(seed)
    transform = train_transform(90, 120, scale_jitter=(0.5, 2.0))
    out, boxes, ignore = transform(image, torch.tensor([[40.0, 30, 80, 60]]), torch.tensor([False]))
    rows, columns = torch.nonzero(out[0] > 180, as_tuple=True)
    if not len(rows):
        assert bool(ignore[0])
        return
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    torch.testing.assert_close(boxes[0], found, rtol=0, atol=1.6)


def test_zoom_in_ignores_what_is_mostly_cut_away() -> None:
    image = noise(100, 100)
    boxes = torch.tensor([[0.0, 0, 12, 12], [44, 44, 56, 56]])
    states = set()
    for seed in range(200):
        torch.manual_seed(seed)
        _, moved, ignore = train_transform(100, 100, flip=0, scale_jitter=(2.0, 2.0))(
            image, boxes, torch.zeros(2, dtype=torch.bool)
        )
        share = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1]) / (2 * 2 * 12 * 12)
        assert torch.equal(ignore, share < 0.3)
        states.add(bool(ignore[0]))
    assert states == {True, False}


def test_photometric_changes_colours_not_boxes() -> None:
    image, boxes = noise(60, 60), torch.tensor([[5.0, 6, 20, 30]])
    torch.manual_seed(0)
    transform = train_transform(60, 60, flip=0, photometric=True)
    results = [transform(image, boxes, torch.zeros(1, dtype=torch.bool)) for _ in range(8)]
    assert sum(not torch.equal(out, image) for out, _, _ in results) >= 6
    assert all(torch.equal(moved, boxes) and out.dtype == torch.uint8 for out, moved, _ in results)


def test_short_side_is_drawn_from_the_closed_range() -> None:
    image, none = noise(50, 70), torch.zeros((0, 4))
    transform = train_transform((40, 43), 1000)
    torch.manual_seed(0)
    seen = {min(transform(image, none, torch.zeros(0, dtype=torch.bool))[0].shape[1:]) for _ in range(80)}
    assert seen == {40, 41, 42, 43}


def test_collate_pads_right_and_below() -> None:
    def sample(height: int, width: int) -> tuple[Tensor, Target]:
        target = Target(
            torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), None, 1,
            (height, width), (height, width),
        )  # fmt: skip
        return noise(height, width, seed=width), target

    samples = [sample(64, 70), sample(33, 96), sample(40, 40)]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 64, 96) and batch.images.dtype == torch.uint8
    for padded, (image, target) in zip(batch.images, samples, strict=True):
        h, w = target.size
        expected = torch.tensor(PAD_COLOR, dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 96).clone()
        expected[:, :h, :w] = image
        assert torch.equal(padded, expected)
    assert batch.to("cpu").images.is_contiguous()
