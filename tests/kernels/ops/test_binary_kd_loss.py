"""The fused BCKD classification loss: numbers of the authors' code, float64, layouts, compilation, machine code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import backend
from kernels.ops import binary_kd_loss as kd
from tests.helpers import kernel_compare, kernel_sass
from tests.helpers.kernel_compare import close
from tests.oracles import ORACLES


def test_numbers_of_the_authors_code(device: torch.device) -> None:
    expected = ORACLES["B_bckd_cls"]
    student = torch.tensor(expected["student"], device=device).requires_grad_()  # [2, 3]
    teacher = torch.tensor(expected["teacher"], device=device)
    with backend.use("triton"):
        loss, _ = kd.binary_kd_loss(student.t()[None], teacher.t()[None], torch.ones(1, 2, device=device))
    (loss / 3).backward()
    close(loss.cpu() / 3, expected["avg3"])
    close(student.grad.cpu(), expected["grad_avg3"])


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 37), st.sampled_from([1, 2, 7, 8, 16, 131])),
    layouts=st.tuples(*[st.sampled_from(["rows", "channels", "sliced"])] * 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    beta=st.sampled_from([1.0, 2.0, 1.5]),
    seed=st.integers(0, 10**6),
)
def test_equals_its_reference(
    device: torch.device,
    shape: tuple[int, int, int],
    layouts: tuple[str, str],
    dtype: torch.dtype,
    beta: float,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (kernel_compare.with_layout(shape, layout, g, 4.0).to(dtype) for layout in layouts)
    weight = torch.rand(shape[0], shape[2], generator=g)
    kernel_compare.check(
        lambda *x: kd.binary_kd_loss(*x, beta=beta),
        lambda *x: kd.reference(*x, beta),
        [student, teacher, weight],
        device,
    )


def test_saturated_and_equal_logits(device: torch.device) -> None:
    z = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0])
    student, teacher = (x.reshape(1, 1, -1) for x in torch.meshgrid(z, z, indexing="ij"))
    for beta in (1.0, 2.0):
        kernel_compare.check(
            lambda *x, b=beta: kd.binary_kd_loss(*x, beta=b),
            lambda *x, b=beta: kd.reference(*x, b),
            [student, teacher, torch.ones(1, 25)],
            device,
        )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_costs_nothing(device: torch.device, shape: tuple[int, int, int]) -> None:
    z = torch.zeros(shape, device=device, requires_grad=True)
    with backend.use("triton"):
        loss, disagreement = kd.binary_kd_loss(
            z, torch.zeros(shape, device=device), torch.ones(shape[0], shape[2], device=device)
        )
    loss.backward()
    assert loss == 0 and z.grad is not None and disagreement.shape == (shape[0], shape[2])
    assert not disagreement.any()


def test_registration_and_compilation(device: torch.device) -> None:
    student = kernel_compare.with_layout((2, 3, 8), "channels", torch.Generator().manual_seed(0), 1.0).to(device)
    teacher, weight = student * 0.5, torch.ones(2, 8, device=device)
    arguments = (student.requires_grad_(), teacher.detach(), weight, 1.0, True, False)
    for backend_name in ("torch", "triton"):
        torch.library.opcheck(kd._binary_kd_loss, (*arguments, backend_name))

    def term(z: torch.Tensor) -> torch.Tensor:
        loss, disagreement = kd.binary_kd_loss(z * 2, teacher.detach(), weight)
        return loss + disagreement.sum()

    with backend.use("triton"):
        eager = torch.autograd.grad(term(student), student)
        compiled = torch.autograd.grad(torch.compile(term, fullgraph=True, backend="aot_eager")(student), student)
    torch.testing.assert_close(compiled, eager)


def test_autocast_and_no_grad(device: torch.device) -> None:
    z, w = torch.randn(1, 3, 8, device=device), torch.ones(1, 8, device=device)
    with backend.use("triton"):
        plain, _ = kd.binary_kd_loss(z, z * 2, w)
        with torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
            cast, _ = kd.binary_kd_loss(z.requires_grad_(), z * 2, w)
    assert cast == plain and not cast.requires_grad


def _build(dtype: str, m_inner: bool) -> kernel_sass.Build:
    block_m = {"fp32": 128, "bf16": 256}[dtype] if m_inner else 128
    pointers = {"student": dtype, "teacher": dtype, "weight": "fp32", "partial": "fp32", "disagreement": "fp32"}
    pointers["gradient"] = dtype
    return kernel_sass.Build(
        "kernels.triton.binary_kd_loss",
        "_binary_kd_kernel",
        {name: "*" + kind for name, kind in pointers.items()}
        | {"k_units": "i32", "m_units": "i32", "beta": "fp32", "UNIT_K": 16, "UNIT_M": 8, "M_INNER": m_inner}
        | {"BETA": 1, "GRADIENT": True, "BLOCK_K": 2048 // block_m, "BLOCK_M": block_m},
        aligned=tuple(pointers),
    )


@kernel_sass.by_targets
def test_machine_code(targets: tuple[int, ...]) -> None:
    for result in kernel_sass.inspect([_build("fp32", True), _build("bf16", True), _build("bf16", False)], targets):
        assert result.local == result.local_instructions == result.atomics == 0, result
        # The logits and their gradient in 16 bytes; a smaller access is the weight, the disagreement or a partial sum.
        assert result.loads[128] >= 4 and sum(result.loads.values()) - result.loads[128] <= 1, result
        assert result.stores[128] >= 2 and sum(result.stores.values()) - result.stores[128] <= 2, result
