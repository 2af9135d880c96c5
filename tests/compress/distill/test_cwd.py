"""CWD against the reference's numbers, a slow form in NumPy, and its own invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.detectors.base import Capability
from compress.distill.cwd import CWD, channel_kl
from tests.helpers import gfl_case, pyramid_maps
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine

STUDENT, TEACHER = sine((2, 3, 2, 2), 1.0, 0.7, 0.1), sine((2, 3, 2, 2), 1.4, 0.6, 0.9, 0.3)


def loss(method: CWD, s: list[Tensor], t: list[Tensor], certainty: list[Tensor] | None = None) -> Tensor:
    value: Tensor = method(pyramid_maps.outputs(s), pyramid_maps.outputs(t, certainty), pyramid_maps.EMPTY)["cwd"]
    return value


@pytest.mark.parametrize(("temperature", "key"), [(1.0, "tau1"), (2.0, "tau2")])
def test_numbers_of_the_reference(temperature: float, key: str) -> None:
    method = build(CWD, 3, 3, levels=1, loss_weight=1.0, temperature=temperature)
    value = loss(method, [STUDENT.float()], [TEACHER.float()])
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(ORACLES["E_cwd"][key], abs=1e-6)


def test_slow_form_with_certainty() -> None:
    certainty = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = plain = 0.0
    for i in range(2):
        for c in range(3):
            p, q = (np.exp(x[i, c].numpy() / 2) / np.exp(x[i, c].numpy() / 2).sum() for x in (TEACHER, STUDENT))
            plain += 4 * (p * np.log(p / q)).sum() / 6
            expected += 4 * (certainty[i].numpy() * (p * np.log(p / q) - p + q)).sum() / 6
    assert channel_kl(STUDENT, TEACHER, 2.0).item() == pytest.approx(plain, rel=1e-12)
    assert channel_kl(STUDENT, TEACHER, 2.0, certainty).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        channel_kl(STUDENT, TEACHER, 2.0, torch.ones_like(certainty)), channel_kl(STUDENT, TEACHER, 2.0)
    )


def test_finite_differences() -> None:
    student = STUDENT.clone().requires_grad_()
    certainty = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: channel_kl(x, TEACHER, 1.0), student)
    assert torch.autograd.gradcheck(lambda x: channel_kl(x, TEACHER, 2.0, certainty), student)


@settings(max_examples=30)
@given(
    shift=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
    certainty=st.lists(st.floats(0, 10), min_size=8, max_size=8),
)
def test_offset_of_a_channel_does_not_matter_and_no_weighting_makes_a_difference_pay(
    shift: list[float], certainty: list[float]
) -> None:
    offset = torch.tensor(shift, dtype=torch.float64).view(1, 3, 1, 1)
    weights = torch.tensor(certainty, dtype=torch.float64).view(2, 2, 2)
    plain = channel_kl(STUDENT, TEACHER, 1.0, weights)
    torch.testing.assert_close(channel_kl(STUDENT + offset, TEACHER - offset, 1.0, weights), plain)
    assert plain >= 0
    same = TEACHER.clone().requires_grad_()
    least = channel_kl(same, TEACHER, 1.0, weights)
    least.backward()
    assert same.grad is not None
    assert least.item() == pytest.approx(0, abs=1e-14) and same.grad.abs().max() < 1e-14


def test_certainty_of_ones_and_zeros() -> None:
    s, t = pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1)
    method = build(CWD, 4, 4, levels=2)
    torch.testing.assert_close(loss(method, s, t, pyramid_maps.certainties(1.0)), loss(method, s, t))
    assert loss(method, s, t, pyramid_maps.certainties(0.0)) == 0


def test_on_logits() -> None:
    student, teacher = gfl_case.outputs()
    method = build(CWD, 8, 16, levels=2, on="logits")
    assert not list(method.parameters())
    value = method(student, teacher, pyramid_maps.EMPTY)["cwd"]
    pairs = zip(student.prediction.logits, teacher.prediction.logits, strict=True)
    expected = torch.stack([channel_kl(s.detach().double(), t.double(), 1.0) for s, t in pairs]).sum()
    assert value.item() == pytest.approx(5 * expected.item(), rel=1e-5)
    grads = torch.autograd.grad(value, student.prediction.logits)
    assert all(g.any() for g in grads)
    assert method.needs == {Capability.DENSE} and build(CWD, 8, 8).needs == {Capability.FEATURES}


def test_adapters_precision_and_weights() -> None:
    s, t = pyramid_maps.maps(3, 0, grad=True), pyramid_maps.maps(4, 1, grad=True)
    method = build(CWD, 3, 4, levels=2)
    loss(method, s, t).backward()
    assert all(x.grad is None for x in t)
    weights = [p for name, p in method.named_parameters() if name.endswith("weight")]
    assert len(weights) == 2 and all(x.grad is not None and x.grad.any() for x in [*s, *weights])
    assert build(CWD, 4, 4).adapter.convs is None and build(CWD, 4, 4, adapter="always").adapter.convs is not None

    low_s, low_t = [x.detach().bfloat16() for x in s], [x.detach().bfloat16() for x in t]
    low = loss(method, low_s, low_t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(method, [x.float() for x in low_s], [x.float() for x in low_t]))

    other = pyramid_maps.maps(4, 2)
    plain = loss(build(CWD, 4, 4, levels=2, loss_weight=1.0), t, other)
    torch.testing.assert_close(loss(build(CWD, 4, 4, levels=2, weight=0.5), t, other), 5 * plain)
    nothing = loss(build(CWD, 4, 4, levels=2, weight=0.0), t, other)
    grads = torch.autograd.grad(nothing, t)
    assert nothing == 0 and not any(g.any() for g in grads)
