"""What can leave a detector, what `keep` keeps, and detectors that cannot be pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.detectors.base import Capability, Detector
from compress.detectors.widths import LAYERS, widths_of
from compress.prune.cut import cut
from compress.prune.graph import PruningGraph, pruning_graph
from compress.prune.importance import importances
from compress.prune.order import blocks, leaving
from compress.prune.trial import sound
from deploy.core.errors import UserError
from tests.helpers.own_layers import Between, OwnHeads, SecondStage
from tests.helpers.pruned import detector, lively, pruned


@pytest.fixture(scope="module")
def whole() -> Detector:
    return detector(head_depth=2)


@pytest.fixture(scope="module")
def graph(whole: Detector) -> PruningGraph:
    return pruning_graph(whole)


def fewest(whole: Detector, graph: PruningGraph, round_to: int = 8) -> Detector:
    """The detector without all that can leave."""
    order = blocks(graph, importances(graph, "random"), round_to=round_to)
    return cut(whole, graph, leaving(order, len(order)))


def makers(graph: PruningGraph) -> set[str]:
    return {name for group in graph.groups for name in group.makers}


PREDICTS = {
    "gfl": {"head.gfl_cls", "head.gfl_reg"},
    "fcos": {
        "head.classification_head.cls_logits", "head.regression_head.bbox_reg", "head.regression_head.bbox_ctrness"
    },
    "retinanet": {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"},
    "faster_rcnn": {
        "rpn.head.cls_logits", "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gfl", {}), ("fcos", {}), ("retinanet", {}), ("faster_rcnn", {}), ("faster_rcnn", {"head_depth": 0}),
        ("gfl", {"backbone": "resnet18"}), ("gfl", {"backbone": "mobilenet_v3_small"}),
    ],
)  # fmt: skip
def test_every_layer_can_lose_channels_but_what_the_detector_predicts(family: str, shape: dict[str, Any]) -> None:
    made = detector(family, **shape)
    layers = {name for name, layer in made.named_modules() if isinstance(layer, LAYERS)}
    assert layers - makers(pruning_graph(made)) == PREDICTS[family]


def test_the_graph_of_the_nano_backbone() -> None:
    """By hand: which layers make the channels of C3, and which read them."""
    groups = {group.name: group for group in pruning_graph(detector()).groups}
    c3 = groups["backbone.stage2.1.narrow.0"]
    assert (c3.width, c3.together) == (48, 1)
    assert set(c3.makers) == {
        "backbone.stage2.0.0", "backbone.stage2.0.1", "backbone.stage2.1.narrow.0", "backbone.stage2.1.narrow.1"
    }  # fmt: skip
    readers = {member.layer for member in c3.members if not member.output}
    assert readers == {"backbone.stage2.1.widen.0", "backbone.stage3.0.0", "neck.lateral_convs.0"}
    tower = groups["head.cls_convs.0.conv"]
    assert (tower.width, tower.together) == (32, 8)
    assert tower.makers == ["head.cls_convs.0.conv", "head.cls_convs.0.gn"]


@pytest.mark.parametrize("round_to", [8, 16, 32])
@pytest.mark.parametrize("family", ["gfl", "faster_rcnn"])
def test_widths_are_multiples_in_all_layers_that_lose_channels(family: str, round_to: int) -> None:
    whole = detector(family)
    graph = pruning_graph(whole)
    smaller = fewest(whole, graph, round_to)
    for group in graph.groups:
        left = [int(widths_of(smaller.get_submodule(name))[0]) for name in group.makers]
        assert set(left) == {group.width if group.width <= round_to else round_to}, group.name
    for layer in smaller.modules():
        if isinstance(layer, nn.GroupNorm):
            assert layer.num_channels == 8 * layer.num_groups and layer.num_channels % round_to == 0


KEEPS: list[tuple[str, set[str]]] = [
    ("backbone.stage1.1.widen.0", {"backbone.stage1.1.widen.0", "backbone.stage1.1.widen.1"}),
    ("backbone.stage1.1.widen.1", {"backbone.stage1.1.widen.0", "backbone.stage1.1.widen.1"}),  # a norm is a layer, too
    ("neck", {"neck.fpn_convs.0", "neck.fpn_convs.4", "neck.lateral_convs.0", "neck.lateral_convs.2"}),
    ("neck.lateral_convs.1", {"neck.lateral_convs.0", "neck.lateral_convs.2"}),  # all that are summed with it
    ("head.cls_convs", {"head.cls_convs.0.conv", "head.cls_convs.1.gn"}),
]


@pytest.mark.parametrize(("keep", "kept"), KEEPS)
def test_what_is_kept_keeps_its_outputs(whole: Detector, graph: PruningGraph, keep: str, kept: set[str]) -> None:
    with_keep = pruning_graph(whole, [keep])
    smaller = fewest(whole, with_keep)
    for name, layer in whole.named_modules():
        if isinstance(layer, LAYERS) and (name in kept or name == keep or name.startswith(f"{keep}.")):
            assert widths_of(smaller.get_submodule(name))[0] == widths_of(layer)[0], name
    gone = {group.name for group in graph.groups} - {group.name for group in with_keep.groups}
    inside = {group.name for group in graph.groups if kept & set(group.makers)}
    assert gone == inside, "and nothing else is kept"


@pytest.mark.parametrize("family", ["gfl", "retinanet", "faster_rcnn"])
def test_kept_maps_are_as_wide_as_before(family: str) -> None:
    whole = detector(family)
    free, kept = pruning_graph(whole), pruning_graph(whole, ["maps"])
    assert len(free.groups) == len(kept.groups) + 1
    assert fewest(whole, kept).feature_channels == whole.feature_channels == 32
    assert fewest(whole, free).feature_channels == 8


def test_a_prefix_of_a_name_is_another_layer(whole: Detector, graph: PruningGraph) -> None:
    """`backbone.stage1` is a part; `backbone.stage` is nothing."""
    with pytest.raises(
        UserError, match=r"^prune\.keep: gfl has no layer 'backbone\.stage'; did you mean backbone\.stage4\?"
    ):
        pruning_graph(whole, ["backbone.stage"])
    assert len(pruning_graph(whole, ["backbone.stage1", "head"]).groups) == len(graph.groups) - 2 - 4


def test_maps_of_levels_stay_equally_wide() -> None:
    """Where each level has a head of its own, their maps are cut apart."""
    own = lively(OwnHeads(3)).eval()
    graph = pruning_graph(own)
    (fine,) = (group for group in graph.groups if "middle.b.0" in group.makers)
    with pytest.raises(UserError, match=r"would have 24, 32 channels, and must .* add maps to prune\.keep$") as error:
        cut(own, graph, {fine.name: torch.arange(8)})
    assert "\n" not in str(error.value)
    assert pruned(own, keep=("maps",)).feature_channels == 32


def test_a_second_stage_that_is_not_traced_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^prune: SecondStage has a second stage that is not traced, .*`traced`$"):
        pruning_graph(SecondStage(3))


class Sizes(Between):
    """Cannot run on the image that is traced."""

    def features(self, images: Tensor) -> list[Tensor]:
        if images.shape[-1] != 96:
            raise ValueError("wants 96 pixels\nand says it twice")
        return super().features(images)


def test_a_detector_that_cannot_be_traced_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^prune: Sizes cannot be traced \(wants 96 pixels\), so it cannot be pruned$"):
        pruning_graph(Sizes(3))


class Untrained(Between):
    """Its network has no gradient at all."""

    def forward(self, images: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(images)


def test_a_detector_without_gradient_has_nothing_to_lose() -> None:
    assert pruning_graph(Untrained(3)).groups == ()


def test_a_trial_finds_a_wrong_guess(whole: Detector, graph: PruningGraph) -> None:
    """A group whose reader loses other channels than its maker; the others stay."""
    wrong = next(group for group in graph.groups if group.name == "backbone.stage2.1.widen.0")
    maker, norm, reader = wrong.members
    shifted = type(reader)(reader.layer, reader.output, reader.channels.roll(1), reader.owners)
    harmed = type(wrong)(wrong.name, wrong.width, wrong.together, (maker, norm, shifted))
    groups = [harmed if group is wrong else group for group in graph.groups]
    assert sound(graph.traced, groups, 64) == [group for group in groups if group is not harmed]
    assert Capability.DENSE in whole.capabilities and sound(graph.traced, [], 64) == []
