"""MGD against the number of the authors' code, and its masks: reproducible, and different where they have to be."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.config.methods import Mgd
from compress.distill.mgd import MGD, generation_distance
from tests.helpers import pyramid_maps
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine

CASE = ORACLES["E_mgd"]
STUDENT, TEACHER = sine((2, 3, 2, 2), 1.0, 0.7, 0.1), sine((2, 3, 2, 2), 1.4, 0.6, 0.9, 0.3)
MASK = torch.tensor(CASE["mask"]).view(2, 1, 2, 2)


def loss(method: MGD, s: list[Tensor], t: list[Tensor], certainty: list[Tensor] | None = None) -> Tensor:
    value: Tensor = method(pyramid_maps.outputs(s), pyramid_maps.outputs(t, certainty), pyramid_maps.EMPTY)["mgd"]
    return value


def of_the_authors(monkeypatch: pytest.MonkeyPatch, **settings: float) -> MGD:
    method = build(MGD, 3, 3, levels=1, **settings)  # type: ignore[arg-type]
    values = [
        sine((3, 3, 3, 3), 0.3, 0.5, 0.1),
        sine((3,), 0.1, 0.5, 0.3),
        sine((3, 3, 3, 3), 0.3, 0.4, 0.8),
        sine((3,), 0.1, 0.4, 0.2),
    ]
    with torch.no_grad():
        for parameter, value in zip(method.generation[0].parameters(), values, strict=True):
            parameter.copy_(value)
    monkeypatch.setattr(method, "masks", lambda maps: [MASK.to(maps[0].dtype)])
    return method


def test_number_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    value = loss(of_the_authors(monkeypatch, alpha=1.0), [STUDENT.float()], [TEACHER.float()])
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(CASE["sum_sq_over_N"], rel=2e-6)
    published = loss(of_the_authors(monkeypatch), [STUDENT.float()], [TEACHER.float()])
    assert published.item() == pytest.approx(CASE["alpha2e5"], abs=1e-9)
    assert (Mgd().alpha, Mgd().masked) == (2e-5, 0.65)


def test_slow_form_with_certainty(monkeypatch: pytest.MonkeyPatch) -> None:
    method = of_the_authors(monkeypatch, alpha=1.0)
    certainty = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0))
    w1, b1, w2, b2 = (p.detach().double() for p in method.generation[0].parameters())

    def convolve(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # [3, 2, 2], location by location
        padded = torch.zeros(3, 4, 4, dtype=torch.float64)
        padded[:, 1:3, 1:3] = x
        rows = [[(w * padded[:, y : y + 3, x : x + 3]).sum((1, 2, 3)) + b for x in range(2)] for y in range(2)]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    expected = 0.0
    for i in range(2):
        generated = convolve(convolve(STUDENT[i] * MASK[i], w1, b1).clamp(min=0), w2, b2)
        expected += (certainty[i].double() * (generated - TEACHER[i]) ** 2).sum().item() / 2
    value = loss(method, [STUDENT.float()], [TEACHER.float()], [certainty])
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    method = of_the_authors(monkeypatch).double()
    certainty = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generate = method.generation[0]
    assert torch.autograd.gradcheck(
        lambda s: generation_distance(generate(s * MASK), TEACHER, certainty), STUDENT.clone().requires_grad_()
    )


def test_masks_differ_by_pass_level_seed_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [torch.zeros(2, 4, 16, 16)] * 2

    def drawn(seed: int = 0, passes: int = 0) -> list[Tensor]:
        method = build(MGD, 4, 4, levels=2, seed=seed)
        for _ in range(passes):
            method.masks(maps)
        return method.masks(maps)

    first = drawn()
    assert [m.shape for m in first] == [(2, 1, 16, 16)] * 2
    assert all(((m == 0) | (m == 1)).all() for m in first)
    torch.testing.assert_close(drawn(), first)
    different = [first[0], first[1], *drawn(passes=1), *drawn(seed=1), *drawn(seed=1, passes=1)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    different += drawn()
    images = [image for mask in different for image in mask]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("masked", [0.0, 0.45, 0.65])
def test_share_of_masked_locations(masked: float) -> None:
    (mask,) = build(MGD, 4, 4, levels=1, masked=masked).masks([torch.zeros(2, 4, 200, 200)])
    kept = 1 - masked
    assert mask.mean().item() == pytest.approx(kept, abs=4 * (kept * masked / mask.numel()) ** 0.5)


def test_a_resumed_run_sees_the_same_masks() -> None:
    s, t = pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1)
    method = build(MGD, 4, 4, levels=2)
    for _ in range(3):
        loss(method, s, t)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    expected = [loss(method, s, t), loss(method, s, t)]
    assert expected[0] != expected[1]
    resumed = build(MGD, 4, 4, levels=2)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [loss(resumed, s, t), loss(resumed, s, t)] == expected


def test_the_global_generator_is_left_alone() -> None:
    method = build(MGD, 4, 4, levels=2)
    before = torch.get_rng_state()
    loss(method, pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_masked_locations_are_not_read() -> None:
    s, t = pyramid_maps.maps(4, 0, grad=True), pyramid_maps.maps(4, 1)
    loss(build(MGD, 4, 4, levels=2), s, t).backward()
    for x, mask in zip(s, build(MGD, 4, 4, levels=2).masks(s), strict=True):
        assert x.grad is not None
        torch.testing.assert_close((x.grad != 0).any(1, keepdim=True), mask > 0)


def test_certainty_of_ones_and_zeros() -> None:
    s, t = pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1)
    method = build(MGD, 4, 4, levels=2)

    def first_pass(certainty: list[Tensor] | None) -> Tensor:
        method.passes = 0
        return loss(method, s, t, certainty)

    torch.testing.assert_close(first_pass(pyramid_maps.certainties(1.0)), first_pass(None))
    assert first_pass(pyramid_maps.certainties(0.0)) == 0


def test_adapters_precision_and_weights() -> None:
    s, t = pyramid_maps.maps(3, 0, grad=True), pyramid_maps.maps(4, 1, grad=True)
    method = build(MGD, 3, 4, levels=2)
    loss(method, s, t).backward()
    assert all(x.grad is None for x in t)
    assert all(x.grad is not None and x.grad.any() for x in [*s, *method.parameters()])
    assert build(MGD, 4, 4).adapter.convs is None and build(MGD, 4, 4, adapter="always").adapter.convs is not None

    low_s, low_t = [x.detach().bfloat16() for x in s], [x.detach().bfloat16() for x in t]
    method.passes = 0
    low = loss(method, low_s, low_t)
    assert low.dtype == torch.float32
    method.passes = 0
    torch.testing.assert_close(low, loss(method, [x.float() for x in low_s], [x.float() for x in low_t]))

    same = build(MGD, 4, 4, levels=2)
    values = []
    for weight in (1.0, 0.5, 0.0):
        scaled = build(MGD, 4, 4, levels=2, weight=weight)
        scaled.load_state_dict(same.state_dict())
        values.append(loss(scaled, t, pyramid_maps.maps(4, 2)))
    torch.testing.assert_close(values[1], values[0] / 2)
    grads = torch.autograd.grad(values[2], t)
    assert values[2] == 0 and not any(g.any() for g in grads)


def test_maps_of_different_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match="differ in shape"):
        generation_distance(F.pad(STUDENT, (0, 1)), TEACHER)
