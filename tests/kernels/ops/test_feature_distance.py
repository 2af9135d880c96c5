"""feature_distance and attention_stats together: both backends against float64, and FGD's numbers through them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import backend
from kernels.common import rows as rows_file
from kernels.common.rows import CHUNK
from kernels.ops import attention_stats as attention_file
from kernels.ops import feature_distance as distance_file
from kernels.ops.attention_stats import attention_stats
from kernels.ops.feature_distance import feature_distance, feature_distance_and_means
from kernels.ops.mc_dropout import Dropout, mc_dropout
from tests.helpers import dropout_masks
from tests.helpers.kernel_compare import LAYOUTS, strided

BACKENDS = ["torch", "triton"]
PATHS = [("torch", CHUNK), ("torch", 16), ("triton", CHUNK)]  # 16: every map here is larger than a chunk
ORACLES = json.loads((Path(__file__).parents[2] / "oracles/oracles.json").read_text())
DRAWS = [
    None,
    Dropout((0.1,) * 5, 7, 2),
    Dropout((0.1, 0.4), 7, 3, "channel", "sum"),
    Dropout((0.2, 0.5), 1, 2, "elementwise", "mean"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

cases = given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 6), st.integers(1, 7)),
    weights=st.integers(1, 3),
    dropout=st.sampled_from(DRAWS),
    dtype=st.sampled_from(list(TOLERANCE)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),  # of the student and of the teacher
)


@pytest.mark.parametrize(("name", "chunk"), PATHS)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@cases
def test_distance_against_float64(name, chunk, shape, weights, dropout, dtype, layouts, device, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rows_file, "CHUNK", chunk)
    torch.manual_seed(0)
    B, C, h, w = shape
    student = strided(torch.randn(shape, device=device).to(dtype), layouts[0]).requires_grad_()
    teacher = strided(torch.randn(shape, device=device).to(dtype), layouts[1])
    spatial, channel = torch.rand(weights, B, h, w, device=device), torch.rand(B, C, device=device)
    upstream = torch.rand(weights, device=device)
    with backend.use(name):
        found = feature_distance(student, teacher, spatial, channel, dropout=dropout)
        one = feature_distance(student, teacher, spatial[0], channel, dropout=dropout)
        target = teacher.float() if dropout is None else mc_dropout(teacher.float(), dropout, variance=False)[0]
    (grad,) = torch.autograd.grad(found @ upstream, student)
    wide = student.detach().double().requires_grad_()
    wanted = distance_file.reference(wide, target.double(), spatial.double(), channel.double())
    (wanted_grad,) = torch.autograd.grad(wanted @ upstream.double(), wide)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert one.shape == () and one.item() == pytest.approx(found[0].item(), rel=1e-5)
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(student).stride()
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "chunk"), PATHS)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@cases
def test_attention_against_float64(name, chunk, shape, weights, dropout, dtype, layouts, device, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rows_file, "CHUNK", chunk)
    torch.manual_seed(weights)
    x = torch.randn(shape, device=device).to(dtype)
    x.view(-1)[0] = 0  # no gradient there
    x = strided(x, layouts[0]).requires_grad_()
    with backend.use(name):
        found = attention_stats(x, dropout=dropout)
        factor = torch.ones(shape, device=device)
        if dropout is not None:
            factor = mc_dropout(factor, dropout, variance=False)[0]
    upstream = [torch.randn_like(mean) for mean in found]
    (grad,) = torch.autograd.grad(found, x, upstream)
    wide = x.detach().double().requires_grad_()
    wanted = attention_file.reference(wide * factor.double())
    (wanted_grad,) = torch.autograd.grad(wanted, wide, [u.double() for u in upstream])
    for mean, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mean.double(), want, rtol=1e-5, atol=1e-6)
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "chunk"), PATHS)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@cases
def test_both_at_once(name, chunk, shape, weights, dropout, dtype, layouts, device, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Results equal one after the other, and the sum of their gradients (float64 oracles: above)."""
    monkeypatch.setattr(rows_file, "CHUNK", chunk)
    torch.manual_seed(weights)
    B, C, h, w = shape
    student = torch.randn(shape, device=device).to(dtype)
    student.view(-1)[0] = 0
    student = strided(student, layouts[0]).requires_grad_()
    teacher = strided(torch.randn(shape, device=device).to(dtype), layouts[1])
    spatial, channel = torch.rand(weights, B, h, w, device=device), torch.rand(B, C, device=device)
    with backend.use(name):
        found = feature_distance_and_means(student, teacher, spatial, channel, dropout=dropout)
        one, *_ = feature_distance_and_means(student, teacher, spatial[0], channel, dropout=dropout)
        sums = feature_distance(student, teacher, spatial, channel, dropout=dropout)
        means = attention_stats(student)
    upstream = [torch.randn_like(value) for value in found]
    before = student.detach().clone()
    (grad,) = torch.autograd.grad(found, student, upstream)
    assert torch.equal(before, student)
    parts = [
        torch.autograd.grad(sums, student, upstream[0])[0].float(),
        torch.autograd.grad(means, student, upstream[1:])[0].float(),
    ]
    for value, want in zip(found, (sums, *means), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    assert one.item() == pytest.approx(found[0][0].item(), rel=1e-5)
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(student).stride()
    # each part was rounded to the dtype by itself
    torch.testing.assert_close(grad.float(), parts[0] + parts[1], rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def test_launch_does_not_matter(device: torch.device) -> None:
    from kernels.triton import attention_stats as attention_kernel
    from kernels.triton import feature_distance as distance_kernel

    student, teacher = torch.randn(2, 2, 37, 9, 11, device=device)
    spatial, channel = torch.rand(2, 2, 9, 11, device=device), torch.rand(2, 37, device=device)
    upstream = torch.ones(2, device=device)
    drop = DRAWS[1]
    sums = distance_kernel.forward(student, teacher, spatial, channel, drop)
    grad = distance_kernel.backward(upstream, student, teacher, spatial, channel, drop)
    means = attention_kernel.forward(teacher, drop)
    for tile in (128, 2048):
        again = distance_kernel.forward(student, teacher, spatial, channel, drop, tile=tile)
        torch.testing.assert_close(again, sums, rtol=1e-5, atol=0)
        tiled = distance_kernel.backward(upstream, student, teacher, spatial, channel, drop, tile=tile)
        torch.testing.assert_close(tiled, grad, rtol=1e-6, atol=0)
        for found, wanted in zip(attention_kernel.forward(teacher, drop, tile=tile), means, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout", DRAWS)
def test_layouts_and_chunks_do_not_matter(dropout: Dropout | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw for all layouts of student and teacher; another one would be far beyond the tolerance."""
    plain = torch.randn(2, 2, 6, 5, 7)
    spatial, channel = torch.rand(2, 2, 5, 7), torch.rand(2, 6)

    def results(student: Tensor, teacher: Tensor) -> list[Tensor]:
        student.requires_grad_()
        found = feature_distance_and_means(student, teacher, spatial, channel, dropout=dropout)
        (grad,) = torch.autograd.grad(sum(value.sum() for value in found), student)
        return [*found, grad, *attention_stats(teacher, dropout=dropout)]

    wanted = results(plain[0].clone(), plain[1].clone())
    for chunk, a, b in itertools.product((CHUNK, 16), LAYOUTS, LAYOUTS):
        monkeypatch.setattr(rows_file, "CHUNK", chunk)
        student, teacher = strided(plain[0], a), strided(plain[1], b)
        torch.testing.assert_close(results(student, teacher), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(student, plain[0]) and torch.equal(teacher, plain[1])


def sines(a: float, b: float, c: float, d: float = 0.0) -> Tensor:
    return (d + a * torch.sin(b * torch.arange(192, dtype=torch.float64) + c)).view(2, 4, 4, 6).float()


def foreground() -> Tensor:
    """M_fg of the oracle."""
    mask = torch.zeros(2, 4, 6)
    mask[0, :, :4] = 1 / 16
    mask[0, 1:, 4:] = 1 / 20
    mask[1, 1:3, 1:4] = 1 / 6
    return mask


def attention(x: Tensor, dropout: Dropout | None = None) -> tuple[Tensor, Tensor]:
    spatial, channel = attention_stats(x, dropout=dropout)
    return 24 * F.softmax(spatial.flatten(1) / 0.5, 1).view(2, 4, 6), 4 * F.softmax(channel / 0.5, 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_oracle_of_fgd(name: backend.Backend) -> None:
    student, teacher = sines(1.0, 0.31, 0.2), sines(1.3, 0.31, 0.7, 0.1)
    fg = foreground()
    bg = (fg == 0).float()
    bg /= bg.sum((1, 2), keepdim=True)
    with backend.use(name if not torch.cuda.is_available() else "torch"):
        spatial, channel = attention(teacher)
        sums = feature_distance(student, teacher, torch.stack((fg, bg)) * spatial, channel) / 2
        spatial_s, channel_s = attention(student)
    wanted = ORACLES["E_fgd"]
    assert spatial[0, 0].tolist() == pytest.approx(wanted["S_t_img0_row0"], abs=2e-6)
    assert channel.flatten().tolist() == pytest.approx([*wanted["C_t"][0], *wanted["C_t"][1]], abs=2e-6)
    assert sums.tolist() == pytest.approx([wanted["init"]["fg"], wanted["init"]["bg"]], rel=2e-6)
    mask = ((channel_s - channel).abs().sum() + (spatial_s - spatial).abs().sum()) / 2
    assert mask.item() == pytest.approx(wanted["init"]["mask"], rel=2e-6)


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_uncertain_teacher_with_given_masks(combine, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The masks of UET's oracle, drawn on the fly, against the target made beforehand; both backends."""
    if torch.cuda.is_available():
        pytest.skip("the masks of the oracle go in through Triton's interpreter")
    dropout_masks.install(monkeypatch)
    student, teacher = sines(1.0, 0.31, 0.2), sines(1.3, 0.31, 0.7, 0.1)
    kept = dropout_masks.kept(192).view(5, 2, 4, 4, 6)
    uncertain = sum(teacher * m / (1 - p) for m, p in zip(kept, dropout_masks.RATES, strict=True)) / 5
    target = teacher + uncertain if combine == "sum" else (teacher + uncertain) / 2
    for name in BACKENDS:
        with backend.use(name):  # type: ignore[arg-type]
            drop = Dropout(dropout_masks.RATES, 0, combine=combine)
            found = attention(teacher, drop)
            distance = feature_distance(student, teacher, foreground() * found[0], found[1], dropout=drop)
        with backend.use("torch"):
            wanted = attention(target)
        for mean, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(mean, want, rtol=1e-5, atol=1e-6)
        want = distance_file.reference(student, target, foreground() * wanted[0], wanted[1])
        torch.testing.assert_close(distance, want, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [("channels_last", "channels_last"), pytest.param(("contiguous", "contiguous"), marks=pytest.mark.exhaustive)],
)
def test_compiled_and_whole_graph(layouts: tuple[str, str]) -> None:
    student, teacher = (strided(x, layout) for x, layout in zip(torch.randn(2, 2, 6, 5, 7), layouts, strict=True))
    student.requires_grad_()
    spatial, channel = torch.rand(2, 2, 5, 7), torch.rand(2, 6)

    def loss(student: Tensor, compiled: bool = False) -> Tensor:
        means = attention_stats(student, dropout=DRAWS[1], compiled=compiled)
        sums = feature_distance(student, teacher, spatial, channel, dropout=DRAWS[1], compiled=compiled)
        both = feature_distance_and_means(student, teacher, spatial, channel, dropout=DRAWS[1], compiled=compiled)
        return sums.sum() + sum(value.square().sum() for value in (*means, *both))

    (wanted,) = torch.autograd.grad(loss(student), student)
    for found in (loss(student, True), torch.compile(loss, fullgraph=True, backend="aot_eager")(student)):
        (grad,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(grad, wanted)
        assert grad.stride() == student.stride()


def test_registered_properly() -> None:
    draw = ([0.1, 0.2], 1, 2, "elementwise", "mean")
    for means, layout in ((False, "contiguous"), (True, "contiguous"), (True, "channels_last")):
        student, teacher = (strided(x, layout) for x in torch.randn(2, 2, 6, 5, 7))
        tensors = (student.requires_grad_(), teacher, torch.rand(3, 2, 5, 7), torch.rand(2, 6))
        settings = (*draw, means, False, "torch")
        torch.library.opcheck(torch.ops.detector_kernels.feature_distance, (*tensors, *settings))
        torch.library.opcheck(torch.ops.detector_kernels.attention_stats, (student, *draw, False, "torch"))


@pytest.mark.parametrize("name", BACKENDS)
def test_empty(name: backend.Backend, device: torch.device) -> None:
    x = torch.zeros(0, 3, 2, 2, device=device, requires_grad=True)
    with backend.use(name):
        sums = feature_distance(x, x, x.new_zeros(2, 0, 2, 2), x.new_zeros(0, 3))
        means = attention_stats(x)
        both = feature_distance_and_means(x, x, x.new_zeros(2, 0, 2, 2), x.new_zeros(0, 3))
    assert [value.shape for value in both] == [(2,), (0, 2, 2), (0, 3)]
    assert sums.tolist() == [0, 0] and means[0].shape == (0, 2, 2) and means[1].shape == (0, 3)
    assert torch.autograd.grad(sums.sum() + means[0].sum(), x)[0].shape == x.shape


def test_refusals() -> None:
    x = torch.ones(2, 3, 4, 5)
    spatial, channel = torch.ones(2, 4, 5), torch.ones(2, 3)
    with pytest.raises(ValueError, match="student"):
        feature_distance(x, x[:1], spatial, channel)
    with pytest.raises(ValueError, match="spatial"):
        feature_distance(x, x, spatial[:1], channel)
    with pytest.raises(ValueError, match="channel"):
        feature_distance(x, x, spatial, channel[:1])
    with pytest.raises(ValueError, match=r"\[B, C, h, w\]"):
        attention_stats(x[0])
    with pytest.raises(ValueError, match="C, h, w > 0"):
        feature_distance_and_means(x[:, :0], x[:, :0], spatial, channel[:, :0])
