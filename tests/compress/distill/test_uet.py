"""UET around other methods: the target, its draws, its certainty, and what the wrapped method sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.bckd import BCKD
from compress.distill.method import Method, Outputs
from compress.distill.uet import UET
from kernels.ops.mc_dropout import reference
from tests.helpers import gfl_case
from tests.helpers.methods import build, build_uet
from tests.oracles import ORACLES, sine

RATES = (0.15, 0.2, 0.25, 0.3, 0.35)


class Recorder(Method):
    """Keeps what it is given."""

    needs = frozenset({Capability.FEATURES})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        self.seen = teacher
        return {"zero": torch.zeros(())}


def outputs(value: float | None = None) -> tuple[Outputs, Outputs]:
    """CASE-G with pyramid maps of 32 channels; the teacher's are constant if `value` is given."""
    student, teacher = gfl_case.outputs()
    teacher.detector.eval()
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 32, h, w, generator=generator) for h, w in gfl_case.SIZES]
    if value is not None:
        maps = [torch.full_like(x, value) for x in maps]
    return student, dataclasses.replace(teacher, features=maps)


def batch() -> Batch:
    return Batch(torch.zeros(2, 3, 128, 128, dtype=torch.uint8), gfl_case.targets())


def seen(uet: UET, teacher: Outputs) -> Outputs:
    uet(gfl_case.outputs()[0], teacher, batch())
    assert isinstance(uet.host, Recorder)
    return uet.host.seen


@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
def test_target_of_given_masks(combine: str) -> None:
    """The formula, on masks and numbers worked out by hand."""
    expected = ORACLES["A_uet"]
    x = torch.tensor(expected["F_T"]).view(1, 2, 2, 2)
    kept = torch.tensor([expected["mask1"], expected["mask2"]]).view(2, 1, 2, 2, 2)
    target, _ = reference(x, kept, (expected["p1"], expected["p2"]), combine)  # type: ignore[arg-type]
    key = {"none": "U_K", "sum": "target_sum", "mean": "target_mean"}[combine]
    torch.testing.assert_close(target.flatten(), torch.tensor(expected[key]), rtol=0, atol=2e-6)
    if combine == "sum":
        distance = (target - sine((1, 2, 2, 2), 0.9, 0.8, 0.1).float()).square().sum()
        assert distance.item() == pytest.approx(expected["mse_sum_vs_student"], abs=1e-5)


@pytest.mark.parametrize(("combine", "mean"), [("sum", 2.0), ("mean", 1.0)])
def test_target_has_the_mean_and_variance_of_the_formula(combine: str, mean: float) -> None:
    """E[U] = F and Var[U] = F^2 * mean(p / (1 - p)) / N."""
    uet = build_uet(Recorder(), rates=RATES, combine=combine)  # type: ignore[arg-type]
    target = seen(uet, outputs(1.0)[1]).features[0]
    spread = sum(p / (1 - p) for p in RATES) / len(RATES) ** 2 * (1 if combine == "sum" else 0.25)
    assert target.mean().item() == pytest.approx(mean, abs=5 * (spread / target.numel()) ** 0.5)
    assert target.var().item() == pytest.approx(spread, rel=0.06)


def test_without_dropout_the_target_is_the_teacher() -> None:
    _, teacher = outputs()
    for a, b in zip(seen(build_uet(Recorder(), rates=(0.0,)), teacher).features, teacher.features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_draws_depend_on_seed_pass_and_level_alone() -> None:
    _, teacher = outputs(1.0)
    a, b, other = (build_uet(Recorder(), rates=RATES, seed=s) for s in (3, 3, 4))
    torch.manual_seed(1)
    first = [x.clone() for x in seen(a, teacher).features]
    torch.manual_seed(2)  # the process's own random state has no part in it
    assert all(torch.equal(x, y) for x, y in zip(first, seen(b, teacher).features, strict=True))
    assert not torch.equal(first[0], seen(other, teacher).features[0])
    assert not torch.equal(first[0], seen(a, teacher).features[0]), "the second pass draws anew"
    corner = slice(None), slice(None), slice(0, 8), slice(0, 8)
    assert not torch.equal(first[0][corner], first[1][corner]), "levels draw apart"


def test_a_restored_state_goes_on_with_the_same_draws() -> None:
    _, teacher = outputs()
    a, b = build_uet(Recorder(), rates=RATES), build_uet(Recorder(), rates=RATES)
    seen(a, teacher)
    b.load_state_dict(a.state_dict())
    assert torch.equal(seen(a, teacher).features[0], seen(b, teacher).features[0])


def test_channel_mode_drops_whole_maps() -> None:
    target = seen(build_uet(Recorder(), rates=(0.5,) * 2, mode="channel"), outputs(1.0)[1]).features[0]
    assert (target == target[:, :, :1, :1]).all()
    assert set(target.unique().tolist()) == {0.5, 1.0, 1.5}  # (F + U) / 2, U in {0, 1, 2}


def test_certainty_falls_with_the_variance_and_has_mean_one() -> None:
    _, teacher = outputs(1.0)
    teacher.features[0][:, :, :8] = 5.0  # dropout scatters strong activations more
    result = seen(build_uet(Recorder(), rates=RATES, certainty=True), teacher)
    assert result.certainty is not None
    strong, weak = result.certainty[0][:, :8], result.certainty[0][:, 8:]
    assert strong.max() < weak.min()
    assert result.certainty[0].mean().item() == pytest.approx(1, abs=1e-5)
    assert seen(build_uet(Recorder(), rates=RATES), teacher).certainty is None


def test_variance_is_reported_per_level() -> None:
    uet = build_uet(Recorder(), rates=(0.5,) * 4)
    assert uet.observations() == {}
    seen(uet, outputs(2.0)[1])
    observed = uet.observations()
    assert list(observed) == ["variance_p3", "variance_p4"]
    # of N copies x * m / (1 - p), population variance: expectation x^2 * p / (1 - p) * (N - 1) / N
    assert observed["variance_p3"].item() == pytest.approx(4 * 1 * 3 / 4, rel=0.05)


def test_a_host_on_logits_gets_the_head_of_the_sampled_maps() -> None:
    detector = gfl_case.detector().eval()
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        maps = detector.features(images)
        teacher = Outputs(maps, detector.predict(maps), detector)
        student = Outputs(maps, teacher.prediction, detector, detector.assign(teacher.prediction, gfl_case.targets()))
    uet = build_uet(build(BCKD), rates=RATES, combine="sum")
    sampled = uet.sample(teacher)
    assert sampled.features is teacher.features
    repeat = build_uet(Recorder(), rates=RATES, combine="mean").sample(teacher)  # logits are averaged, never added
    expected = teacher.detector.predict(repeat.features)
    assert all(torch.equal(a, b) for a, b in zip(sampled.prediction.logits, expected.logits, strict=True))
    assert uet.needs == {Capability.DENSE, Capability.FEATURES}
    assert all(x > 0 for x in uet(student, teacher, batch()).values()), "the target is the teacher's own prediction"


def test_the_teacher_is_left_as_it_was() -> None:
    _, teacher = outputs()
    before = [x.clone() for x in teacher.features]
    state = {key: value.clone() for key, value in teacher.detector.state_dict().items()}
    build_uet(Recorder(), rates=RATES).sample(teacher)
    assert not teacher.detector.training
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.features, strict=True))
    assert all(torch.equal(value, teacher.detector.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("observed", [True, False])
def test_compiled_draws_are_asked_for_and_the_same(observed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("kernels.common.torch_pass.compiled_once", lambda f: asked.append(f) or f)
    _, teacher = outputs()
    plain, compiled = build_uet(Recorder(), rates=RATES), build_uet(Recorder(), rates=RATES, compiled=True)
    plain.passes = compiled.passes = 0 if observed else 1
    wanted = seen(plain, teacher).features
    assert not asked
    torch.testing.assert_close(seen(compiled, teacher).features, wanted)
    assert asked
