"""mc_dropout: exact distribution, both backends against float64, independence of launch and memory format."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import backend
from kernels.common.dropout_table import outcomes, table
from kernels.common.rows import CHUNK
from kernels.ops.mc_dropout import Dropout, mc_dropout, reference
from kernels.triton.dropout import philox
from tests.helpers import dropout_masks
from tests.helpers.kernel_compare import LAYOUTS, strided
from tests.oracles import ORACLES, sine

CPU = torch.device("cpu")
UET = (0.15, 0.2, 0.25, 0.3, 0.35)
BACKENDS = ["torch", "triton"]
ORACLE = ORACLES["A_uet_fgd"]

rates_lists = st.one_of(
    st.tuples(st.sampled_from([0.0, 0.1, 0.35, 0.9]), st.integers(1, 60)).map(lambda t: (t[0],) * t[1]),
    st.lists(st.sampled_from([0.0, 0.15, 0.2, 0.5, 0.75]), min_size=1, max_size=12).map(tuple),
    st.just(tuple(0.05 * k for k in range(1, 16))),
)


# The tables ------------------------------------------------------------------------------------------------------


@given(rates_lists)
def test_alias_tables_have_the_probabilities(rates: tuple[float, ...]) -> None:
    tables = table(rates, CPU)
    assert sum(group.copies for group in tables.groups) == len(rates)
    for group, wanted in zip(tables.groups, outcomes(rates), strict=True):
        words = [int(word) % (1 << 32) for word in tables.words[group.start : group.start + (1 << group.bits)]]
        drawn = [0] * len(words)  # of 2^32 random numbers
        for column, word in enumerate(words):
            limit, alias = word >> group.bits, word % (1 << group.bits)
            drawn[column] += limit
            drawn[alias] += (1 << (32 - group.bits)) - limit
        assert sum(drawn) == 1 << 32 and not any(drawn[len(wanted.probability) :])
        assert all(abs(d - p * 2**32) <= 1 for d, p in zip(drawn, wanted.probability, strict=False))
        assert all(d == 0 for d, p in zip(drawn, wanted.probability, strict=False) if p == 0)


@pytest.mark.parametrize("rates", [(0.1,) * 6, UET, (0.0, 0.5, 0.5, 0.25)])
def test_outcomes_are_those_of_all_masks(rates: tuple[float, ...]) -> None:
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(rates))), dtype=torch.float64).T
    mean, variance = reference(torch.ones(masks.shape[1], dtype=torch.float64), masks, rates)
    likely = [math.prod(1 - r if m else r for m, r in zip(mask, rates, strict=True)) for mask in masks.T.tolist()]
    wanted: Counter[tuple[float, float]] = Counter()
    for a, v, p in zip(mean.tolist(), variance.tolist(), likely, strict=True):
        wanted[round(a, 9), round(v, 9)] += p  # type: ignore[assignment]
    (group,) = outcomes(rates)
    found: Counter[tuple[float, float]] = Counter()
    for a, v, p in zip(group.mean, group.variance, group.probability, strict=True):
        found[round(a, 9), round(v + 0.0, 9)] += p  # type: ignore[assignment]
    assert found.keys() == wanted.keys()
    assert all(math.isclose(found[key], wanted[key], abs_tol=1e-12) for key in wanted)


# Statistics ------------------------------------------------------------------------------------------------------


def kept_of(x: Tensor, out: Tensor, n: int, rate: float) -> Tensor:
    return (out / x * n * (1 - rate)).round().long().flatten()


def chi_square(counts: Tensor, probability: list[float]) -> tuple[float, int]:
    """Statistic and degrees of freedom, outcomes with less than five expected thrown together."""
    expected = torch.tensor(probability, dtype=torch.float64) * counts.sum()
    rare = expected < 5
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp(min=1e-9)
    return float(((observed - expected) ** 2 / expected.clamp(min=1)).sum()), len(expected) - 1


def assert_distributed(counts: Tensor, probability: list[float]) -> None:
    statistic, freedom = chi_square(counts, probability)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("n", "rate"), [(10, 0.1), (5, 0.5), (50, 0.3)])
def test_counts_are_binomial(name: backend.Backend, n: int, rate: float, device: torch.device) -> None:
    x = torch.full((1, 16, 32, 32), 2.0, device=device)
    with backend.use(name):
        out, var = mc_dropout(x, Dropout((rate,) * n, seed=3))
    counts = torch.bincount(kept_of(x, out, n, rate).cpu(), minlength=n + 1)
    assert_distributed(counts, [math.comb(n, k) * (1 - rate) ** k * rate ** (n - k) for k in range(n + 1)])
    assert var is not None
    mean, variance = out.double().mean().item() / 2, var.double().mean().item() / 4
    spread = rate / (1 - rate)
    assert abs(mean - 1) < 5 * math.sqrt(spread / n / x.numel())
    assert abs(variance - spread * (n - 1) / n) < 0.05 * spread


@pytest.mark.parametrize("name", BACKENDS)
def test_patterns_of_different_rates(name: backend.Backend, device: torch.device) -> None:
    x = torch.ones(1, 16, 32, 32, device=device)
    with backend.use(name):
        out, _ = mc_dropout(x, Dropout(UET, seed=5, offset=9), variance=False)
    (group,) = outcomes(UET)
    values = torch.tensor(group.mean, dtype=torch.float64)
    order = values.argsort()
    nearest = torch.bucketize(out.flatten().cpu().double(), (values[order][1:] + values[order][:-1]) / 2)
    assert_distributed(torch.bincount(nearest, minlength=32), [group.probability[i] for i in order.tolist()])


def test_two_groups_are_poisson_binomial(device: torch.device) -> None:
    rates = tuple(0.04 * k for k in range(1, 13))  # 12 different rates: groups of 8 and 4
    x = torch.ones(1, 16, 32, 32, device=device)
    for name in BACKENDS:
        with backend.use(name):  # type: ignore[arg-type]
            out, var = mc_dropout(x, Dropout(rates, seed=1))
        assert var is not None
        spread = sum(r / (1 - r) for r in rates) / 144  # variance of the mean
        assert abs(out.mean().item() - 1) < 5 * math.sqrt(spread / x.numel())
        assert abs(out.double().var().item() / spread - 1) < 0.06
        # E[second moment] - E[mean^2]
        wanted = sum(1 / (1 - r) for r in rates) / 12 - (1 + spread)
        assert abs(var.double().mean().item() / wanted - 1) < 0.05 and var.min() >= 0


@pytest.mark.parametrize("name", BACKENDS)
def test_independent_across_elements_and_streams(name: backend.Backend, device: torch.device) -> None:
    shape = (2, 8, 16, 32)
    x = torch.ones(shape, device=device)
    with backend.use(name):

        def draw(seed: int, offset: int) -> Tensor:
            out = mc_dropout(x, Dropout((0.5,) * 4, seed, offset), variance=False)[0].double()
            return (out - out.mean()) / out.std()

        a = draw(7, 0)
        limit = 5 / math.sqrt(a.numel())
        for other in (draw(7, 1), draw(8, 0), draw(7 + (1 << 32), 0), draw(7, 1 << 32)):
            assert abs((a * other).mean()) < limit
        for dims, shift in ((3, 1), (3, 2), (2, 1), (1, 1), (1, 2), (1, 4), (0, 1), ((1, 3), (1, 1)), ((1, 2), (4, 3))):
            assert abs((a * a.roll(shift, dims)).mean()) < limit, (dims, shift)
        assert torch.equal(a, draw(7, 0))


def test_channel_mode_drops_planes(device: torch.device) -> None:
    x = torch.randn(3, 700, 2, 3, device=device)
    for name in BACKENDS:
        with backend.use(name):  # type: ignore[arg-type]
            out, _ = mc_dropout(x, Dropout((0.4,) * 3, seed=2, mode="channel"))
        planes = (out / x).flatten(2)
        assert torch.allclose(planes, planes[..., :1].expand_as(planes), rtol=1e-5)
        counts = torch.bincount(kept_of(x[..., 0, 0], out[..., 0, 0], 3, 0.4).cpu(), minlength=4)
        assert_distributed(counts, [math.comb(3, k) * 0.6**k * 0.4 ** (3 - k) for k in range(4)])


# Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "chunk"), [("torch", CHUNK), ("torch", 16), ("triton", CHUNK)])
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 9)),
        st.lists(st.integers(1, 7), max_size=3).map(tuple),
    ),
    rates=st.sampled_from([(0.1,) * 10, UET, tuple(0.05 * k for k in range(1, 13))]),
    mode=st.sampled_from(["elementwise", "channel"]),
    combine=st.sampled_from(["none", "sum", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
    variance=st.booleans(),
)
def test_against_float64(  # type: ignore[no-untyped-def]
    name, chunk, shape, rates, mode, combine, dtype, layout, variance, device, monkeypatch
) -> None:
    monkeypatch.setattr("kernels.common.rows.CHUNK", chunk)
    if len(shape) < 2:
        mode = "elementwise"
    torch.manual_seed(0)
    plain = torch.randn(shape, device=device).to(dtype)
    x = strided(plain, layout).requires_grad_()
    drop = Dropout(rates, 11, 4, mode, combine)
    with backend.use(name):
        a, v = mc_dropout(torch.ones(shape, device=device), Dropout(rates, 11, 4, mode))  # factors of the copies
        out, var = mc_dropout(x, drop, variance=variance)
        upstream = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
        found = torch.autograd.grad([out, var] if variance else [out], x, upstream if variance else upstream[:1])[0]
    assert v is not None and out.dtype == dtype and out.stride() == torch.empty_like(x).stride()
    wide = plain.double().requires_grad_()
    factor = {"none": a.double(), "sum": a.double() + 1, "mean": (a.double() + 1) / 2}[combine]
    wanted = wide * factor, wide**2 * v.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    close(out, wanted[0], tolerance)
    loss = (wanted[0] * upstream[0]).sum()
    if variance:
        close(var, wanted[1], tolerance)
        loss = loss + (wanted[1] * upstream[1]).sum()
    close(found, torch.autograd.grad(loss, wide)[0], tolerance)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=tolerance, atol=tolerance)


def test_launch_does_not_matter(device: torch.device) -> None:
    from kernels.triton.mc_dropout import forward

    x = torch.randn(2, 7, 9, 11, device=device)
    drop = Dropout(UET, 1, 2)
    wanted = forward(x, drop, True)
    for tile in (16, 64, 1024):
        for layout in (x, x.to(memory_format=torch.channels_last)):
            for found, want in zip(forward(layout, drop, True, tile=tile), wanted, strict=True):
                assert found is not None and want is not None and torch.equal(found, want)


@pytest.mark.parametrize("variance", [False, True])
def test_chunks_and_layouts_do_not_matter(variance: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws give the same bits, and no change of the input."""
    plain = torch.randn(2, 6, 5, 7)
    for drop in (Dropout(UET, 1, 2), Dropout((0.3,) * 4, 1, 2, "channel", "sum")):
        wanted = mc_dropout(plain, drop, variance=variance)
        for chunk in (CHUNK, 64, 1):
            monkeypatch.setattr("kernels.common.rows.CHUNK", chunk)
            for layout in LAYOUTS:
                x = strided(plain, layout)
                for found, want in zip(mc_dropout(x, drop, variance=variance), wanted, strict=True):
                    assert (found is None and want is None) or torch.equal(found, want)  # type: ignore[arg-type]
                assert torch.equal(x, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "drop"), [("contiguous", Dropout((0.3,) * 4, 1, 2)), ("channels_last", Dropout(UET, 1, 2))]
)
def test_compiled_draws_the_same(layout: str, drop: Dropout) -> None:
    x = strided(torch.randn(2, 6, 5, 7), layout).requires_grad_()
    for compiled in (False, True):
        out, var = mc_dropout(x, drop, compiled=compiled)
        assert var is not None and out.stride() == var.stride() == x.stride()
        grad = torch.autograd.grad(out.sum() + var.sum(), x)[0]
        assert grad.stride() == x.stride()
        if not compiled:
            wanted = out, var, grad
    torch.testing.assert_close((out, var, grad), wanted)


@pytest.mark.slow
def test_whole_graph_and_new_offsets() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)

    def loss(x: Tensor, drop: Dropout) -> Tensor:
        out, var = mc_dropout(x, drop)
        assert var is not None
        return (out * 2 + var).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for offset in range(3):
        drop = Dropout(UET, 1, offset)
        found, wanted = (torch.autograd.grad(f(x, drop), x)[0] for f in (compiled, loss))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_registered_properly(name: str) -> None:
    if name == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter cannot run under the fake tensors of opcheck")
    for variance, layout in ((False, "contiguous"), (True, "contiguous"), (True, "channels_last")):
        x = strided(torch.randn(2, 3, 4, 5), layout).requires_grad_()
        arguments = (x, list(UET), 1, 2, "elementwise", "mean", variance, False, name)
        torch.library.opcheck(torch.ops.detector_kernels.mc_dropout, arguments)


def test_reference_has_the_numbers_of_uet() -> None:
    """Given masks of two copies of different rates: U, and both residual combinations."""
    o = ORACLES["A_uet"]
    teacher = torch.tensor(o["F_T"], dtype=torch.float64)
    kept = torch.tensor([o["mask1"], o["mask2"]], dtype=torch.float64)
    for combine, name in (("none", "U_K"), ("sum", "target_sum"), ("mean", "target_mean")):
        out, _ = reference(teacher, kept, (o["p1"], o["p2"]), combine)  # type: ignore[arg-type]
        torch.testing.assert_close(out, torch.tensor(o[name], dtype=torch.float64), rtol=0, atol=2e-6)
    student = sine((8,), 0.9, 0.8, 0.1)
    target = reference(teacher, kept, (o["p1"], o["p2"]), "sum")[0]
    assert (student - target).square().sum().item() == pytest.approx(o["mse_sum_vs_student"], abs=2e-5)


def test_cuda_backend_takes_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward with a variance, and backward of the mean alone, which is the forward kernel once more."""
    from kernels.ops import cuda
    from kernels.triton import mc_dropout as kernel

    called = []

    def forward(x: Tensor, dropout: Dropout, variance: bool) -> tuple[Tensor, Tensor | None]:
        called.append("forward")
        return kernel.forward(x, dropout, variance)

    def backward(grad_out: Tensor, grad_var: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
        called.append("backward")
        return kernel.backward(grad_out, grad_var, x, dropout)

    monkeypatch.setattr(cuda, "mc_dropout", forward)
    monkeypatch.setattr(cuda, "mc_dropout_backward", backward)
    asked = []
    monkeypatch.setattr(
        "kernels.common.backend.chosen", lambda x, has_cuda=False: "cuda" if has_cuda else asked.append(x)
    )
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    for variance, wanted in ((True, ["forward", "backward"]), (False, ["forward", "forward"])):
        called.clear()
        out, var = mc_dropout(x, Dropout(UET, 1), variance=variance)
        (out.sum() if var is None else out.sum() + var.sum()).backward()
        assert called == wanted and not asked


@pytest.mark.parametrize("name", BACKENDS)
def test_oracle_of_uet(name: backend.Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("the masks of the oracle go in through Triton's interpreter")
    dropout_masks.install(monkeypatch)
    i = torch.arange(2 * 4 * 4 * 6, dtype=torch.float64)
    teacher = (0.1 + 1.3 * torch.sin(0.31 * i + 0.7)).view(2, 4, 4, 6)
    with backend.use(name):
        out, var = mc_dropout(teacher.float(), Dropout(dropout_masks.RATES, 0))
    assert out.sum().item() == pytest.approx(ORACLE["U_sum"], rel=1e-5)
    assert out.flatten()[:6].tolist() == pytest.approx(ORACLE["U_first6"], rel=1e-5)
    wanted = reference(teacher, dropout_masks.kept(len(i)).view(5, 2, 4, 4, 6), dropout_masks.RATES)
    close(out, wanted[0], 1e-5)
    assert var is not None
    close(var, wanted[1], 1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2), ()])
def test_empty_and_scalar(name: backend.Backend, shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.ones(shape, device=device, requires_grad=True)
    with backend.use(name):
        out, var = mc_dropout(x, Dropout((0.1,), 1))
        assert var is not None and out.shape == var.shape == x.shape
        (out + var).sum().backward()


@triton.jit
def _philox_of_words(out, words):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 1)
    w = (tl.load(words + i), tl.load(words + 1 + i), tl.load(words + 2 + i), tl.load(words + 3 + i))
    r = philox(w[0], w[1], w[2], w[3], tl.load(words + 4 + i), tl.load(words + 5 + i))
    for lane in tl.static_range(4):
        tl.store(out + lane + i, r[lane].to(tl.int32, bitcast=True))


def test_philox_known_answers(device: torch.device) -> None:
    """The vectors of philox4x32-7 in Random123's kat_vectors."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for words, wanted in (
        ([0] * 6, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 6, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (pi, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    ):
        out = torch.zeros(4, dtype=torch.int32, device=device)
        _philox_of_words[(1,)](out, torch.tensor(words, device=device).to(torch.int32))
        assert [word % (1 << 32) for word in out.tolist()] == wanted


@pytest.mark.parametrize(
    "arguments",
    [
        {"rates": ()},
        {"rates": (1.0,)},
        {"rates": (-0.1,)},
        {"rates": (0.1,), "seed": -1},
        {"rates": (0.1,), "offset": 1 << 56},
        {"rates": (0.1,), "mode": "rows"},
        {"rates": (0.1,), "combine": "max"},
    ],
)
def test_refusals(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Dropout(**{"seed": 0, **arguments})  # type: ignore[arg-type]


def test_refused_tensors() -> None:
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        mc_dropout(torch.ones(3, dtype=torch.float64), Dropout((0.1,), 0))
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.int64"):
        mc_dropout(torch.ones(3, dtype=torch.int64), Dropout((0.1,), 0))
    with pytest.raises(ValueError, match="channel"):
        mc_dropout(torch.ones(3), Dropout((0.1,), 0, mode="channel"))
    with pytest.raises(ValueError, match="32 bits"):
        mc_dropout(torch.empty(1 << 31, device="meta"), Dropout((0.1,), 0))
