"""CrossKD: losses against the oracles, the crossing against float64 written by hand, and the hooks."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou

from compress.data.batch import Target
from compress.detectors.backbones import build_backbone
from compress.detectors.base import GROUP_WIDTH, decode_level, freeze
from compress.detectors.gfl import GFL
from compress.distill.bckd import BCKD
from compress.distill.crosskd import CrossKD, align_scale, imitation, side_divergence
from compress.distill.method import Outputs
from deploy.core.errors import UserError
from kernels.ops.binary_kd_loss import reference
from tests.helpers import gfl_case
from tests.helpers.gfl_case import close
from tests.helpers.method_checks import assert_same, batch, bfloat16, certain, leaves, total
from tests.helpers.methods import build
from tests.oracles import ORACLES, sine

CHANNELS, CLASSES = 16, 3
SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
ALL_TERMS = ["crosskd_cls", "crosskd_reg", "crosskd_giou"]


def test_imitation_on_case_g() -> None:
    expected = ORACLES["E_crosskd"]
    student, teacher = gfl_case.outputs()
    assert student.targets is not None
    valid = student.targets.assignment.valid
    losses = imitation(
        student.prediction, teacher.prediction, valid, student.targets.avg_factor, None, terms=ALL_TERMS
    )  # fmt: skip
    close(losses["crosskd_cls"], expected["loss_cls_kd"])
    # The oracle's coefficients are those of the later configuration: 3 and 2.
    close(losses["crosskd_reg"] * 3, expected["loss_reg_kd"])
    close(losses["crosskd_giou"] * 2, expected["loss_bbox_kd"])
    close(losses["crosskd_reg"] * 4, [0.346199, 0.122852])
    torch.testing.assert_close(losses["crosskd_cls"], build(BCKD).by_level(student, teacher)["bckd_cls"])
    confidence = torch.cat([x.amax(1).flatten(1).sigmoid() for x in teacher.prediction.logits], 1)
    torch.testing.assert_close((confidence * valid).sum().item(), expected["weight_sum"], rtol=0, atol=1e-3)


def test_align_scale() -> None:
    student, teacher = sine((2, 2, 2, 2), 1.0, 0.7, 0.1), sine((2, 2, 2, 2), 2.0, 0.7, 0.9, 0.5)
    close(align_scale(student, teacher).flatten(), ORACLES["E_crosskd_align"]["out"])
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: align_scale(s, teacher.detach()), student.requires_grad_())
    align_scale(student, teacher).sum().backward()
    assert teacher.grad is None  # statistics are constants


def test_align_scale_of_a_single_element() -> None:
    student = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).requires_grad_()
    teacher = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    aligned = align_scale(student, teacher)
    assert torch.equal(aligned, teacher)
    aligned.sum().backward()
    assert student.grad is not None and not student.grad.any()


def test_side_divergence_is_a_sum_over_bins() -> None:
    student, teacher = sine((1, 68, 1, 2), 1.5, 0.45, 0.2), sine((1, 68, 1, 2), 1.8, 0.45, 0.6)
    found = side_divergence(student, teacher)
    for x in range(2):
        p, q = (z[0, :, 0, x].view(4, 17).softmax(1) for z in (teacher, student))
        assert found[0, x].item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: side_divergence(z, teacher), student.requires_grad_())


@pytest.mark.parametrize(("student_depth", "teacher_depth"), [(4, 4), (2, 3), (1, 2), (2, 1), (3, 3)])
def test_the_crossing_equals_float64_written_by_hand(student_depth: int, teacher_depth: int) -> None:
    split = 2 if (student_depth, teacher_depth) == (3, 3) else None
    learner, teacher_model = models(student_depth, teacher_depth)
    method = build(CrossKD, learner, teacher_model, giou_weight=2.0, split=split, teacher_split=split)
    student, teacher = run(learner, teacher_model)
    losses = method(student, teacher, batch())
    assert set(losses) == set(ALL_TERMS)
    layer = learner.head.reg_convs[0].conv
    (gradient,) = torch.autograd.grad(total(losses), [layer.weight])

    exact, exact_teacher = copy.deepcopy(learner.head).double(), copy.deepcopy(teacher_model.head).double()
    s_split, t_split = split or max(1, student_depth - 1), split or max(1, teacher_depth - 1)
    assert student.targets is not None
    targets = student.targets
    wanted = dict.fromkeys(ALL_TERMS, torch.zeros((), dtype=torch.float64))
    rows: list[tuple[Tensor, Tensor]] = []
    for level, valid in enumerate(targets.assignment.valid.split([h * w for h, w in SIZES], 1)):
        x, f = student.features[level].detach().double(), teacher.features[level].double()
        logits = by_hand(exact.cls_convs, x, s_split, exact_teacher.cls_convs, f, t_split, exact_teacher.gfl_cls)
        sides = by_hand(exact.reg_convs, x, s_split, exact_teacher.reg_convs, f, t_split, exact_teacher.gfl_reg)
        sides = sides * exact_teacher.scales[level].scale
        z_t, d_t = teacher.prediction.logits[level].double(), teacher.prediction.distribution[level].double()
        cls, _ = reference(logits.flatten(2), z_t.flatten(2), valid.double())
        wanted["crosskd_cls"] = wanted["crosskd_cls"] + cls / (targets.avg_factor.double() + 1.1920929e-07)
        r = z_t.sigmoid().amax(1).flatten(1) * valid
        p_x, p_t = (d.view(2, 4, 17, -1).softmax(2) for d in (sides, d_t))
        kl = (p_t * (p_t / p_x).log()).sum((1, 2)) / 4
        giou = generalised_iou(decode_level(sides), decode_level(d_t))
        rows.append((torch.stack(((r * kl).sum(), (r * (1 - giou)).sum())), r.sum()))
    reg, box = sum(x for x, _ in rows) / sum(r for _, r in rows)  # type: ignore[misc]
    wanted |= {"crosskd_reg": 4 * reg, "crosskd_giou": 2 * box}
    for name in ALL_TERMS:
        assert losses[name].item() == pytest.approx(wanted[name].item(), rel=1e-4), name
        assert losses[name].item() > 1e-4
    (exact_gradient,) = torch.autograd.grad(total(wanted), [exact.reg_convs[0].conv.weight])
    difference = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    assert difference < 1e-3 and exact_gradient.norm() > 1e-4


def test_gradients_reach_the_students_tower_and_not_the_teacher() -> None:
    learner, teacher_model = models(3, 3)
    teacher_model.requires_grad_(True)  # a teacher that was not frozen
    method = build(CrossKD, learner, teacher_model)
    student, teacher = run(learner, teacher_model)
    trainable = [x.requires_grad_() for x in (*teacher.features, *leaves(teacher.prediction))]
    total(method(student, teacher, batch())).backward()
    assert all(p.grad is None for p in teacher_model.parameters()) and all(x.grad is None for x in trainable)
    for tower in (learner.head.cls_convs, learner.head.reg_convs):
        for depth, layer in enumerate(tower):
            reached = depth < 2  # the crossing is after layer 2 of 3
            assert all((p.grad is not None and bool(p.grad.any())) == reached for p in layer.parameters())
    assert all(x.grad is not None and x.grad.any() for x in student.features)
    assert learner.head.gfl_cls.weight.grad is None and learner.head.gfl_reg.weight.grad is None
    assert not list(method.parameters()) and not method.state_dict()


def test_a_second_pass_does_not_mix_with_the_first() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    student, teacher = run(learner, teacher_model, seed=1)
    first = method(student, teacher, batch())
    run(learner, teacher_model, seed=2)  # never asked for
    student, teacher = run(learner, teacher_model, seed=1)
    assert_same(method(student, teacher, batch()), first)
    other = method(*run(learner, teacher_model, seed=2), batch())
    assert other["crosskd_cls"] != first["crosskd_cls"]


def test_each_pass_counts_once_and_leaves_nothing_behind() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    student, teacher = run(learner, teacher_model)
    assert [len(tap._maps) for tap in method._taps] == [5, 5]
    method(student, teacher, batch())
    assert [len(tap._maps) for tap in method._taps] == [0, 0]
    with pytest.raises(RuntimeError, match="no head features"):
        method(student, teacher, batch())


def test_evaluation_is_not_recorded() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    with torch.no_grad():
        run(learner, teacher_model)
    assert not any(tap._maps for tap in method._taps)
    learner.eval()
    run(learner, teacher_model)
    assert not any(tap._maps for tap in method._taps)


def test_copies_of_the_student_do_not_feed_the_method() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    student, teacher = run(learner, teacher_model, seed=1)
    average, sent = copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))
    for clone in (average, sent):
        clone.train()
        run(clone, teacher_model, seed=2)
        (tap,) = clone.head.cls_convs[0].gn._forward_hooks.values()
        assert not tap._maps
    losses = method(student, teacher, batch())
    student, teacher = run(learner, teacher_model, seed=1)
    assert_same(method(student, teacher, batch()), losses)


def test_hooks_go_with_the_method() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    hooks = [tower[0].gn._forward_hooks for tower in (learner.head.cls_convs, learner.head.reg_convs)]
    assert [len(x) for x in hooks] == [1, 1]
    del method
    gc.collect()
    assert [len(x) for x in hooks] == [0, 0]


def test_certainty_weights_and_half_precision() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model, giou_weight=1.0)

    def losses(method: CrossKD, certainty: float | None = None, *, half: bool = False) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            student, teacher = run(learner, teacher_model)
        if half:
            student, teacher = bfloat16(student), bfloat16(teacher)
        return method(student, teacher if certainty is None else certain(teacher, certainty), batch())

    plain = losses(method)
    assert_same(losses(method, 1.0), plain)
    assert_same(losses(method, 0.5), {name: value / 2 for name, value in plain.items()}, rtol=1e-6)
    assert all(value == 0 for value in losses(method, 0.0).values())
    half = losses(method, half=True)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert_same(half, plain, rtol=0.1)

    scaled = losses(build(CrossKD, learner, teacher_model, weight=0.5, cls_weight=4.0, reg_weight=4.0))
    assert_same(
        scaled, {"crosskd_cls": plain["crosskd_cls"] * 2, "crosskd_reg": plain["crosskd_reg"] / 2}, rtol=1e-6
    )  # fmt: skip
    learner.zero_grad()
    total(losses(build(CrossKD, learner, teacher_model, weight=0.0))).backward()
    assert all(not p.grad.any() for p in learner.head.parameters() if p.grad is not None)


def test_images_without_ground_truth() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    for images in ({0, 1}, {1}):
        student, teacher = run(learner, teacher_model, without=images)
        losses = method(student, teacher, batch())
        total(losses).backward()
        assert all(value.isfinite() and value > 0 for value in losses.values())  # negatives teach as well
        assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


def test_a_single_image_whose_last_levels_are_one_location() -> None:
    learner, teacher_model = models(2, 2)
    method = build(CrossKD, learner, teacher_model)
    student, teacher = run(learner, teacher_model, images=1)
    losses = method(student, teacher, batch())
    total(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


def test_heads_that_do_not_fit_are_named() -> None:
    wide = GFL(CLASSES, build_backbone("nano", weights="none", frozen_stages=-1), neck_channels=32, head_depth=2)
    more = GFL(7, build_backbone("nano", weights="none", frozen_stages=-1), neck_channels=16, head_depth=2)
    learner, teacher_model = models(2, 2)
    with pytest.raises(UserError, match="head has 16 channels, the teacher's has 32"):
        build(CrossKD, learner, wide)
    with pytest.raises(UserError, match="3 classes, the teacher's has 7"):
        build(CrossKD, learner, more)
    with pytest.raises(UserError, match="student's head has no convolutions"):
        build(CrossKD, models(0, 2)[0], teacher_model)
    with pytest.raises(UserError, match="teacher_split 3 is not a layer of the teacher's head of depth 2"):
        build(CrossKD, learner, teacher_model, teacher_split=3)
    assert not learner.head.cls_convs[0].gn._forward_hooks


def models(student_depth: int, teacher_depth: int) -> tuple[GFL, GFL]:
    """A student in training mode and a frozen teacher, heads with weights large enough to matter."""
    built = []
    for seed, depth in enumerate((student_depth, teacher_depth)):
        backbone = build_backbone("nano", weights="none", frozen_stages=-1)
        detector = GFL(CLASSES, backbone, neck_channels=CHANNELS, head_depth=depth)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in detector.head.parameters():
                parameter.copy_(parameter + 0.15 * torch.randn(parameter.shape, generator=generator))
            detector.head.gfl_cls.bias.fill_(-1.0)  # type: ignore[union-attr]
        built.append(detector)
    return built[0].train(), freeze(built[1])


def run(
    learner: GFL, teacher: GFL, *, seed: int = 0, without: set[int] | None = None, images: int = 2
) -> tuple[Outputs, Outputs]:
    """Run both heads on random pyramids of a 64 × 64 batch; the student's maps are leaves."""
    generator = torch.Generator().manual_seed(seed)
    maps = [
        [torch.randn(images, CHANNELS, h, w, generator=generator) for h, w in SIZES] for _ in range(2)
    ]  # fmt: skip
    for x in maps[0]:
        x.requires_grad_()
    prediction = learner.predict(maps[0])
    boxes = torch.tensor([[4.0, 6.0, 50.0, 60.0], [10.0, 10.0, 40.0, 30.0]])
    full = Target(
        boxes=boxes, labels=torch.tensor([0, 2]), ignore=torch.zeros(2, dtype=torch.bool),
        scores=None, image_id=0, size=(64, 64), original_size=(64, 64),
    )  # fmt: skip
    empty = dataclasses.replace(full, boxes=boxes[:0], labels=full.labels[:0], ignore=full.ignore[:0])
    narrow = dataclasses.replace(full, size=(64, 32))
    targets = [empty if i in (without or ()) else x for i, x in enumerate((full, narrow)[:images])]
    student = Outputs(maps[0], prediction, learner, learner.assign(prediction.float(), targets))
    with torch.no_grad():
        taught = teacher.predict(maps[1])
    return student, Outputs(maps[1], taught, teacher)


def by_hand(
    ours: nn.ModuleList, x: Tensor, split: int, theirs: nn.ModuleList, f: Tensor, their_split: int, last: nn.Conv2d
) -> Tensor:
    """Cross-head output of one tower: sums written out, from weights alone."""

    def before_relu(tower: nn.ModuleList, x: Tensor, layers: int) -> Tensor:
        for i in range(layers):
            x = layer(tower[i], F.relu(x) if i else x)
        return x

    def layer(module: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(x, module.conv.weight, padding=1)
        groups = y.reshape(y.shape[0], y.shape[1] // GROUP_WIDTH, -1)
        mean = groups.mean(2, keepdim=True)
        scale = ((groups - mean).square().mean(2, keepdim=True) + 1e-5).sqrt()
        normal = ((groups - mean) / scale).reshape(y.shape)
        return normal * module.gn.weight.view(1, -1, 1, 1) + module.gn.bias.view(1, -1, 1, 1)

    s, t = before_relu(ours, x, split), before_relu(theirs, f, their_split).detach()
    aligned = torch.zeros_like(s)
    for c in range(s.shape[1]):
        n = s[:, c].numel()
        mean_s, mean_t = s[:, c].sum() / n, t[:, c].sum() / n
        std_s = ((s[:, c] - mean_s).square().sum() / (n - 1)).sqrt()
        std_t = ((t[:, c] - mean_t).square().sum() / (n - 1)).sqrt()
        aligned[:, c] = (s[:, c] - mean_s) / (std_s + 1e-6) * std_t + mean_t
    y = F.relu(aligned)
    for i in range(their_split, len(theirs)):
        y = F.relu(layer(theirs[i], y))
    return F.conv2d(y, last.weight, last.bias, padding=1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([generalized_box_iou(x, y).diagonal() for x, y in zip(a, b, strict=True)])
