"""IoU losses: torchvision's, float64 and finite differences; the fused operator; machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import backend
from kernels.ops import iou_loss as ops
from tests.helpers import kernel_compare, kernel_sass
from tests.helpers.kernel_boxes import KINDS, boxes
from tests.helpers.kernel_compare import close
from tests.oracles import ORACLES


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_torchvision(kind: ops.Kind) -> None:
    theirs = {
        "giou": torchvision.ops.generalized_box_iou_loss,
        "diou": torchvision.ops.distance_box_iou_loss,
        "ciou": torchvision.ops.complete_box_iou_loss,
    }[kind]
    g = torch.Generator().manual_seed(1)
    a, b = (boxes(200, g).double().requires_grad_() for _ in range(2))
    mine = ops.iou_loss_rows(a, b, kind=kind, eps=1e-7)
    expected = theirs(a, b)  # adds its eps of 1e-7 to the denominators, of which the least is 0.01
    torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-6)
    for gradient, wanted in zip(
        torch.autograd.grad(mine.sum(), (a, b)), torch.autograd.grad(expected.sum(), (a, b)), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_numbers_of_mmdet(device: torch.device) -> None:
    o = ORACLES["F4_giou"]
    a, b, weight = (torch.tensor(o[name], device=device, dtype=torch.float32) for name in ("a", "b", "weight"))
    with backend.use("triton"):
        close(2 * ops.iou_loss(a, b, weight).cpu(), o["loss_avg1"])
        for i, expected in enumerate(o["loss_rows_lw1"]):
            close(ops.iou_loss(a[i], b[i]).cpu(), expected)
    tiny = ORACLES["B_bckd_loc_tiny"]
    with backend.use("triton"):
        loss = ops.iou_loss(*(torch.tensor(tiny[name], device=device).float() for name in ("pred", "teacher", "w")))
    close(4 * loss.cpu() / 3, tiny["loss4_avg3"])


@settings(max_examples=40)
@given(
    count=st.sampled_from([1, 2, 31, 129, 513]),
    made=st.sampled_from(["boxes", "integers", "disorder"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(KINDS),
    differentiable=st.sampled_from([(0,), (1,), (0, 1)]),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_its_reference(
    device: torch.device,
    count: int,
    made: str,
    dtype: torch.dtype,
    kind: ops.Kind,
    differentiable: tuple[int, ...],
    weighted: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    # "disorder" gives unions near 0 of either sign, where float32 cannot follow float64: eps keeps those finite.
    # float16 ends at 65504, and the gradient of a flat box is its length / eps.
    eps = 0.9 if made == "disorder" else 1e-2 if dtype == torch.float16 else 1e-6
    a, b = (boxes(count, g, made).to(dtype) for _ in range(2))
    if seed % 2:
        a, b = (x.t().contiguous().t() for x in (a, b))  # columns inside
    if made == "disorder":
        a, b = (x.float().mul(4).round().div(4).to(dtype) for x in (a, b))  # exact products: the same branch of eps
    weight = [torch.rand(count, generator=g)] if weighted else []
    terms = 1.0, 0.0
    if made == "disorder":  # losses of either sign, and points: d(distance^2 / diagonal^2) = 0 is a difference of ones
        rows = ops.iou_loss_rows(a.double(), b.double(), kind=kind, eps=eps).abs()
        terms = max(1.0, float(rows.sum())), 1.0
    kernel_compare.check(
        lambda *x: ops.iou_loss(*x, kind=kind, eps=eps),
        lambda *x: ops.reference(*x, kind=kind, eps=eps),
        [a, b, *weight],
        device,
        differentiable=differentiable,
        terms=terms,
    )


def test_nothing_cancels_in_the_gradient_of_giou(device: torch.device) -> None:
    """A point has no union: its loss is 2 wherever it lies, and the gradient 0 to the last bit."""
    a = torch.tensor([[8.75, 2.75, 8.75, 2.75]], device=device, requires_grad=True)
    with backend.use("triton"):
        loss = ops.iou_loss(a, torch.tensor([[7.25, 8.5, 7.25, 8.5]], device=device))
    assert loss == 2 and not torch.autograd.grad(loss, a)[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_finite(device: torch.device, kind: ops.Kind) -> None:
    a = torch.tensor([[2.0, 2, 2, 2], [1, 1, 1, 5], [0, 0, 3, 0]], device=device, requires_grad=True)
    for target in (a.detach(), torch.zeros(3, 4, device=device), torch.ones(3, 4, device=device)):
        for name in ("triton", "torch"):
            with backend.use(name):
                loss = ops.iou_loss(a, target, kind=kind)
            (gradient,) = torch.autograd.grad(loss, a)
            assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_eps_may_be_0(device: torch.device, kind: ops.Kind) -> None:
    """The last program has less rows than its block; what it computes beyond them is 0 / 0."""
    g = torch.Generator().manual_seed(0)
    inputs = [*(boxes(3, g) for _ in range(2)), torch.rand(3, generator=g)]
    chosen: dict[str, Any] = {"kind": kind, "eps": 0.0}
    kernel_compare.check(lambda *x: ops.iou_loss(*x, **chosen), lambda *x: ops.reference(*x, **chosen), inputs, device)


def test_no_boxes(device: torch.device) -> None:
    a = torch.zeros(0, 4, device=device, requires_grad=True)
    for name in ("triton", "torch"):
        with backend.use(name):
            loss = ops.iou_loss(a, a.detach(), torch.zeros(0, device=device))
        assert loss == 0 and torch.autograd.grad(loss, a)[0].shape == (0, 4)


def test_leading_dimensions_and_identical_runs(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (boxes(1200, g).to(device) for _ in range(2))
    weight = torch.rand(1200, generator=g).to(device)
    with backend.use("triton"):
        flat = ops.iou_loss(a, b, weight)
        assert ops.iou_loss(a, b, weight) == flat
        assert ops.iou_loss(a.view(2, 600, 4), b.view(2, 600, 4), weight.view(2, 600)) == flat


def test_shapes_are_checked_at_the_door() -> None:
    a = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="differ in shape"):
        ops.iou_loss(a, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="differ in dtype"):
        ops.iou_loss(a, a.half())
    with pytest.raises(ValueError, match="weight must be"):
        ops.iou_loss(a, a, torch.ones(2, 1))
    with pytest.raises(ValueError, match="kind must be"):
        ops.iou_loss(a, a, kind="eiou")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="xyxy"):
        ops.iou_loss(torch.zeros(2, 5), torch.zeros(2, 5))


def test_registration_and_compilation(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (boxes(5, g).to(device).requires_grad_() for _ in range(2))
    torch.library.opcheck(ops._iou_loss, (a, b, torch.ones(5, device=device), "ciou", 1e-6, True, True, "triton"))

    def term(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.iou_loss(x * 2, y, kind="ciou")

    with backend.use("triton"):
        eager = torch.autograd.grad(term(a, b), (a, b))
        compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(a, b), (a, b)), eager)


def _build(dtype: str, kind: int, both: bool) -> kernel_sass.Build:
    pointers = {"boxes": dtype, "target": dtype, "weight": "fp32", "partial": "fp32"}
    pointers |= {"to_boxes": dtype, "to_target": dtype}
    return kernel_sass.Build(
        "kernels.triton.iou_loss",
        "_iou_kernel",
        {name: "*" + kind for name, kind in pointers.items()}
        | {
            "n_units": "i32",
            "UNIT": 2 if dtype == "bf16" else 1,
            "eps": "fp32",
            "KIND": kind,
            "BOXES_GRAD": True,
            "TARGET_GRAD": both,
            "BLOCK": 512,
        },
        aligned=tuple(pointers),
    )


@kernel_sass.by_targets
def test_machine_code(targets: tuple[int, ...]) -> None:
    builds = [_build("fp32", 1, False), _build("fp32", 3, True), _build("bf16", 1, False)]
    for result in kernel_sass.inspect(builds, targets):
        assert result.local == result.local_instructions == result.atomics == 0, result
        # Rows of boxes: 16 bytes at once. Only their weights and the partial sum are accessed singly.
        assert result.loads[128] >= 4 and result.stores[128] >= 2, result
        assert set(result.loads) <= {32, 64, 128} and result.loads.get(32, 0) + result.loads.get(64, 0) <= 4, result
        assert set(result.stores) == {32, 128} and result.stores[32] == 1, result
