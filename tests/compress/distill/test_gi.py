"""GI imitation against the selection of the authors' code, and NMS over everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import nms

from compress.distill import gi
from compress.distill.gi import GI, best_apart, general_instances, imitation
from compress.distill.method import Outputs, boxes_in_strides
from tests.helpers import gfl_case, pyramid_maps
from tests.helpers.methods import build
from tests.oracles import ORACLES

CASE = ORACLES["E_gi"]
CHANNELS = 4


def case(student_channels: int = CHANNELS, certainty: list[Tensor] | None = None) -> tuple[Outputs, Outputs]:
    """CASE-G with random pyramid maps."""
    student, teacher = gfl_case.outputs()
    generator = torch.Generator().manual_seed(0)
    student.features = [torch.randn(2, student_channels, *size, generator=generator) for size in gfl_case.SIZES]
    teacher.features = [torch.randn(2, CHANNELS, *size, generator=generator) for size in gfl_case.SIZES]
    for x in [*student.features, *teacher.features]:
        x.requires_grad_()
    teacher.certainty = certainty
    return student, teacher


def loss(method: GI, student: Outputs, teacher: Outputs) -> Tensor:
    value: Tensor = method(student, teacher, pyramid_maps.EMPTY)["gi"]
    return value


def scores_and_boxes(student: Outputs, teacher: Outputs, level: int) -> tuple[Tensor, Tensor]:
    s, t = student.prediction, teacher.prediction
    return general_instances(
        s.logits[level].flatten(2), t.logits[level].flatten(2),
        boxes_in_strides(student, s)[level], boxes_in_strides(teacher, t)[level],
    )  # fmt: skip


def test_selection_of_the_authors() -> None:
    student, teacher = case()
    chosen = build(GI, CHANNELS, CHANNELS, levels=2, pool_batch=True).select(student, teacher)
    assert [x.tolist() for x in chosen] == CASE["idx"]
    scores, _ = scores_and_boxes(student, teacher, 0)
    torch.testing.assert_close(
        scores.flatten()[chosen[0]].detach(), torch.tensor(CASE["score_of_idx_l0"]), atol=1e-6, rtol=0
    )


def test_selection_of_each_image() -> None:
    student, teacher = case()
    assert student.targets is not None
    chosen = build(GI, CHANNELS, CHANNELS, levels=2, topk=3).select(student, teacher)
    first = 0
    for level, (h, w) in enumerate(gfl_case.SIZES):
        M = h * w
        scores, boxes = scores_and_boxes(student, teacher, level)
        expected = []
        for image in range(2):
            valid = student.targets.assignment.valid[image, first : first + M].nonzero()[:, 0]
            best = valid[nms(boxes[image, valid], scores[image, valid], 0.3)][:3]
            expected += (image * M + best).tolist()
        assert set(chosen[level].tolist()) == set(expected) and len(chosen[level]) == len(expected)
        first += M
    # padding of image 1 (its rows from 8 on, at stride 8) is never chosen
    assert not any(i >= 256 + 8 * 16 for i in chosen[0].tolist())


def test_the_box_is_of_the_model_with_the_higher_score() -> None:
    student, teacher = case()
    scores, boxes = scores_and_boxes(student, teacher, 0)
    s, t = student.prediction.logits[0].sigmoid(), teacher.prediction.logits[0].sigmoid()
    from_both = [boxes_in_strides(x, x.prediction)[0] for x in (student, teacher)]
    leads = {True: 0, False: 0}
    for image, y, x in [(i, y, x) for i in range(2) for y in range(16) for x in range(16)]:
        difference = t[image, :, y, x] - s[image, :, y, x]
        best = difference.abs().argmax()
        assert scores[image, y * 16 + x] == difference[best].abs()
        teacher_leads = bool(difference[best] >= 0)
        leads[teacher_leads] += 1
        assert torch.equal(boxes[image, y * 16 + x], from_both[teacher_leads][image, y * 16 + x])
    assert min(leads.values()) > 0


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 3), n=st.integers(1, 60), topk=st.integers(1, 12))
def test_looking_at_few_candidates_first_changes_nothing(seed: int, groups: int, n: int, topk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(groups, n, 2, generator=generator) * 30 - 15
    boxes = torch.cat((corner, corner + torch.rand(groups, n, 2, generator=generator) * 20), 2)
    scores = torch.rand(groups, n, generator=generator) - 0.3  # negative: padding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gi, "CANDIDATES", 4)
        chosen = best_apart(scores, boxes, topk, 0.3)
    expected = []
    for g in range(groups):
        real = (scores[g] >= 0).nonzero()[:, 0]
        expected += (g * n + real[nms(boxes[g, real], scores[g, real], 0.3)][:topk]).tolist()
    assert sorted(chosen.tolist()) == sorted(expected)
    assert (scores.flatten()[chosen].diff() <= 0).all()


def test_the_mean_is_over_chosen_locations() -> None:
    student, teacher = case()
    method = build(GI, CHANNELS, CHANNELS, levels=2)
    value = loss(method, student, teacher)
    expected = 0.0
    for s, t, index in zip(student.features, teacher.features, method.select(student, teacher), strict=True):
        s, t = (x.detach().double().permute(0, 2, 3, 1).reshape(-1, CHANNELS) for x in (s, t))
        expected += 2 * ((s[index] - t[index]) ** 2).mean().item()
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    for x, index in zip(student.features, method.select(student, teacher), strict=True):
        assert x.grad is not None
        touched = (x.grad != 0).any(1).flatten().nonzero()[:, 0]
        assert touched.tolist() == sorted(index.tolist())
    assert all(x.grad is None for x in teacher.features)
    assert all(x.grad is None for x in [*student.prediction.logits, *student.prediction.distribution])


def test_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    certainty = torch.rand(2, 2, 4, dtype=torch.float64, generator=generator)
    index = torch.tensor([3, 9, 15])
    assert torch.autograd.gradcheck(lambda x: imitation(x, t, index, certainty), s.requires_grad_())


def test_a_batch_of_padding_contributes_nothing() -> None:
    student, teacher = case()
    assert student.targets is not None
    student.targets.assignment.valid.zero_()
    value = loss(build(GI, CHANNELS, CHANNELS, levels=2), student, teacher)
    value.backward()
    assert value == 0 and all(x.grad is not None and not x.grad.any() for x in student.features)


def test_certainty() -> None:
    method = build(GI, CHANNELS, CHANNELS, levels=2)

    def weighted(values: list[Tensor] | None) -> float:
        return loss(method, *case(certainty=values)).item()

    ones = [torch.ones(2, *size) for size in gfl_case.SIZES]
    assert weighted(ones) == pytest.approx(weighted(None), rel=1e-6)
    assert weighted([0 * x for x in ones]) == 0
    random = [torch.rand(2, *size, generator=torch.Generator().manual_seed(1)) for size in gfl_case.SIZES]
    student, teacher = case()
    expected = 0.0
    for s, t, c, index in zip(student.features, teacher.features, random, method.select(student, teacher), strict=True):
        rows = c.flatten()[index, None] * ((s - t) ** 2).permute(0, 2, 3, 1).reshape(-1, CHANNELS)[index]
        expected += 2 * rows.mean().item()
    assert weighted(random) == pytest.approx(expected, rel=1e-5)


def test_adapters_precision_and_weights() -> None:
    student, teacher = case(student_channels=3)
    method = build(GI, 3, CHANNELS, levels=2)
    loss(method, student, teacher).backward()
    assert all(x.grad is not None and x.grad.any() for x in [*student.features, *method.parameters()])
    adapter = build(GI, 4, 4, adapter="always").adapter
    assert adapter.convs is not None and build(GI, 4, 4).adapter.convs is None

    low = case(student_channels=3)
    full = case(student_channels=3)
    for side_low, side_full in zip(low, full, strict=True):
        side_low.features = [x.detach().bfloat16() for x in side_low.features]
        side_full.features = [x.float() for x in side_low.features]
    value = loss(method, *low)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(method, *full))

    student, teacher = case()
    plain = loss(build(GI, CHANNELS, CHANNELS, levels=2, loss_weight=1.0), student, teacher)
    torch.testing.assert_close(loss(build(GI, CHANNELS, CHANNELS, levels=2, weight=0.25), student, teacher), plain / 2)
    nothing = loss(build(GI, CHANNELS, CHANNELS, levels=2, weight=0.0), student, teacher)
    grads = torch.autograd.grad(nothing, student.features)
    assert nothing == 0 and not any(g.any() for g in grads)
