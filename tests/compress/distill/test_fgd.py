"""FGD against the numbers of the authors' code and a slow float64 form written from the equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.data.batch import Batch
from compress.distill.fgd import (
    FGD,
    attention,
    background,
    focal_terms,
    foreground,
    relation_rest,
)
from tests.helpers import pyramid_maps
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine

CASE = ORACLES["E_fgd"]
TERMS = ("fgd_fg", "fgd_bg", "fgd_mask", "fgd_rela")


def case() -> tuple[Tensor, Tensor, Batch]:
    """Student, teacher and boxes of the authors' numbers."""
    student = sine((2, 4, 4, 6), 1.0, 0.31, 0.2).float().requires_grad_()
    teacher = sine((2, 4, 4, 6), 1.3, 0.31, 0.7, 0.1).float()
    return student, teacher, pyramid_maps.batch(CASE["gt"], CASE["img_shape"])


def with_parameters() -> FGD:
    """The context parameters of the authors' numbers: parameter k of the list is S(shape; 0.3, 0.9, 0.2 + 0.5 k)."""
    method = build(FGD, 4, 4, levels=1)
    values = [sine(tuple(shape), 0.3, 0.9, 0.2 + 0.5 * k).float() for k, (_, shape) in enumerate(CASE["param_order"])]
    blocks = method.student_context[0], method.teacher_context[0]
    with torch.no_grad():
        for block, mask, rest in zip(blocks, (values[0], values[2]), (values[4:10], values[10:16]), strict=True):
            block.mask.weight.copy_(mask.view(1, 4))
            for parameter, value in zip(block.add.parameters(), rest, strict=True):
                parameter.copy_(value.view_as(parameter))
    return method


def run(method: FGD, student: Tensor, teacher: Tensor, batch: Batch) -> dict[str, Tensor]:
    return method(pyramid_maps.outputs([student]), pyramid_maps.outputs([teacher]), batch)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def assert_terms(losses: dict[str, Tensor], expected: dict[str, float]) -> None:
    weights = (1e-3, 5e-4, 5e-4, 5e-6)  # alpha, beta, gamma, lambda: the authors' for GFL
    for name, weight in zip(TERMS, weights, strict=True):
        assert losses[name].dtype == torch.float32 and losses[name].shape == ()
        assert (losses[name] / weight).item() == pytest.approx(expected[name.removeprefix("fgd_")], rel=2e-6)
    assert total(losses).item() == pytest.approx(expected["total"], rel=2e-6)


def test_attention_and_masks_of_the_authors() -> None:
    _, teacher, batch = case()
    spatial, channel = attention(teacher, 0.5)
    torch.testing.assert_close(spatial[0, 0], torch.tensor(CASE["S_t_img0_row0"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(channel, torch.tensor(CASE["C_t"]), atol=1e-6, rtol=0)
    boxes = torch.nn.utils.rnn.pad_sequence([t.boxes for t in batch.targets], batch_first=True)
    real = torch.tensor([[True, True], [True, False]])
    mask = foreground(boxes, real, torch.tensor(CASE["img_shape"]), (4, 6))
    torch.testing.assert_close(mask, torch.tensor(CASE["Mask_fg"]), atol=1e-6, rtol=0)


def test_terms_before_training() -> None:
    assert_terms(run(build(FGD, 4, 4, levels=1), *case()), CASE["init"])


def test_terms_and_gradient_with_trained_contexts() -> None:
    student, teacher, batch = case()
    losses = run(with_parameters(), student, teacher, batch)
    assert_terms(losses, CASE["set"])
    (grad,) = torch.autograd.grad(total(losses), student)
    assert grad.norm().item() == pytest.approx(CASE["set"]["grad_norm"], rel=2e-6)


def test_as_the_host_of_uncertain_targets() -> None:
    expected = ORACLES["A_uet_fgd"]
    student, teacher, batch = case()
    flat = teacher.double().flatten()
    i = torch.arange(len(flat))
    samples = [flat * ((7 * i + 3 * k) % 20 >= 2 + k) / (1 - (2 + k) / 20) for k in range(1, 6)]
    uncertain = torch.stack(samples).mean(0).view_as(teacher)
    targets = {"plain": teacher, "sum": teacher + uncertain, "mean": (teacher + uncertain) / 2}
    for name, target in targets.items():
        loss = total(run(with_parameters(), student, target.float(), batch))
        assert loss.item() == pytest.approx(expected[f"loss_{name}"], rel=2e-6)


# A slow form in float64, from the equations -------------------------------------------------------------


def slow_mask(boxes: list[list[float]], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """M_fg [h, w] of one image, location by location."""
    h, w = grid
    mask = torch.zeros(h, w, dtype=torch.float64)
    for x1, y1, x2, y2 in boxes:
        left, right = math.floor(x1 * w / size[1]), math.ceil(x2 * w / size[1])
        top, bottom = math.floor(y1 * h / size[0]), math.ceil(y2 * h / size[0])
        for y in range(max(top, 0), min(bottom, h - 1) + 1):
            for x in range(max(left, 0), min(right, w - 1) + 1):
                mask[y, x] = max(mask[y, x].item(), 1 / ((right - left + 1) * (bottom - top + 1)))
    return mask


def slow_terms(method: FGD, s: Tensor, t: Tensor, fg: Tensor, certainty: Tensor) -> Tensor:
    """The unweighted terms [4] of one level in float64. s, t: [B, C, h, w]; fg, certainty: [B, h, w]."""

    def attend(x: Tensor) -> tuple[Tensor, Tensor]:  # [C, h, w]
        where = torch.exp(x.abs().mean(0) / method.temperature)
        which = torch.exp(x.abs().mean((1, 2)) / method.temperature)
        return where / where.mean(), which / which.mean()

    def relate(block: torch.nn.Module, x: Tensor) -> Tensor:
        energy = torch.exp(torch.einsum("c,chw->hw", block.mask.weight[0].double(), x))
        context = (x * energy / energy.sum()).sum((1, 2))
        first, norm, _, last = block.add
        hidden = first.weight.double() @ context + first.bias.double()
        hidden = (hidden - hidden.mean()) / torch.sqrt(hidden.var(unbiased=False) + 1e-5)
        hidden = (hidden * norm.weight.double() + norm.bias.double()).clamp(min=0)
        return x + (last.weight.double() @ hidden + last.bias.double())[:, None, None]

    terms = torch.zeros(4, dtype=torch.float64)
    for i in range(len(s)):
        outside = (fg[i] == 0).double()
        bg = outside / outside.sum() if outside.any() else outside
        (where_s, which_s), (where_t, which_t) = attend(s[i]), attend(t[i])
        difference = certainty[i] * where_t * which_t[:, None, None] * (s[i] - t[i]) ** 2
        mask = (which_s - which_t).abs().sum() * certainty[i].mean() + ((where_s - where_t).abs() * certainty[i]).sum()
        student, teacher = relate(method.student_context[0], s[i]), relate(method.teacher_context[0], t[i])
        rela = (certainty[i] * (student - teacher) ** 2).sum()
        terms = terms + torch.stack([(fg[i] * difference).sum(), (bg * difference).sum(), mask, rela])
    return terms / len(s)


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_slow_form_with_gradients(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    s = torch.randn(2, 6, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    t = torch.randn(2, 6, 4, 6, dtype=torch.float64, generator=generator)
    method = build(FGD, 6, 6, levels=1).double()
    trained = list(method.parameters())
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    certainty = torch.rand(2, 4, 6, dtype=torch.float64, generator=generator) if weighted else None
    fg = torch.stack([slow_mask(b, tuple(s), (4, 6)) for b, s in zip(CASE["gt"], CASE["img_shape"], strict=True)])

    fg_term, bg_term, mask_term, plain = focal_terms(s, t, fg, background(fg), 0.5, certainty)
    shift = method.student_context[0](s) - method.teacher_context[0](t)
    terms = torch.stack([fg_term, bg_term, mask_term, plain + relation_rest(s, t, shift, certainty)])
    expected = slow_terms(method, s, t, fg, torch.ones_like(fg) if certainty is None else certainty)
    torch.testing.assert_close(terms, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(terms, expected, strict=True):
        a = torch.autograd.grad(ours, [s, *trained], retain_graph=True, materialize_grads=True)
        b = torch.autograd.grad(theirs, [s, *trained], retain_graph=True, materialize_grads=True)
        for ours_of, theirs_of in zip(a, b, strict=True):
            torch.testing.assert_close(ours_of, theirs_of, rtol=1e-8, atol=1e-10)


def test_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    spatial = torch.rand(2, 2, 2, 3, dtype=torch.float64, generator=generator)
    shift = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, 0.5), s)
    assert torch.autograd.gradcheck(lambda a, b, c: relation_rest(a, b, c, spatial[0]), (s, t, shift))
    assert torch.autograd.gradcheck(lambda a, b, c: relation_rest(a, b, c, None), (s, t, shift))
    fg = spatial[0] * (spatial[0] > 0.5)
    constant = t.detach()
    assert torch.autograd.gradcheck(lambda a: focal_terms(a, constant, fg, background(fg), 0.5, spatial[1]), s)


def test_crowds_are_background_and_empty_images_have_no_foreground() -> None:
    student, teacher, _ = case()
    boxes = CASE["gt"][0]
    crowd = pyramid_maps.batch([boxes, []], CASE["img_shape"], ignore=[[True, False], []])
    alone = pyramid_maps.batch([boxes[1:], []], CASE["img_shape"])
    method = build(FGD, 4, 4, levels=1)
    for a, b in zip(
        run(method, student, teacher, crowd).values(), run(method, student, teacher, alone).values(), strict=True
    ):
        torch.testing.assert_close(a, b)
    for empty in (
        pyramid_maps.batch([[], []], CASE["img_shape"]),
        pyramid_maps.batch([boxes, []], CASE["img_shape"], ignore=[[True, True], []]),
    ):
        losses = run(method, student, teacher, empty)
        assert losses["fgd_fg"] == 0 and losses["fgd_bg"] > 0
        assert total(losses).isfinite()


def test_box_norm_batch_puts_boxes_where_they_are() -> None:
    # 32 × 32 image in a 32 × 64 batch: its right half is padding, and a box over the left half of the image covers
    # the first quarter of the map, plus the inclusive column. As published the drawing is stretched to the half.
    batch = pyramid_maps.batch([[[0.0, 0.0, 15.9, 31.9]]], [(32, 32)], padded=(32, 64))
    s, t = torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 4, 8)
    sensitive = {}
    for norm in ("img", "batch"):
        x = s.clone().requires_grad_()
        losses = build(FGD, 2, 2, levels=1, box_norm=norm)(pyramid_maps.outputs([x]), pyramid_maps.outputs([t]), batch)
        (grad,) = torch.autograd.grad(losses["fgd_fg"], x)
        sensitive[norm] = (grad[0, 0, 0] != 0).tolist()
    assert sensitive["batch"] == [True] * 3 + [False] * 5
    assert sensitive["img"] == [True] * 5 + [False] * 3


def test_certainty() -> None:
    s, t = pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1)
    batch = pyramid_maps.batch([[[3.0, 2.0, 30.0, 20.0]], []], [(32, 64), (32, 50)])
    method = build(FGD, 4, 4, levels=2)
    for block in (*method.student_context, *method.teacher_context):
        torch.nn.init.normal_(block.add[-1].weight)
    student = pyramid_maps.outputs(s)
    plain = method(student, pyramid_maps.outputs(t), batch)
    ones = method(student, pyramid_maps.outputs(t, pyramid_maps.certainties(1.0)), batch)
    zeros = method(student, pyramid_maps.outputs(t, pyramid_maps.certainties(0.0)), batch)
    half = method(student, pyramid_maps.outputs(t, pyramid_maps.certainties(0.5)), batch)
    for name in TERMS:
        torch.testing.assert_close(ones[name], plain[name])
        torch.testing.assert_close(half[name], plain[name] / 2)
        assert zeros[name] == 0


def test_adapters_precision_and_who_learns() -> None:
    s, t = pyramid_maps.maps(3, 0, grad=True), pyramid_maps.maps(4, 1, grad=True)
    method = build(FGD, 3, 4, levels=2)
    batch = pyramid_maps.batch([[[3.0, 2.0, 30.0, 20.0]], []], [(32, 64), (32, 50)])
    total(method(pyramid_maps.outputs(s), pyramid_maps.outputs(t), batch)).backward()
    assert all(x.grad is None for x in t)
    assert all(x.grad is not None and x.grad.any() for x in s)
    assert all(p.grad is not None for p in method.parameters())
    assert method.teacher_context[0].add[-1].weight.grad.any()

    assert build(FGD, 4, 4).adapter.convs is None and build(FGD, 4, 4, adapter="always").adapter.convs is not None
    rounded_s, rounded_t = [x.detach().bfloat16() for x in s], [x.detach().bfloat16() for x in t]
    low = method(pyramid_maps.outputs(rounded_s), pyramid_maps.outputs(rounded_t), batch)
    full = method(
        pyramid_maps.outputs([x.float() for x in rounded_s]),
        pyramid_maps.outputs([x.float() for x in rounded_t]),
        batch,
    )
    for name in TERMS:
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], full[name])


def test_weights_and_levels() -> None:
    student, teacher, batch = case()
    plain = run(build(FGD, 4, 4, levels=1), student, teacher, batch)
    halved = run(build(FGD, 4, 4, levels=1, weight=0.5), student, teacher, batch)
    faster = run(
        build(FGD, 4, 4, levels=1, alpha=5e-5, beta=2.5e-5, gamma=5e-5, relation=5e-7), student, teacher, batch
    )
    for name, share in zip(TERMS, (0.05, 0.05, 0.1, 0.1), strict=True):
        torch.testing.assert_close(halved[name], plain[name] / 2)
        torch.testing.assert_close(faster[name], plain[name] * share)
    nothing = total(run(build(FGD, 4, 4, levels=1, weight=0.0), student, teacher, batch))
    (grad,) = torch.autograd.grad(nothing, student)
    assert nothing == 0 and not grad.any()

    s, t = pyramid_maps.maps(4, 0), pyramid_maps.maps(4, 1)
    method = build(FGD, 4, 4, levels=2)
    both = method.by_level(pyramid_maps.outputs(s), pyramid_maps.outputs(t), pyramid_maps.EMPTY)
    first = build(FGD, 4, 4, levels=1)(pyramid_maps.outputs(s), pyramid_maps.outputs(t), pyramid_maps.EMPTY)
    for name in TERMS:
        torch.testing.assert_close(both[name][0], first[name])


def test_compiled_passes_are_asked_for_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "kernels.common.torch_pass.compiled_once", lambda function: asked.append(function.__name__) or function
    )
    gradients = []
    for compiled in (False, True):
        student, teacher, batch = case()
        assert not asked
        loss = total(run(build(FGD, 4, 4, levels=1, compiled=compiled), student, teacher, batch))
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert set(asked) == {"_whole_means", "_whole_sums", "_whole_gradient"}
    torch.testing.assert_close(*gradients)
