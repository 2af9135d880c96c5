"""Monte Carlo dropout maps of a teacher: against the two-pass formula, and what must hold for any teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.detectors.backbones import build_backbone
from compress.detectors.gfl import GFL
from compress.distill.uncertainty import _at_locations, predictive_uncertainty
from kernels.ops.mc_dropout import Dropout, mc_dropout

SAMPLES = 4


@pytest.fixture(scope="module")
def teacher() -> GFL:
    torch.manual_seed(0)
    detector = GFL(3, build_backbone("nano", weights="none"), neck_channels=32, head_depth=1).eval()
    torch.nn.init.normal_(detector.head.gfl_cls.weight, std=0.2)  # scores that differ and move
    torch.nn.init.zeros_(detector.head.gfl_cls.bias)
    return detector


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_equals_the_formula_in_two_passes(teacher: GFL, images: Tensor) -> None:
    found = predictive_uncertainty(teacher, images, samples=SAMPLES, rate=0.3, seed=5)
    assert found.maps.shape == (2, 8, 12) and found.stride == 8 and found.variance.shape == (2, 5)
    with torch.no_grad():
        features = teacher.features(images)
        copies = [
            [mc_dropout(x, Dropout((0.3,), 5, n * 5 + level), variance=False)[0] for level, x in enumerate(features)]
            for n in range(SAMPLES)
        ]
        scores = [[x.double().sigmoid() for x in teacher.predict(copy).logits] for copy in copies]
    merged = torch.zeros(2, 8, 12, dtype=torch.float64)
    for level in range(5):
        drawn = torch.stack([sample[level] for sample in scores])  # [N, B, K, h, w]
        best = drawn.mean(0).argmax(1)
        spread = drawn.std(0, correction=0).gather(1, best[:, None])[:, 0]
        torch.testing.assert_close(
            found.variance[:, level].double(),
            torch.stack([copy[level].double() for copy in copies]).var(0, correction=0).mean((1, 2, 3)),
            rtol=1e-4, atol=0,
        )  # fmt: skip
        step = 2**level
        merged[:, ::step, ::step] = torch.maximum(
            merged[:, ::step, ::step], spread[:, : -(-8 // step), : -(-12 // step)]
        )
    # at the locations of the coarsest level all levels meet, and interpolation only adds between
    torch.testing.assert_close(found.maps[:, 0, 0].double(), merged[:, 0, 0], rtol=1e-4, atol=1e-6)
    assert (found.maps.double() >= merged - 1e-6).all()


def test_without_dropout_there_is_no_uncertainty(teacher: GFL, images: Tensor) -> None:
    found = predictive_uncertainty(teacher, images, samples=3, rate=0.0)
    assert not found.maps.any() and not found.variance.any()


def test_the_seed_alone_decides(teacher: GFL, images: Tensor) -> None:
    def maps(seed: int) -> Tensor:
        return predictive_uncertainty(teacher, images, samples=SAMPLES, seed=seed).maps

    first = maps(7)
    torch.rand(3)  # the global generator takes no part
    assert torch.equal(first, maps(7))
    assert not torch.equal(first, maps(8))


def test_more_dropout_more_uncertainty(teacher: GFL, images: Tensor) -> None:
    found = [predictive_uncertainty(teacher, images, samples=8, rate=rate) for rate in (0.02, 0.1, 0.4)]
    means = [float(x.maps.mean()) for x in found]
    assert means[0] < 0.7 * means[1] < 0.5 * means[2]
    assert (found[0].variance < found[1].variance).all() and (found[1].variance < found[2].variance).all()
    assert all(x.maps.min() >= 0 and x.maps.max() <= 0.5 for x in found)


def test_the_variance_is_that_of_dropout(teacher: GFL, images: Tensor) -> None:
    """E[var] = (N - 1) / N * x^2 p / (1 - p)."""
    found = predictive_uncertainty(teacher, images, samples=8, rate=0.25).variance
    with torch.no_grad():
        wanted = [x.square().mean((1, 2, 3)) * (7 / 8) * (0.25 / 0.75) for x in teacher.features(images)]
    torch.testing.assert_close(found[:, :3], torch.stack(wanted, 1)[:, :3], rtol=0.15, atol=0)


def test_the_teacher_is_left_as_it_was(teacher: GFL, images: Tensor) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    random = torch.random.get_rng_state()
    found = predictive_uncertainty(teacher, images, samples=2)
    assert not teacher.training and not found.maps.requires_grad
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


def test_what_cannot_be_sampled_is_refused(teacher: GFL, images: Tensor) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        predictive_uncertainty(teacher, images, samples=1)
    with pytest.raises(ValueError, match="rates must be"):
        predictive_uncertainty(teacher, images, rate=1.0)
    teacher.train()
    try:
        with pytest.raises(ValueError, match="eval mode"):
            predictive_uncertainty(teacher, images)
    finally:
        teacher.eval()


def test_levels_are_interpolated_between_their_locations() -> None:
    values = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    found = _at_locations(values, 2, 4, 4)
    wanted = torch.tensor([[0.0, 0.5, 1.0, 1.0], [1.0, 1.5, 2.0, 2.0], [2.0, 2.5, 3.0, 3.0], [2.0, 2.5, 3.0, 3.0]])
    torch.testing.assert_close(found[0], wanted)
    torch.testing.assert_close(_at_locations(values, 1, 2, 2), values)
    torch.testing.assert_close(_at_locations(torch.full((1, 1, 1), 4.0), 16, 2, 3), torch.full((1, 2, 3), 4.0))
