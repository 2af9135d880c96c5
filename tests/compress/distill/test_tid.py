"""TID: the definition's worked example, and the whole against a naive reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from compress.data.batch import Target
from compress.distill import tid
from compress.distill.method import Outputs
from compress.distill.tid import (
    TID,
    Rules,
    best_ground_truth,
    best_share,
    integrated_score,
    region_weights,
    split_regions,
    weighted_difference,
)
from tests.helpers import gfl_case, method_checks
from tests.helpers.gfl_case import close
from tests.helpers.method_checks import batch, check_common, total, without_boxes, without_values
from tests.helpers.methods import build, rules_with
from tests.oracles import ORACLES, sine

LEVELS = len(gfl_case.SIZES)


def test_worked_example() -> None:
    expected = ORACLES["C_tid"]
    valid = torch.ones(1, 8, dtype=torch.bool)
    scores = {}
    for model in "ts":
        iou, quality = (torch.tensor([expected[f"{name}_{model}"]]) for name in ("iou", "p"))
        correct = torch.tensor([expected[f"cor_{model}"]]).bool()
        scores[model] = integrated_score(iou, quality, correct, valid, rules_with(top_share=3 / 8))
        close(scores[model][0], expected[f"Score_{model}"])
    regions = split_regions(scores["t"], scores["s"], 3.0)
    for index, name in enumerate(("high", "mid", "low")):
        assert (regions[0] == index).int().tolist() == expected[name]
    teacher, student = sine((8, 2), 1.0, 0.5, 0.2), sine((8, 2), 0.8, 0.5, 0.6)
    maps = [x.t().reshape(1, 2, 2, 4).float() for x in (student, teacher)]
    for place, wanted in zip(torch.eye(8), expected["d2"], strict=True):
        close(weighted_difference(*maps, place[None]), wanted)
    for index, mean in enumerate(expected["region_means"]):
        inside = (regions == index).float()
        close(weighted_difference(*maps, inside / inside.sum()), mean)
    close(weighted_difference(*maps, region_weights(regions, valid, (4.0, 2.0, 0.5))), expected["loss_4_2_05"])


def test_a_wrong_class_and_a_middling_box_cost() -> None:
    iou = torch.tensor([[0.5, 0.45, 0.4, 0.9]])  # thresholds belong to good and bad
    quality, valid = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.ones(1, 4, dtype=torch.bool)
    correct = torch.tensor([[True, False, True, True]])
    close(integrated_score(iou, quality, correct, valid, rules_with(top_share=0.75))[0], [4.0, 2.25, 0.8, 0.8])
    rules = Rules(0.6, 0.42, 0.75, (3.0, 2.0, 1.0), (7.0, 5.0, 1.0), 3.0)
    close(integrated_score(iou, quality, correct, valid, rules)[0], [14.0, 10.0, 7.0, 3.0])


def test_best_share_counts_valid_locations_only() -> None:
    quality = torch.arange(200.0).repeat(3, 1)
    valid = torch.ones(3, 200, dtype=torch.bool)
    valid[1, 100:] = False
    valid[2, 5:] = False
    best = best_share(quality, valid, 0.07)
    assert [x.nonzero().flatten().tolist() for x in best] == [list(range(186, 200)), list(range(93, 100)), [4]]


def test_best_ground_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 50, 2, generator=generator) * 40
    boxes = torch.cat((corner, corner + torch.rand(2, 50, 2, generator=generator) * 30), -1)
    truth = boxes[:, 3:10] + 2.5
    truth[:, 4] = truth[:, 1]  # equal: the lower index wins
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, 3:] = False
    iou, index = best_ground_truth(boxes, truth, mask)
    for b in range(2):
        wanted = box_iou(boxes[b], truth[b]).masked_fill(~mask[b], -1).numpy()
        np.testing.assert_allclose(iou[b].numpy(), wanted.max(1), atol=1e-6)
        np.testing.assert_array_equal(index[b].numpy(), wanted.argmax(1))
    monkeypatch.setattr(tid, "PAIRS", 300)  # in pieces of 3, 3 and 1
    for found, whole in zip(best_ground_truth(boxes, truth, mask), (iou, index), strict=True):
        assert torch.equal(found, whole)
    iou, index = best_ground_truth(boxes, truth[:, :0], mask[:, :0])
    assert (iou == -1).all() and (index == 0).all()


def test_weighted_difference_against_the_equation() -> None:
    student, teacher = sine((2, 3, 2, 2), 1.0, 0.7, 0.1), sine((2, 3, 2, 2), 1.3, 0.6, 0.4)
    weight = torch.tensor([[0.5, 0.0, 2.0, 1.0], [0.0, 3.0, 0.25, 0.0]])
    ours, exact = student.float().requires_grad_(), student.clone().requires_grad_()
    found = weighted_difference(ours, teacher.float(), weight)
    wanted = ((teacher - exact).square().mean(1).flatten(1) * weight).sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    gradients = torch.autograd.grad(found, ours)[0], torch.autograd.grad(wanted, exact)[0].float()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channels", [(4, 4), (4, 6)])
def test_the_whole_equals_a_naive_reference(channels: tuple[int, int]) -> None:
    targets = gfl_case.targets()
    targets[0].boxes[1] = torch.tensor([60.0, 60.0, 90.0, 100.0])
    crowd = dataclasses.replace(
        targets[1],
        boxes=torch.cat((torch.tensor([[0.0, 0.0, 96.0, 60.0]]), targets[1].boxes)),
        labels=torch.tensor([0, 1]),
        ignore=torch.tensor([True, False]),
    )
    student, teacher = outputs([targets[0], crowd], channels)
    # Loose rules, so that random predictions fill all regions.
    rules = rules_with(thr_pos=0.3, thr_neg=0.2, top_share=0.2)
    method = build(TID, *channels, levels=LEVELS, thr_pos=0.3, thr_neg=0.2, top_share=0.2, lambdas=(3.0, 2.0, 0.7))
    loss = method(student, teacher, batch())["tid"]
    wanted = naive(method, student, teacher, [targets[0], crowd], rules)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    regions = method.regions(student, teacher)
    assert student.targets is not None
    assert all(((regions == r) & student.targets.assignment.valid).any() for r in range(3))


def test_gradient_reaches_maps_and_adapter_alone() -> None:
    student, teacher = outputs(gfl_case.targets(), (4, 6))
    method = build(TID, 4, 6, levels=LEVELS)
    total(method(student, teacher, batch())).backward()
    assert all(x.grad is not None and x.grad.any() for x in student.features)
    assert all(x.grad is not None and x.grad.any() for x in method.parameters())
    assert all(x.grad is None for x in method_checks.leaves(student.prediction))
    for b, valid in enumerate(student.targets.assignment.valid if student.targets else ()):
        for x, inside in zip(student.features, valid.split([256, 64]), strict=True):
            assert x.grad is not None and not x.grad[b].abs().sum(0).flatten()[~inside].any()


def test_fewer_levels_are_compared_and_regions_counted_there_alone() -> None:
    student, teacher = outputs(gfl_case.targets(), (4, 4))
    build(TID, 4, 4, levels=1)(student, teacher, batch())["tid"].backward()
    assert student.features[0].grad is not None and student.features[1].grad is None
    M = student.features[0][0, 0].numel()
    assert student.targets is not None
    student.targets.assignment.valid[:, M:] = False  # what the coarse level holds takes no share of a region
    method = build(TID, 4, 4, levels=1)
    shown = method(student, teacher, batch())["tid"]
    other = dataclasses.replace(teacher, features=[teacher.features[0], teacher.features[1] + 9])
    assert method(student, other, batch())["tid"] == shown


def test_adapter() -> None:
    assert not list(build(TID, 4, 4).parameters())
    assert len(list(build(TID, 4, 4, adapter="always").parameters())) == 10
    assert build(TID, 4, 6).state_dict()["adapter.convs.4.weight"].shape == (6, 4, 1, 1)


def test_images_without_ground_truth_are_of_low_value() -> None:
    for images in ({0, 1}, {1}):
        student, teacher = outputs(without_boxes(images), (4, 4))
        method = build(TID, 4, 4, levels=LEVELS)
        regions = method.regions(student, teacher)
        assert all((regions[b] == 2).all() == (b in images) for b in range(2))
        loss = method(student, teacher, batch())["tid"]
        loss.backward()
        if images == {0, 1}:
            expected = 0.0
            assert student.targets is not None
            for b, valid in enumerate(student.targets.assignment.valid):
                maps = zip(student.features, teacher.features, strict=True)
                e = torch.cat([((t - s)[b] ** 2).mean(0).flatten() for s, t in maps])
                expected += 0.5 * e[valid].mean().item() / 2
            assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert all(x.grad is not None and x.grad.isfinite().all() and x.grad[1].any() for x in student.features)


def test_crowd_boxes_are_no_ground_truth() -> None:
    targets = gfl_case.targets()
    targets[0].ignore[:] = True
    student, teacher = outputs(targets, (4, 4))
    assert (build(TID, 4, 4, levels=LEVELS).regions(student, teacher)[0] == 2).all()


def test_what_holds_for_every_method() -> None:
    student, teacher = outputs(gfl_case.targets(), (4, 4))
    check_common(build(TID, 4, 4, levels=LEVELS), build(TID, 4, 4, levels=LEVELS, weight=0.0), student, teacher)


def test_no_value_is_read_on_the_way() -> None:
    student, teacher = (without_values(x) for x in outputs(gfl_case.targets(), (4, 6)))
    loss = build(TID, 4, 6, levels=LEVELS).to("meta")(student, teacher, batch())["tid"]
    loss.backward()
    assert loss.is_meta and all(x.grad is not None for x in student.features)


def test_constants_scale_the_loss() -> None:
    student, teacher = outputs(gfl_case.targets(), (4, 4))
    plain = build(TID, 4, 4, levels=LEVELS)(student, teacher, batch())["tid"]
    scaled = build(TID, 4, 4, levels=LEVELS, weight=0.5, lambdas=(16.0, 8.0, 2.0))(student, teacher, batch())["tid"]
    torch.testing.assert_close(scaled, plain * 2)


def outputs(targets: list[Target], channels: tuple[int, int]) -> tuple[Outputs, Outputs]:
    """CASE-G with feature maps; those of the student are leaves."""
    student, teacher = method_checks.outputs(targets)
    for model, c, phase in ((student, channels[0], 0.1), (teacher, channels[1], 0.9)):
        model.features = [
            sine((2, c, h, w), 1.2, 0.7, phase + level).float() for level, (h, w) in enumerate(gfl_case.SIZES)
        ]
    for x in student.features:
        x.requires_grad_()
    return student, teacher


def naive(method: TID, student: Outputs, teacher: Outputs, targets: list[Target], rules: Rules) -> float:
    """The definition in numpy, location by location."""
    with torch.no_grad():
        maps: list[list[Tensor]] = [method.adapter(student.features), teacher.features]
    loss = 0.0
    for b, target in enumerate(targets):
        truth, labels = target.boxes[~target.ignore], target.labels[~target.ignore]
        extent = [-(-side // 32) * 32 for side in target.size]
        scores, valid, e = [], [], []
        for model in (teacher, student):
            with torch.no_grad():
                boxes = model.detector.decode_boxes(model.prediction)[b]
                overlaps = box_iou(boxes, truth).numpy()
            logits = np.concatenate([z[b].detach().flatten(1).numpy() for z in model.prediction.logits], 1)
            valid = [
                y * s < extent[0] and x * s < extent[1]
                for (h, w), s in zip(gfl_case.SIZES, (8, 16), strict=True)
                for y in range(h)
                for x in range(w)
            ]
            iou, label = overlaps.max(1), labels.numpy()[overlaps.argmax(1)]
            q = np.array([1 / (1 + np.exp(-logits[label[a], a])) for a in range(len(label))])
            k = max(1, math.ceil(rules.top_share * sum(valid)))
            top = set(sorted((a for a in range(len(q)) if valid[a]), key=lambda a: -q[a])[:k])
            score = []
            for a in range(len(q)):
                r = 2.0 if iou[a] >= rules.thr_pos else 0.4 if iou[a] <= rules.thr_neg else 1.5
                ok = logits[:, a].argmax() == label[a]
                score.append(r * ((2.0 if ok else 1.5) if a in top else 0.4))
            scores.append(score)
        e = np.concatenate(
            [((t[b] - s[b]) ** 2).mean(0).flatten().detach().numpy() for s, t in zip(*maps, strict=True)]
        )
        regions: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for a in range(len(e)):
            if valid[a]:
                key, weak = scores[0][a] >= 3, scores[0][a] > scores[1][a]
                regions[0 if key and weak else 1 if key or weak else 2].append(e[a])
        loss += sum(weight * np.mean(regions[v]) for v, weight in enumerate(method.lambdas) if regions[v])
    return loss / len(targets)
