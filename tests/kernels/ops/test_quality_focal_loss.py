"""The fused quality focal loss: mmdet's numbers, float64, layouts, compilation, machine code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import backend
from kernels.ops import quality_focal_loss as qfl
from tests.helpers import kernel_compare, kernel_sass
from tests.helpers.kernel_compare import close
from tests.oracles import ORACLES


def test_numbers_of_mmdet(device: torch.device) -> None:
    o = ORACLES["F1_qfl"]
    z = torch.tensor(o["pred"], device=device).requires_grad_()  # [4, 3]; class 3 is background
    label, score = torch.tensor(o["label"]), torch.tensor(o["score"])
    positive = (label < 3).nonzero().flatten()
    places = (x.to(device) for x in (positive, label[positive], score[positive], torch.tensor(o["weight"])[None]))
    with backend.use("triton"):
        loss = qfl.quality_focal_loss(z.t()[None], *places)
    (loss / 2).backward()
    close(loss.cpu() / 2, o["avg2"])
    close(z.grad.cpu(), o["grad"])


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 19), st.sampled_from([1, 3, 8, 16, 131])),
    layout=st.sampled_from(["rows", "channels", "sliced"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    beta=st.sampled_from([2.0, 1.0, 1.5]),
    seed=st.integers(0, 10**6),
)
def test_equals_its_reference(
    device: torch.device, shape: tuple[int, int, int], layout: str, dtype: torch.dtype, beta: float, seed: int
) -> None:
    B, K, M = shape
    g = torch.Generator().manual_seed(seed)
    logits = kernel_compare.with_layout(shape, layout, g, 4.0).to(dtype)
    index = torch.randperm(B * M, generator=g)[: int(torch.randint(0, B * M + 1, (), generator=g))]
    labels = torch.randint(0, K, index.shape, generator=g)
    quality, weight = torch.rand(index.shape, generator=g), torch.rand(B, M, generator=g)
    kernel_compare.check(
        lambda *x: qfl.quality_focal_loss(*x, beta=beta),
        lambda *x: qfl.reference(*x, beta),
        [logits, index, labels, quality, weight],
        device,
    )


def test_saturated_logits(device: torch.device) -> None:
    z = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0]).reshape(1, 1, 5)
    index = torch.arange(5)
    quality = torch.tensor([0.3, 1.0, 0.5, 0.0, 1.0])
    kernel_compare.check(
        qfl.quality_focal_loss,
        qfl.reference,
        [z, index, torch.zeros_like(index), quality, torch.ones(1, 5)],
        device,
    )


OUTSIDE = [(-1, 0), (8, 0), (2**40, 0), (3, -1), (3, 3), (3, -(2**40))]


@pytest.mark.parametrize(("location", "label"), OUTSIDE)
def test_places_out_of_range_write_nothing(device: torch.device, location: int, label: int) -> None:
    """Two images, three classes, four locations, between guards; the second positive is out of range."""
    from kernels.triton import quality_focal_loss as kernel

    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 3, 4, generator=g).to(device), torch.ones(2, 4, device=device)
    index, labels = torch.tensor([1, location], device=device), torch.tensor([2, label], device=device)
    quality = torch.tensor([0.5, 0.9], device=device)
    _, wanted = kernel.quality_focal_loss(z, index[:1], labels[:1], quality[:1], w, 2.0, True)
    memory = torch.full((24 + 2 * 64,), 7.0, device=device)
    written = memory[64:-64].view(2, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.torch, "empty_like", lambda *_, **__: written)
        loss, gradient = kernel.quality_focal_loss(z, index, labels, quality, w, 2.0, True)
    assert gradient is written and loss.isnan()
    assert torch.equal(gradient, wanted)
    assert bool((memory[:64] == 7).all()) and bool((memory[-64:] == 7).all())


@pytest.mark.parametrize(("location", "label"), OUTSIDE)
def test_places_out_of_range_are_refused_in_pytorch(location: int, label: int) -> None:
    places = torch.tensor([1, location]), torch.tensor([2, label]), torch.tensor([0.5, 0.9])
    with backend.use("torch"), pytest.raises(IndexError, match=r"must be in 0\.\."):
        qfl.quality_focal_loss(torch.zeros(2, 3, 4), *places, torch.ones(2, 4))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_costs_nothing(device: torch.device, shape: tuple[int, int, int]) -> None:
    z = torch.zeros(shape, device=device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    with backend.use("triton"):
        loss = qfl.quality_focal_loss(z, none, none, none.float(), torch.ones(shape[0], shape[2], device=device))
    loss.backward()
    assert loss == 0 and z.grad is not None


def test_registration_and_compilation(device: torch.device) -> None:
    logits = kernel_compare.with_layout((2, 3, 8), "channels", torch.Generator().manual_seed(0), 1.0).to(device)
    index, labels = torch.tensor([1, 9], device=device), torch.tensor([0, 2], device=device)
    quality, weight = torch.tensor([0.5, 0.9], device=device), torch.ones(2, 8, device=device)
    arguments = (logits.requires_grad_(), index, labels, quality, weight, 2.0, True, False)
    for backend_name in ("torch", "triton"):
        torch.library.opcheck(qfl._quality_focal_loss, (*arguments, backend_name))

    def term(z: torch.Tensor) -> torch.Tensor:
        return qfl.quality_focal_loss(z * 2, index, labels, quality, weight)

    with backend.use("triton"):
        eager = torch.autograd.grad(term(logits), logits)
        compiled = torch.autograd.grad(torch.compile(term, fullgraph=True, backend="aot_eager")(logits), logits)
    torch.testing.assert_close(compiled, eager)


def _dense(dtype: str, m_inner: bool) -> kernel_sass.Build:
    block_m = {"fp32": 128, "bf16": 256}[dtype] if m_inner else 128
    pointers = {"logits": dtype, "weight": "fp32", "partial": "fp32", "gradient": dtype}
    return kernel_sass.Build(
        "kernels.triton.quality_focal_loss",
        "_negative_kernel",
        {name: "*" + kind for name, kind in pointers.items()}
        | {"k_units": "i32", "m_units": "i32", "beta": "fp32", "UNIT_K": 16, "UNIT_M": 8, "M_INNER": m_inner}
        | {"BETA": 2, "GRADIENT": True, "BLOCK_K": 2048 // block_m, "BLOCK_M": block_m},
        aligned=tuple(pointers),
    )


POSITIVE = kernel_sass.Build(
    "kernels.triton.quality_focal_loss",
    "_positive_kernel",
    {"logits": "*bf16", "index": "*i64", "labels": "*i64", "quality": "*fp32", "weight": "*fp32", "partial": "*fp32"}
    | {"gradient": "*bf16", "P": "i32", "locations": "i32", "K": "i32", "M": "i32", "beta": "fp32"}
    | {"M_INNER": True, "BETA": 2, "GRADIENT": True, "BLOCK_P": 128},
)


@kernel_sass.by_targets
def test_machine_code(targets: tuple[int, ...]) -> None:
    dense = [_dense("fp32", True), _dense("bf16", False)]
    for result in kernel_sass.inspect([*dense, POSITIVE], targets):
        assert result.local == result.local_instructions == result.atomics == 0, result
        if result.build is POSITIVE:
            continue  # gathers single entries
        # The logits and their gradient in 16 bytes; the smaller accesses are the weight and a partial sum.
        assert result.loads[128] >= 2 and sum(result.loads.values()) - result.loads[128] <= 1, result
        assert result.stores[128] >= 2 and sum(result.stores.values()) - result.stores[128] <= 1, result
