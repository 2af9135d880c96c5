"""IoU losses from distributions: numbers of the authors' code and of mmdet, float64, layouts, machine code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.distill.bckd import BCKD
from kernels.common import backend
from kernels.common.distribution import distances_to_boxes, integral
from kernels.ops import distribution_iou_loss as ops
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.iou_loss import Kind, giou_loss, paired_iou
from tests.helpers import gfl_case, kernel_compare, kernel_sass
from tests.helpers.kernel_compare import close
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine

KINDS: tuple[Kind, ...] = ("iou", "giou", "diou", "ciou")


def test_numbers_of_the_authors_code(device: torch.device) -> None:
    """BCKD's localisation term of the head-level case, value and gradient, with the weights of the fused kernel."""
    expected = ORACLES["B_bckd_case"]
    student, teacher = gfl_case.outputs()
    assert student.targets is not None
    scale = build(BCKD).loc_weight / (student.targets.avg_factor + torch.finfo(torch.float32).eps)
    losses, norms = [], []
    for level, valid in enumerate(student.targets.assignment.valid.split([256, 64], 1)):
        z_s, z_t, d_t = (
            x[level].flatten(2).detach().to(device)
            for x in (student.prediction.logits, teacher.prediction.logits, teacher.prediction.distribution)
        )
        d_s = student.prediction.distribution[level].flatten(2).detach().to(device).requires_grad_()
        v = valid.float().to(device)
        with backend.use("triton"):
            _, disagreement = binary_kd_loss(z_s, z_t, v)
            loss = ops.distribution_iou_kd_loss(d_s, d_t, disagreement * v) * scale.to(device)
        losses.append(loss.detach().cpu())
        norms.append(torch.autograd.grad(loss, d_s)[0].norm().cpu())
    close(torch.stack(losses), expected["loss_score_kd"])
    close(torch.stack(norms), expected["grad_norm_scorekd"][2:])


def test_decoding_of_mmdet(device: torch.device) -> None:
    o = ORACLES["F3_integral"]
    logits, points = sine((2, 68), 2.0, 0.3, 0.1).float().view(2, 4, 17), torch.tensor(o["points"]).float()
    decoded = torch.tensor(o["boxes"]).float()
    truth = decoded + torch.tensor([1.0, -2.0, 3.0, 0.5])
    inputs = [x.to(device) for x in (logits, points, truth, torch.tensor([1.0, 0.5]))]
    with backend.use("triton"):
        loss, iou = ops.distribution_iou_loss(*inputs)
    close(iou.cpu(), paired_iou(decoded, truth).tolist())
    close(loss.cpu(), float(giou_loss(decoded, truth) @ torch.tensor([1.0, 0.5])))


@settings(max_examples=8)
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 8, 67])),
    bins=st.sampled_from([2, 5, 17]),
    layouts=st.tuples(*[st.sampled_from(["rows", "channels", "sliced"])] * 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)
def test_student_against_teacher(
    device: torch.device,
    shape: tuple[int, int],
    bins: int,
    layouts: tuple[str, str],
    dtype: torch.dtype,
    kind: Kind,
    seed: int,
) -> None:
    B, M = shape
    g = torch.Generator().manual_seed(seed)
    student, teacher = (kernel_compare.with_layout((B, 4 * bins, M), layout, g, 2.0).to(dtype) for layout in layouts)
    kernel_compare.check(
        lambda *x: ops.distribution_iou_kd_loss(*x, kind=kind),
        lambda *x: ops.kd_reference(*x, kind=kind),
        [student, teacher, torch.rand(B, M, generator=g)],
        device,
    )


@settings(max_examples=8)
@given(
    count=st.sampled_from([1, 2, 33]),
    bins=st.sampled_from([2, 17]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)
def test_student_against_ground_truth(
    device: torch.device, count: int, bins: int, dtype: torch.dtype, kind: Kind, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(count, 4, bins, generator=g) * 3).to(dtype)
    points = torch.randint(0, 40, (count, 2), generator=g).float()
    sides = torch.rand(count, 4, generator=g) * bins
    boxes = torch.cat((points - sides[:, :2], points + sides[:, 2:] + 0.1), 1)
    kernel_compare.check(
        lambda *x: ops.distribution_iou_loss(*x, kind=kind),
        lambda *x: ops.reference(*x, kind=kind),
        [logits, points, boxes, torch.rand(count, generator=g)],
        device,
    )


def test_extreme_logits(device: torch.device) -> None:
    """Softmax must not overflow, and a side of one certain bin has no gradient."""
    student = torch.full((1, 20, 3), -1e4)
    student[:, 2::5] = 1e4  # every side is 2 bins long
    teacher = torch.zeros(1, 20, 3)
    teacher[:, 3::5] = 300.0
    leaf = student.to(device).requires_grad_()
    with backend.use("triton"):
        loss = ops.distribution_iou_kd_loss(leaf, teacher.to(device), torch.ones(1, 3, device=device))
    close(loss.cpu(), 3 * (1 - 16 / 36))
    assert not torch.autograd.grad(loss, leaf)[0].any()


def test_the_torch_path_is_what_it_replaces() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 17, generator=g)
    points, boxes = torch.rand(5, 2, generator=g), torch.tensor([[-3.0, -2, 4, 5]]).expand(5, 4)
    weight = torch.rand(5, generator=g)
    loss, iou = ops.distribution_iou_loss(logits, points, boxes, weight)
    decoded = distances_to_boxes(points, integral(logits))
    assert torch.equal(loss, (giou_loss(decoded, boxes) * weight).sum())
    assert torch.equal(iou, paired_iou(decoded, boxes))


def test_nothing_costs_nothing(device: torch.device) -> None:
    for name in ("triton", "torch"):
        z = torch.zeros(0, 4, 17, device=device, requires_grad=True)
        dense = torch.zeros(2, 68, 0, device=device, requires_grad=True)
        with backend.use(name):
            loss, iou = ops.distribution_iou_loss(z, *(torch.zeros(s, device=device) for s in ((0, 2), (0, 4), (0,))))
            of_dense = ops.distribution_iou_kd_loss(dense, dense.detach(), torch.zeros(2, 0, device=device))
        (loss + of_dense).backward()
        assert loss == of_dense == 0 and iou.shape == (0,) and z.grad is not None and dense.grad is not None


def test_shapes_are_checked_at_the_door() -> None:
    z = torch.zeros(3, 4, 17)
    with pytest.raises(ValueError, match=r"\[P, 4, R\]"):
        ops.distribution_iou_loss(z[:, :3], z[:, 0, :2], z[..., 0], z[:, 0, 0])
    with pytest.raises(ValueError, match="points must be"):
        ops.distribution_iou_loss(z, z[:, 0, :3], z[..., 0], z[:, 0, 0])
    dense = torch.zeros(2, 68, 5)
    with pytest.raises(ValueError, match=r"\[B, 4 \* R, M\]"):
        ops.distribution_iou_kd_loss(dense[:, :67], dense[:, :67], torch.ones(2, 5))
    with pytest.raises(ValueError, match="differ in shape"):
        ops.distribution_iou_kd_loss(dense, dense[:1], torch.ones(2, 5))
    with pytest.raises(ValueError, match="weight must be"):
        ops.distribution_iou_kd_loss(dense, dense, torch.ones(2, 4))


def test_registration_and_compilation(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    student = kernel_compare.with_layout((1, 8, 4), "channels", g, 1.0).to(device).requires_grad_()
    teacher, weight = torch.randn(1, 8, 4, generator=g).to(device), torch.ones(1, 4, device=device)
    other = teacher.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(ops._distribution_iou_loss, (student, other, None, weight, "giou", 1e-6, True))

    def term(z: torch.Tensor) -> torch.Tensor:
        return ops.distribution_iou_kd_loss(z * 2, teacher, weight)

    with backend.use("triton"):
        eager = torch.autograd.grad(term(student), student)
        compiled = torch.autograd.grad(torch.compile(term, fullgraph=True, backend="aot_eager")(student), student)
    torch.testing.assert_close(compiled, eager)


def _build(dtype: str, m_inner: bool, boxes: bool = False) -> kernel_sass.Build:
    pointers = {"logits": dtype, "other": "fp32" if boxes else dtype, "weight": "fp32", "partial": "fp32"}
    pointers |= {"iou_out": "fp32", "gradient": dtype}
    return kernel_sass.Build(
        "kernels.triton.distribution_iou_loss",
        "_distribution_iou_kernel",
        {name: "*" + kind for name, kind in pointers.items()}
        | {"points": "*fp32" if boxes else None, "m_units": "i32", "eps": "fp32", "R": 17, "UNIT_M": 8, "KIND": 1}
        | {"M_INNER": m_inner, "GRADIENT": True, "BLOCK": 256 if m_inner else 32 if boxes else 64},
        aligned=tuple(pointers),
        num_warps=1 if boxes else 2,
    )


@kernel_sass.by_targets
def test_machine_code(targets: tuple[int, ...]) -> None:
    """float32 logits in 16 bytes. Of bfloat16 a thread takes four elements, 8 bytes: with eight locations a thread
    ptxas wants 255 registers and spills (sm_90), and with channels inside only four of a location lie aligned."""
    halves = [_build("fp32", False), _build("bf16", False), _build("fp32", False, boxes=True)]
    builds = [_build("fp32", True), *(dataclasses.replace(build, only=(90,)) for build in halves)]
    for result in kernel_sass.inspect(builds, targets):
        assert result.local == result.local_instructions == result.atomics == 0, result
        width = 64 if result.build.arguments["logits"] == "*bf16" else 128
        assert result.loads[width] >= 15, result
        assert result.stores[width] >= 5, result
        assert sum(count for bits, count in result.loads.items() if bits < width) <= 4, result
        assert sum(count for bits, count in result.stores.items() if bits < width) <= 2, result
