"""PKD against the reference's number, NumPy's correlation, and its own invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.distill.pkd import PKD, pearson_distance, standardise
from tests.helpers import pyramid_maps
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine

CASE = ORACLES["E_pkd"]
STUDENT, TEACHER = sine((2, 3, 2, 2), 1.0, 0.7, 0.1), sine((2, 3, 2, 2), 1.4, 0.6, 0.9, 0.3)


def loss(method: PKD, s: list[Tensor], t: list[Tensor], certainty: list[Tensor] | None = None) -> Tensor:
    value: Tensor = method(pyramid_maps.outputs(s), pyramid_maps.outputs(t, certainty), pyramid_maps.EMPTY)["pkd"]
    return value


def test_number_of_the_reference() -> None:
    value = loss(build(PKD, 3, 3, levels=1, loss_weight=1.0), [STUDENT.float()], [TEACHER.float()])
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(CASE["loss"], abs=1e-6)


def test_is_one_minus_the_correlation() -> None:
    s, t = (x.transpose(0, 1).reshape(3, -1).numpy() for x in (STUDENT, TEACHER))
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)]
    np.testing.assert_allclose(correlation, CASE["pearson"], atol=1e-6)
    expected = 7 / 8 * (1 - np.mean(correlation))
    assert pearson_distance(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-5)  # but for the 1e-6


def test_finite_differences() -> None:
    student = STUDENT.clone().requires_grad_()
    certainty = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: pearson_distance(x, TEACHER), student)
    assert torch.autograd.gradcheck(lambda x: pearson_distance(x, TEACHER, certainty), student)


@settings(max_examples=30)
@given(
    scale=st.lists(st.floats(0.1, 50), min_size=3, max_size=3),
    shift=st.lists(st.floats(-50, 50), min_size=3, max_size=3),
)
def test_scale_and_offset_of_a_channel_do_not_matter(scale: list[float], shift: list[float]) -> None:
    a, b = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (scale, shift))
    plain = pearson_distance(STUDENT, TEACHER)
    torch.testing.assert_close(pearson_distance(STUDENT, a * TEACHER + b), plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(pearson_distance(a * STUDENT + b, TEACHER), plain, rtol=1e-4, atol=0)
    assert pearson_distance(a * TEACHER + b, TEACHER).item() == pytest.approx(0, abs=1e-9)


def test_certainty_weighs_locations() -> None:
    certainty = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s, t = STUDENT.numpy(), TEACHER.numpy()
    expected = 0.0
    for c in range(3):
        a, b = ((x[:, c] - x[:, c].mean()) / (x[:, c].std(ddof=1) + 1e-6) for x in (s, t))
        expected += (certainty.numpy() * (a - b) ** 2).sum() / (2 * 24)
    assert pearson_distance(STUDENT, TEACHER, certainty).item() == pytest.approx(expected, rel=1e-12)

    maps = pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1)
    method = build(PKD, 4, 4, levels=2)
    torch.testing.assert_close(loss(method, *maps, pyramid_maps.certainties(1.0)), loss(method, *maps))
    assert loss(method, *maps, pyramid_maps.certainties(0.0)) == 0


def test_another_size_is_resized() -> None:
    student = sine((2, 3, 3, 5), 1.0, 0.7, 0.1)
    value = pearson_distance(student, TEACHER)
    torch.testing.assert_close(
        value, pearson_distance(F.interpolate(student, (2, 2), mode="bilinear", align_corners=False), TEACHER)
    )


def test_a_single_location_contributes_nothing() -> None:
    s = [torch.randn(1, 4, 5, 7), torch.randn(1, 4, 1, 1, requires_grad=True)]
    t = [torch.randn(1, 4, 5, 7), torch.randn(1, 4, 1, 1)]
    value = loss(build(PKD, 4, 4, levels=2), s, t)
    torch.testing.assert_close(value, loss(build(PKD, 4, 4, levels=1), s, t))
    value.backward()
    assert s[1].grad is not None and not s[1].grad.any()


def test_standardise() -> None:
    x = sine((2, 3, 4, 5), 1.4, 0.6, 0.9, 30.0).requires_grad_()
    slow = (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(standardise(x), slow, rtol=1e-12, atol=1e-12)
    low = standardise(x.float())
    torch.testing.assert_close(low.double(), slow, rtol=0, atol=1e-4)  # of a mean that is 20 deviations away
    constant = torch.cat((x[:, :1], torch.full_like(x[:, :1], 7.0)), 1).detach().requires_grad_()
    result = standardise(constant)
    torch.testing.assert_close(result[:, 0], slow[:, 0])
    assert not result[:, 1].any()
    (grad,) = torch.autograd.grad(result.square().sum(), constant)
    assert grad.isfinite().all()


def test_adapters_precision_and_weights() -> None:
    s, t = pyramid_maps.maps(3, 0, grad=True), pyramid_maps.maps(4, 1, grad=True)
    method = build(PKD, 3, 4, levels=2)
    loss(method, s, t).backward()
    assert all(x.grad is None for x in t)
    weights = [p for name, p in method.named_parameters() if name.endswith("weight")]
    assert len(weights) == 2 and all(x.grad is not None and x.grad.any() for x in [*s, *weights])
    assert build(PKD, 4, 4).adapter.convs is None and build(PKD, 4, 4, adapter="always").adapter.convs is not None

    low_s, low_t = [x.detach().bfloat16() for x in s], [x.detach().bfloat16() for x in t]
    low = loss(method, low_s, low_t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(method, [x.float() for x in low_s], [x.float() for x in low_t]))

    plain = loss(build(PKD, 4, 4, levels=2, loss_weight=1.0), t, pyramid_maps.maps(4, 2))
    retina = build(PKD, 4, 4, levels=2, loss_weight=10.0, weight=0.5)
    torch.testing.assert_close(loss(retina, t, pyramid_maps.maps(4, 2)), 5 * plain)
    torch.testing.assert_close(loss(build(PKD, 4, 4, levels=2), t, pyramid_maps.maps(4, 2)), 6 * plain)
    nothing = loss(build(PKD, 4, 4, levels=2, weight=0.0), t, pyramid_maps.maps(4, 2))
    grads = torch.autograd.grad(nothing, t)
    assert nothing == 0 and not any(g.any() for g in grads)
