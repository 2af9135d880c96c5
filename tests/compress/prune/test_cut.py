"""A detector without some of its channels computes what it did where nothing reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.detectors.base import Detector, ImageSize
from compress.detectors.build import build_detector, model_of
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.detectors.widths import LAYERS, widths_of
from compress.prune.cut import cut, shapes_of
from compress.prune.graph import PruningGraph, pruning_graph
from compress.prune.importance import importances
from compress.prune.order import blocks, leaving
from examples.own_detector.centers import Centers
from tests.helpers.own_layers import MIDDLES, Between
from tests.helpers.pruned import SIZE, detector, lively, masked, outputs, pictures, pruned

DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("quickstart", {}),
    "fcos": ("fcos", {}),
    "retinanet": ("retinanet", {}),
    "faster_rcnn": ("faster_rcnn", {}),
    "faster_rcnn, fully connected": ("faster_rcnn", {"head_depth": 0}),
    "resnet18": ("gfl", {"backbone": "resnet18"}),
    "mobilenet": ("gfl", {"backbone": "mobilenet_v3_small"}),
    "deep towers": ("gfl", {"head_depth": 3}),
    "no towers": ("gfl", {"head_depth": 0}),
}
OTHERS = {  # in `make test-exhaustive`
    f"{family}, {backbone}": (family, {"backbone": backbone, "neck_channels": 64, "head_depth": 2})
    for family in ("gfl", "fcos", "retinanet", "faster_rcnn")
    for backbone in ("resnet50", "mobilenet_v3_large", "nano2x")
}


def assert_masked(whole: Detector, smaller: Detector) -> None:
    """The two agree to 1e-4 of what was large before, and what left was not nothing."""
    images = pictures()
    before, expected, found = outputs(whole, images), outputs(masked(whole, smaller), images), outputs(smaller, images)
    scale = max(1.0, *(float(x.abs().max()) for x in before))
    assert [x.shape for x in found] == [x.shape for x in before]
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-4 * scale
    assert max(float((a - b).abs().max()) for a, b in zip(found, before, strict=True)) > 1e-2


@pytest.mark.parametrize("which", [*DETECTORS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS)])
def test_a_pruned_detector_is_the_masked_one(which: str) -> None:
    family, shape = (DETECTORS | OTHERS)[which]
    whole = detector(family, **shape)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    smaller = pruned(whole)
    assert_masked(whole, smaller)
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items()), "the whole one is kept"


def test_the_second_stage_is_the_masked_one() -> None:
    """Detections, which come by proposals: those are not in `traced`."""
    for depth in (0, 1):
        whole = detector("faster_rcnn", head_depth=depth)
        smaller = pruned(whole, share=0.3)
        found = []
        for each in (smaller, masked(whole, smaller)):
            with torch.no_grad():
                found += each.decode(each(pictures()), [ImageSize((SIZE, SIZE), (SIZE, SIZE))], score_threshold=0.2)
        assert len(found[0].scores) == len(found[1].scores) > 3
        torch.testing.assert_close(found[0].scores, found[1].scores, rtol=0, atol=1e-3)  # of logits to 50
        torch.testing.assert_close(found[0].boxes, found[1].boxes, rtol=0, atol=0.1)


def test_the_example_detector_can_be_pruned(tmp_path: Path) -> None:
    """And comes back from its file."""
    torch.manual_seed(0)
    whole: Detector = lively(Centers(3, width=32)).eval()
    smaller = pruned(whole)
    assert_masked(whole, smaller)
    save_detector(tmp_path / "a.safetensors", smaller, metadata=ModelRecord(model=model_of(smaller), num_classes=3))
    again, _ = load_detector(tmp_path / "a.safetensors")
    assert again.feature_channels == smaller.feature_channels < 32
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, pictures()), outputs(smaller, pictures()), strict=True))


@pytest.mark.parametrize("middle", MIDDLES)
def test_own_layers_lose_channels_or_stay_whole(middle: str) -> None:
    whole: Detector = lively(Between(3, middle=middle)).eval()
    smaller = pruned(whole, share=0.6)
    assert_masked(whole, smaller)
    names = [name for group in pruning_graph(whole).groups for name in group.makers if name.startswith("middle.")]
    assert {name.split(".")[1] for name in names} == MIDDLES[middle][1]


@pytest.fixture(scope="module")
def towers() -> tuple[Detector, PruningGraph]:
    whole = detector("gfl", head_depth=2)
    return whole, pruning_graph(whole)


@settings(max_examples=12)
@given(st.data())
def test_any_channels_may_leave(towers: tuple[Detector, PruningGraph], data: st.DataObject) -> None:
    """Not only those that an order would take: any norm groups but one, of any of the layers."""
    whole, graph = towers
    some = data.draw(st.lists(st.sampled_from(graph.groups), min_size=1, unique_by=lambda group: group.name))
    channels = {}
    for group in some:
        of_group = group.width // group.together
        norm_groups = data.draw(st.sets(st.integers(0, of_group - 1), min_size=1, max_size=of_group - 1))
        rows = torch.tensor(sorted(norm_groups))
        channels[group.name] = (rows[:, None] * group.together + torch.arange(group.together)).flatten()
    smaller = cut(whole, graph, channels)
    images = pictures()
    for a, b in zip(outputs(smaller, images), outputs(masked(whole, smaller), images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert model_of(smaller).widths == {
        name: widths_of(layer)
        for name, layer in smaller.named_modules()
        if isinstance(layer, LAYERS) and widths_of(layer) != widths_of(whole.get_submodule(name))
    }


def test_channels_of_a_cut_of_shapes_are_those_of_the_cut() -> None:
    whole = detector("retinanet")
    graph = pruning_graph(whole)
    channels = leaving(blocks(graph, importances(graph, "group_norm")), 9)
    shapes = {key: value.shape for key, value in cut(shapes_of(whole), graph, channels).state_dict().items()}
    assert shapes == {key: value.shape for key, value in cut(whole, graph, channels).state_dict().items()}


def test_what_was_frozen_stays_frozen_and_the_mode_stays() -> None:
    whole = build_detector(
        model_of(detector()).model_copy(update={"frozen_stages": 1, "norm_eval": True}), 3, 0
    ).train()
    smaller = pruned(whole)
    assert smaller.training and not smaller.backbone.stem.training
    for (name, ours), (_, theirs) in zip(smaller.named_parameters(), whole.named_parameters(), strict=True):
        assert (
            ours.requires_grad == theirs.requires_grad == (not name.startswith(("backbone.stem.", "backbone.stage1.")))
        )
    assert all(parameter.grad is None for parameter in whole.parameters())
