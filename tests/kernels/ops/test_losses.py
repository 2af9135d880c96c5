"""Loss kernels against the official numbers, their own plain references, and finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import backend
from kernels.common.distribution import boxes_to_distances, distances_to_boxes, distribution_focal_loss, integral
from kernels.ops import binary_kd_loss as kd
from kernels.ops import quality_focal_loss as qfl
from kernels.ops.distribution_iou_loss import distribution_iou_kd_loss, distribution_iou_loss
from kernels.ops.iou_loss import giou_loss, iou_loss, paired_iou
from tests.helpers.kernel_compare import close
from tests.oracles import ORACLES, sine


def test_quality_focal_loss_oracle() -> None:
    o = ORACLES["F1_qfl"]
    z = torch.tensor(o["pred"]).requires_grad_()  # [4, 3]; class 3 is background
    label, score = torch.tensor(o["label"]), torch.tensor(o["score"])
    positive = (label < 3).nonzero().flatten()
    loss = qfl.quality_focal_loss(
        z.t()[None], positive, label[positive], score[positive], torch.tensor(o["weight"])[None]
    )
    close(loss / 2, o["avg2"])
    (loss / 2).backward()
    close(z.grad, o["grad"])


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 17)),
    beta=st.sampled_from([2.0, 1.0, 1.5]),
    seed=st.integers(0, 10**6),
)
def test_quality_focal_loss_equals_its_reference(shape: tuple[int, int, int], beta: float, seed: int) -> None:
    B, K, M = shape
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(shape, generator=g) * 4).requires_grad_()
    index = torch.randperm(B * M, generator=g)[: int(torch.randint(0, B * M + 1, (), generator=g))]
    labels = torch.randint(0, K, index.shape, generator=g)
    quality = torch.rand(index.shape, generator=g)
    weight = torch.rand(B, M, generator=g)
    loss = qfl.quality_focal_loss(z, index, labels, quality, weight, beta=beta)
    (grad,) = torch.autograd.grad(loss * 3, z)
    z64 = z.detach().double().requires_grad_()
    expected = qfl.reference(z64, index, labels, quality.double(), weight.double(), beta)
    (expected_grad,) = torch.autograd.grad(expected * 3, z64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=2e-6)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 17)),
    beta=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_binary_kd_loss_equals_its_reference(shape: tuple[int, int, int], beta: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z, t = (torch.randn(shape, generator=g) * 3).requires_grad_(), torch.randn(shape, generator=g) * 3
    weight = torch.rand(shape[0], shape[2], generator=g)
    loss, disagreement = kd.binary_kd_loss(z, t, weight, beta=beta)
    (grad,) = torch.autograd.grad(loss * 0.5, z)
    z64 = z.detach().double().requires_grad_()
    expected, expected_disagreement = kd.reference(z64, t.double(), weight.double(), beta)
    (expected_grad,) = torch.autograd.grad(expected * 0.5, z64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(disagreement.double(), expected_disagreement, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("run", ["torch", "compiled", "triton"])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_no_gradient_where_there_is_no_difference(
    run: str, beta: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the case of beta < 1: the slope of |difference|^beta is infinite at 0, and its sign is 0 there."""
    for module in (kd, qfl):  # what is compiled, without compiling it
        monkeypatch.setattr(module, "compiled_once", lambda function: function)
    g = torch.Generator().manual_seed(0)
    z, t, weight = torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 8, generator=g), torch.rand(2, 8, generator=g)
    same = torch.rand(2, 3, 8, generator=g) < 0.3
    t[same] = z[same]
    quality = torch.rand(3, generator=g)
    index, labels = torch.tensor([1, 9, 12]), torch.tensor([0, 2, 1])
    z[0, 0, 1], quality[0] = 0.0, 0.5  # the first positive is as sure as its box is good
    z[1, 1, 1] = -200.0  # and here the probability of a negative is 0 in float32
    same[0, 0, 1], t[0, 0, 1], same[1, 1, 1] = True, 0.0, False
    cases = [
        (lambda x, *y: kd.binary_kd_loss(x, *y, beta=beta, compiled=run == "compiled")[0], kd.reference, (t, weight)),
        (
            lambda x, *y: qfl.quality_focal_loss(x, *y, beta=beta, compiled=run == "compiled"),
            qfl.reference,
            (index, labels, quality, weight),
        ),
    ]
    for function, reference, others in cases:
        leaf, wide = z.to(device).requires_grad_(), z.double().requires_grad_()
        with backend.use("triton" if run == "triton" else "torch"):
            loss = function(leaf, *(x.to(device) for x in others))
        expected = reference(wide, *(x.double() if x.is_floating_point() else x for x in others), beta)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)
        gradient, wanted = torch.autograd.grad(loss, leaf)[0].cpu(), torch.autograd.grad(expected, wide)[0]
        assert wanted.isfinite().all() and wanted.abs().max() > 0.1
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
        at_ties = gradient[same] if reference is kd.reference else gradient[0, 0, 1]
        assert not at_ties.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    z = (sine((1, 3, 8), 6, 0.7, 0.1)).to(dtype).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    loss = qfl.quality_focal_loss(z, none, none, torch.zeros(0), torch.ones(1, 8))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, qfl.reference(z.float(), none, none, torch.zeros(0), torch.ones(1, 8)))
    loss.backward()
    assert z.grad is not None and z.grad.dtype == dtype


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_float32_whatever_else_is_float64(name: backend.Backend, device: torch.device) -> None:
    """Weights, boxes and points of float64 change neither the dtype of a loss nor the loss."""
    g = torch.Generator().manual_seed(0)
    z, t, sides = (torch.randn(*shape, generator=g).to(device) for shape in ((1, 8, 5), (1, 8, 5), (5, 4, 2)))
    points, corner, w = (torch.rand(*shape, generator=g).to(device) for shape in ((5, 2), (5, 2), (1, 5)))
    boxes, where = torch.cat((corner, corner + 1.5), 1), torch.tensor([2], device=device)

    def losses(points: torch.Tensor, boxes: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        return [
            iou_loss(boxes.float(), boxes.float().flip(0), w[0]),
            *distribution_iou_loss(sides, points, boxes, w[0]),
            distribution_iou_kd_loss(z, t, w),
            *kd.binary_kd_loss(z, t, w),
            qfl.quality_focal_loss(z, where, where, w[0, :1], w),
        ]

    with backend.use(name):
        plain, wide = losses(points, boxes, w), losses(points.double(), boxes.double(), w.double())
    assert all(x.dtype == torch.float32 for x in wide)
    torch.testing.assert_close(wide, plain)


def test_shapes_are_checked_at_the_door() -> None:
    z, none = torch.zeros(1, 2, 3), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight must be"):
        qfl.quality_focal_loss(z, none, none, torch.zeros(0), torch.ones(1, 4))
    with pytest.raises(ValueError, match="differ"):
        qfl.quality_focal_loss(z, none, none, torch.zeros(1), torch.ones(1, 3))
    with pytest.raises(ValueError, match="differ in shape"):
        kd.binary_kd_loss(z, torch.zeros(1, 2, 4), torch.ones(1, 3))
    with pytest.raises(ValueError, match="differ in shape"):
        giou_loss(torch.zeros(2, 4), torch.zeros(1, 4))


def test_distribution_focal_loss_oracle() -> None:
    o = ORACLES["F2_dfl"]
    rows = distribution_focal_loss(sine((4, 17), 1.5, 0.45, 0.2).float(), torch.tensor(o["label"]))
    close(rows, o["rows_unweighted_lw1"])
    close(0.25 * (rows * torch.tensor(o["weight"])).sum() / 4, o["total_avg4"])


def test_integral_decode_and_encode_oracle() -> None:
    o = ORACLES["F3_integral"]
    distances = integral(sine((2, 68), 2.0, 0.3, 0.1).float().view(2, 4, 17))
    points = torch.tensor(o["points"])
    close(distances, o["dist"])
    close(distances_to_boxes(points, distances), o["boxes"])
    close(boxes_to_distances(points, torch.tensor(o["encode_gt"]).float(), limit=15.9), o["encoded"])


def test_giou_oracle() -> None:
    o = ORACLES["F4_giou"]
    a, b = torch.tensor(o["a"]), torch.tensor(o["b"])
    close(paired_iou(a, b), o["iou"])
    close(giou_loss(a, b), o["loss_rows_lw1"])
    close(2 * (giou_loss(a, b) * torch.tensor(o["weight"])).sum(), o["loss_avg1"])


def test_gradients_against_finite_differences() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [1.2, 1.1, 5, 3], [0, 0, 4, 4]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[5.0, 5, 15, 12], [1, 1.3, 5.5, 3.7], [6, 6, 8, 9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: giou_loss(x, b), a)
    z = sine((3, 17), 1.5, 0.45, 0.2).requires_grad_()
    y = torch.tensor([0.5, 3.25, 15.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, y), z)
    assert torch.autograd.gradcheck(integral, z)
