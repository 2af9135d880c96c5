"""Importances against sums written out by hand, channel by channel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.detectors.base import Detector
from compress.prune.graph import PruningGraph, pruning_graph
from compress.prune.importance import importances
from deploy.core.errors import UserError
from tests.helpers.own_layers import Between
from tests.helpers.pruned import detector, lively, outputs, pictures

IMAGES = 3


def losses(count: int = IMAGES) -> list[Callable[[Detector], Tensor]]:
    """The mean square of all that the detector computes for an image, image by image."""
    images = pictures(count)

    def of(index: int) -> Callable[[Detector], Tensor]:
        def loss(model: Detector) -> Tensor:
            prediction = model(images[index : index + 1])
            return torch.stack([x.square().mean() for x in (*prediction.logits, *prediction.box_deltas)]).sum()

        return loss

    return [of(index) for index in range(count)]


@pytest.fixture(scope="module")
def own() -> Detector:
    whole: Detector = lively(Between(3, middle="Concatenated")).eval()
    return whole


@pytest.fixture(scope="module")
def graph(own: Detector) -> PruningGraph:
    return pruning_graph(own)


def value(kind: str, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """What one weight is worth, elementwise."""
    if kind == "group_norm":
        return weight**2
    if kind == "taylor":
        return (weight * torch.stack(gradients).mean(0)).abs()
    return weight**2 * torch.stack([gradient**2 for gradient in gradients]).mean(0)


@pytest.mark.parametrize("kind", ["group_norm", "taylor", "fisher"])
def test_a_channel_has_the_sum_over_all_that_leaves_with_it(kind: str, own: Detector, graph: PruningGraph) -> None:
    """`middle.a` makes 16 channels, which `middle.b` reads twice, beside 56 others: first and at 72."""
    model = own.requires_grad_(True)
    names = ("middle.a.0", "middle.a.1", "middle.b.0")
    weights = [model.get_submodule(name).weight for name in names]
    of_images = [torch.autograd.grad(loss(model), weights) for loss in losses()]
    values = [
        value(kind, weight.detach(), [gradients[i] for gradients in of_images]) for i, weight in enumerate(weights)
    ]
    expected = []
    for channel in range(16):
        sums = [values[0][channel].sum(), values[1][channel]]
        sums += [values[2][:, channel].sum(), values[2][:, 16 + 32 + 24 + channel].sum()]
        expected.append(sum(sums))
    wanted = torch.stack(expected)
    found = importances(graph, kind, losses=losses())["middle.a.0"]
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in graph.traced.parameters())


@pytest.mark.parametrize("kind", ["group_norm", "taylor", "fisher"])
def test_a_neuron_behind_a_flattened_map_belongs_to_its_channel(kind: str) -> None:
    """Faster R-CNN's maps: four layers make them, and the first fully connected layer has 49 inputs a channel."""
    whole = detector("faster_rcnn", head_depth=0)
    graph = pruning_graph(whole)
    heads = "roi_heads.box_head.fc6"
    seen = ["rpn.head.conv.0.0", heads]
    makers = [f"neck.fpn.layer_blocks.{level}.0" for level in range(4)]

    def loss(model: Detector) -> Tensor:
        return torch.stack([x.square().mean() for x in model.traced(pictures())]).sum()

    model = whole.requires_grad_(True)
    weights = {name: model.get_submodule(name).weight for name in (*makers, *seen)}
    gradients = dict(zip(weights, torch.autograd.grad(loss(model), list(weights.values())), strict=True))
    values = {name: value(kind, weight.detach(), [gradients[name]]) for name, weight in weights.items()}
    wanted = torch.stack(
        [
            sum(values[name][channel].sum() for name in makers)
            + values[seen[0]][:, channel].sum()
            + values[heads][:, 49 * channel : 49 * channel + 49].sum()
            for channel in range(32)
        ]
    )
    found = importances(graph, kind, losses=[loss])[makers[0]]
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-4, atol=1e-6)


def test_fisher_is_of_single_images(graph: PruningGraph) -> None:
    """Three times the same image is once that image; images that pull apart do not cancel, as they do in taylor."""
    (one,) = losses(1)
    once, thrice = (importances(graph, "fisher", losses=[one] * n) for n in (1, 3))
    for name in once:
        torch.testing.assert_close(once[name], thrice[name])
    apart = [one, lambda model: -one(model)]
    assert all(bool((score == 1).all()) for score in importances(graph, "taylor", losses=apart).values())
    for name, score in importances(graph, "fisher", losses=apart).items():
        torch.testing.assert_close(score, once[name])


def test_scores_have_mean_one_and_random_ones_a_seed(graph: PruningGraph) -> None:
    found = {kind: importances(graph, kind, losses=losses(1)) for kind in ("group_norm", "taylor", "fisher", "random")}
    for scores in found.values():
        assert scores.keys() == {group.name for group in graph.groups}
        for group in graph.groups:
            assert scores[group.name].shape == (group.width,) and scores[group.name].dtype == torch.float32
            assert float(scores[group.name].mean()) == pytest.approx(1, abs=1e-5) and bool(
                (scores[group.name] >= 0).all()
            )
    again, other = importances(graph, "random", seed=0), importances(graph, "random", seed=1)
    assert all(torch.equal(again[name], score) for name, score in found["random"].items())
    assert not any(torch.equal(other[name], score) for name, score in found["random"].items())


def test_what_no_loss_sees_has_no_order() -> None:
    """The box branch, under a loss of classes alone."""
    graph = pruning_graph(detector())

    def loss(model: Detector) -> Tensor:
        return torch.stack([x.square().mean() for x in model(pictures()).logits]).sum()

    scores = importances(graph, "taylor", losses=[loss])
    assert bool((scores["head.reg_convs.0.conv"] == 1).all()) and float(scores["head.cls_convs.0.conv"].std()) > 0


def test_importances_do_not_change_the_detector() -> None:
    whole = detector()
    before = outputs(whole, pictures())
    graph = pruning_graph(whole)
    importances(graph, "fisher", losses=[lambda model: model(pictures()).logits[0].sum()])
    assert all(torch.equal(a, b) for a, b in zip(outputs(whole, pictures()), before, strict=True))
    assert all(parameter.grad is None for parameter in whole.parameters())


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_no_images_and_losses_that_are_no_numbers_are_one_line(kind: str, graph: PruningGraph) -> None:
    with pytest.raises(UserError, match=rf"^prune\.importance: {kind} needs training images, and there are none; "):
        importances(graph, kind)
    good = losses(1)
    for number in (float("nan"), float("inf")):
        bad = [*good, lambda model, number=number: next(model.parameters()).sum() * number]
        with pytest.raises(UserError, match=r"^prune\.importance: the loss of training image 2 is (nan|inf)$"):
            importances(graph, kind, losses=bad)


def test_what_is_not_finite_is_one_line(graph: PruningGraph) -> None:
    """A finite loss whose gradient is none."""

    def cliff(model: Detector) -> Tensor:
        return (model.get_submodule("stem.0.0").weight.sum() * 0).sqrt()

    with pytest.raises(UserError, match=r"^prune\.importance: taylor of \S+ is not finite; .*random$"):
        importances(graph, "taylor", losses=[cliff])


def test_a_detector_that_gives_nan_is_one_line() -> None:
    whole = detector()
    with torch.no_grad():
        next(whole.parameters())[0] = float("nan")
    with pytest.raises(UserError, match=r"^prune: gfl gives NaN for an image of noise; prune one that trained well$"):
        pruning_graph(whole)
