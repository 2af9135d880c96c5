"""Pruning with training images: what importances and budgets look at, and what is refused without."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.config.deploy import Deploy
from compress.config.model import Model
from compress.config.prune import Cut
from compress.data import synthetic
from compress.data.batch import collate
from compress.data.coco import CocoDetection
from compress.data.loader import eval_loader
from compress.data.transforms import eval_transform, train_transform
from compress.detectors.base import Detector
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, load_teacher_checkpoint
from compress.distill.weighting import TrainingPosition
from compress.prune.cut import cut
from compress.prune.graph import pruning_graph
from compress.prune.importance import importances
from compress.prune.order import blocks, leaving
from compress.run.prune import Images, PruningPlan, measure_sensitivity, prune_detector
from compress.training.evaluate import evaluate
from compress.training.learner import Learner, total_loss
from deploy.core.errors import UserError
from tests.helpers.own_layers import Between

SIDE = 96
FEW = ("head", "neck", "backbone.stage1", "backbone.stage2", "backbone.stem")  # what stays, so that little is measured


@pytest.fixture(scope="module")
def teacher() -> tuple[Detector, ModelRecord]:
    return load_teacher_checkpoint("zoo:quickstart")


@pytest.fixture(scope="module")
def training_images(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    folder = tmp_path_factory.mktemp("images") / "data"
    synthetic.generate(folder, train=16, val=1, size=128, classes=8, seed=3)
    return CocoDetection(folder / "train.json", folder / "images", train_transform(SIDE, SIDE, photometric=True))


@pytest.fixture
def plan(training_images: CocoDetection, tmp_path: Path) -> PruningPlan:
    return PruningPlan(
        settings=Cut(gflops=0.5, images=6),
        size=(SIDE, SIDE),
        resize_short_long=(SIDE, SIDE),
        images=training_images,
        deploy=Deploy(),
        sensitivities=tmp_path / "run" / "sensitivity.json",
    )


def settings(plan: PruningPlan, **keys: Any) -> PruningPlan:
    return replace(plan, settings=Cut(**{"images": 6, **keys}))


def test_losses_are_those_of_training(
    teacher: tuple[Detector, ModelRecord], plan: PruningPlan, training_images: CocoDetection
) -> None:
    """Of images spread over the training set, as evaluation shows them: nothing of the training's chance."""
    detector, _ = teacher
    detector.eval()
    found = [loss(detector).item() for loss in Images(plan)]
    shown = copy.copy(training_images)
    shown.transform = eval_transform(SIDE, SIDE)
    learner = Learner(detector, {}, None, None)
    for index, value in zip((0, 2, 5, 8, 10, 13), found, strict=True):
        batch = collate([shown[index]], (SIDE, SIDE))
        assert value == pytest.approx(total_loss(learner(batch, TrainingPosition(0, 1, 1))).item(), rel=1e-5)


@pytest.mark.parametrize("family", ["gfl", "faster_rcnn"])
def test_importances_come_out_the_same(plan: PruningPlan, family: str) -> None:
    """Also of a family that draws samples, and no statistics move."""
    model = Model(detector=family, backbone="nano", weights="none", neck_channels=32, head_depth=1)
    graph, plan = pruning_graph(build_detector(model, 8, seed=0)), settings(plan, gflops=0.5, images=2)
    before = {key: value.clone() for key, value in graph.traced.state_dict().items()}
    state = torch.random.get_rng_state()
    found = {}
    for kind in ("taylor", "fisher"):
        found[kind], again = (importances(graph, kind, losses=Images(plan)) for _ in range(2))
        assert all(torch.equal(again[name], scores) for name, scores in found[kind].items())
    other = importances(graph, "taylor", losses=Images(replace(plan, seed=1)))
    drawn = any(not torch.equal(other[name], scores) for name, scores in found["taylor"].items())
    assert drawn == (family == "faster_rcnn")
    assert any(not torch.equal(found["fisher"][name], scores) for name, scores in found["taylor"].items())
    assert not any(module.training for module in graph.traced.modules())
    assert all(torch.equal(value, before[key]) for key, value in graph.traced.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_map_is_that_of_evaluation(
    teacher: tuple[Detector, ModelRecord], plan: PruningPlan, training_images: CocoDetection
) -> None:
    shown = copy.copy(training_images)
    shown.transform = eval_transform(SIDE, SIDE)
    loader = eval_loader(shown, batch_size=5, workers=0, canvas=(SIDE, SIDE))
    expected = evaluate(teacher[0].eval(), loader, shown, torch.device("cpu")).map
    assert 30 < expected < 100
    assert Images(settings(plan, gflops=0.5, images=100)).mean_ap(teacher[0]) == pytest.approx(expected, abs=1e-6)
    assert Images(plan).mean_ap(teacher[0]) != pytest.approx(expected, abs=1)  # of six images


def test_the_drop_of_map_stays_within_its_budget(teacher: tuple[Detector, ModelRecord], plan: PruningPlan) -> None:
    """And one block of channels more would be too many."""
    detector, record = teacher
    plan = settings(plan, max_map_drop=20)
    smaller, result = prune_detector(detector, record, plan, print)
    images, graph = Images(plan), pruning_graph(detector)
    assert (result["budget"], result["asked"], result["sensitivity"]) == ("max_map_drop", 20, None)
    assert result["whole"] == images.mean_ap(detector.eval()) and result["found"] == images.mean_ap(smaller)
    assert result["whole"] - 20 <= result["found"] < result["whole"]
    order = blocks(graph, importances(graph, "group_norm"))
    n = sum((row["width"] - row["left"] + 7) // 8 for row in result["rows"])
    assert 0 < n < len(order)
    assert images.mean_ap(cut(detector, graph, leaving(order, n))) == result["found"]
    assert images.mean_ap(cut(detector, graph, leaving(order, n + 1))) < result["whole"] - 20
    assert not (detector.model and detector.model.widths) and smaller.model is not None and smaller.model.widths


def test_shares_by_sensitivity(
    teacher: tuple[Detector, ModelRecord], plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, record = teacher
    plan = settings(plan, max_map_drop=15, shares="sensitivity", keep=FEW, images=4)
    said: list[str] = []
    _, result = prune_detector(detector, record, plan, said.append)
    found = json.loads(json.dumps(result))["sensitivity"]
    names = [name for name, _ in detector.named_modules()]
    assert [row["name"] for row in found["rows"]] == sorted((row["name"] for row in found["rows"]), key=names.index)
    assert found["map"] == result["whole"] and found["images"] == 4
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in result["rows"]]
    assert result["whole"] - 15 <= result["found"]
    assert len({row["left"] / row["width"] for row in result["rows"]}) > 1
    assert len(said) == 1

    assert measure_sensitivity(detector, record, plan, print) == found

    measured = []
    monkeypatch.setattr(Images, "mean_ap", lambda self, detector: measured.append(detector) or 50.0)
    again = settings(plan, gflops=0.9, shares="sensitivity", keep=FEW, images=4)
    assert prune_detector(detector, record, again, print)[1]["sensitivity"] == found and not measured
    other = settings(again, gflops=0.9, shares="sensitivity", keep=FEW, images=3)
    assert prune_detector(detector, record, other, print)[1]["sensitivity"]["map"] == 50 and measured


@pytest.mark.parametrize(
    "keys",
    [
        {"gflops": 0.5, "importance": "taylor"},
        {"params": 0.5, "importance": "fisher"},
        {"gflops": 0.5, "shares": "sensitivity"},
        {"max_map_drop": 2.5},
    ],
)
def test_no_labels_no_importance_from_them(
    teacher: tuple[Detector, ModelRecord], plan: PruningPlan, keys: dict[str, Any]
) -> None:
    key = list(keys)[-1]
    wanted = (
        rf"^prune\.{key}: {keys[key]} needs labelled training images, and there are none; give some, or take \w+.*$"
    )
    with pytest.raises(UserError, match=wanted):
        prune_detector(*teacher, replace(settings(plan, **keys), images=None), print)


def test_labels_of_other_classes(teacher: tuple[Detector, ModelRecord], plan: PruningPlan, tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "three", train=2, val=1, size=64, classes=3, seed=0)
    three = CocoDetection(tmp_path / "three/train.json", tmp_path / "three/images", eval_transform(SIDE, SIDE))
    with pytest.raises(UserError, match=r"^prune\.importance: taylor looks at labels, and the classes of .*three"):
        prune_detector(*teacher, replace(settings(plan, gflops=0.5, importance="taylor"), images=three), print)
    looks_at_none = replace(settings(plan, gflops=0.9, keep=FEW), images=three)
    assert prune_detector(*teacher, looks_at_none, print)[1]["found"] > 0


def test_images_without_objects(teacher: tuple[Detector, ModelRecord], plan: PruningPlan, tmp_path: Path) -> None:
    assert plan.images is not None
    content = json.loads(plan.images.annotations.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != first]
    (tmp_path / "some.json").write_text(json.dumps(content))
    some = CocoDetection(tmp_path / "some.json", plan.images.folder, eval_transform(SIDE, SIDE))
    alone = settings(replace(plan, images=some), max_map_drop=1, images=1)
    with pytest.raises(UserError, match=r"^prune\.images: 1 of .*some\.json are looked at, and no box"):
        prune_detector(*teacher, alone, print)


@pytest.mark.parametrize("keys", [{"max_map_drop": 2.5}, {"gflops": 0.5, "shares": "sensitivity"}])
def test_nothing_to_lose(plan: PruningPlan, keys: dict[str, Any]) -> None:
    """A detector that finds nothing would be cut to nothing, or by no figure at all."""
    model = Model(backbone="nano", weights="none", neck_channels=32, head_depth=1)
    key = list(keys)[-1]
    with pytest.raises(UserError, match=rf"^prune\.{key}: .*(give|prune) a trained one"):
        detector, record = build_detector(model, 8, seed=0), ModelRecord(model=model, num_classes=8)
        prune_detector(detector, record, settings(plan, **keys, images=1), print)


def test_pruned_twice(teacher: tuple[Detector, ModelRecord], plan: PruningPlan) -> None:
    """Refused before an image is asked for."""
    detector, record = teacher
    graph = pruning_graph(detector, FEW)
    smaller = cut(detector, graph, leaving(blocks(graph, importances(graph, "group_norm")), 1))
    with pytest.raises(UserError, match=r"^prune: this detector was pruned before"):
        prune_detector(smaller, record, replace(settings(plan, max_map_drop=1), images=None), print)


def test_first_channels_that_cost_too_much(
    teacher: tuple[Detector, ModelRecord], plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No unpruned detector is called pruned. The mAP here is 50 for the whole one, and nothing for any other."""
    monkeypatch.setattr(Images, "mean_ap", lambda self, each: 0.0 if each.model.widths else 50.0)
    with pytest.raises(UserError, match=r"^prune\.max_map_drop: already the first channels cost more than 2 .*more$"):
        prune_detector(*teacher, settings(plan, max_map_drop=2, keep=FEW, images=1), print)


def test_a_budget_is_met_closely_or_it_is_said(
    teacher: tuple[Detector, ModelRecord], plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    close = settings(plan, gflops=0.9, keep=FEW)
    result = prune_detector(*teacher, close, said.append)[1]
    assert 0.95 * 0.9 < result["found"] / result["whole"] <= 0.9 and result["note"] is None and not said
    monkeypatch.setattr("compress.prune.search.MUCH_LESS", 1.0)  # a step of channels is never exact
    note = prune_detector(*teacher, close, said.append)[1]["note"]
    assert note.startswith(f"{result['found'] / result['whole']:.0%} of gflops stay where 90% were asked for: channels")
    assert said == [f"note: {note}"]


def test_layers_that_must_stay_whole_are_named(plan: PruningPlan) -> None:
    """`middle.a`, whose channels are flipped before they are read; where it is kept anyway, nothing is said."""
    detector = Between(8, middle="Flipped").eval()
    record, said = ModelRecord(model=Model(detector="tests.helpers.own_layers:Between"), num_classes=8), list[str]()
    found = prune_detector(detector, record, settings(plan, params=0.8), said.append)[1]
    assert found["whole_layers"] == ["middle.a.0"]
    assert said == [
        "note: middle.a.0 keep all channels: without some of them the detector would compute something else"
    ]
    kept = prune_detector(detector, record, settings(plan, params=0.9, keep=("middle.a",)), said.append)[1]
    assert kept["whole_layers"] == [] and len(said) == 1


def test_what_cannot_be_copied_is_one_line(plan: PruningPlan) -> None:
    detector = Between(8)
    detector.rows = (row for row in ())
    record = ModelRecord(model=Model(detector="tests.helpers.own_layers:Between"), num_classes=8)
    with pytest.raises(
        UserError, match=r"^prune: .* cannot be copied \(.*generator.*\), so it cannot be pruned; give it"
    ):
        prune_detector(detector, record, settings(plan, params=0.8), print)


def test_all_is_kept(teacher: tuple[Detector, ModelRecord], plan: PruningPlan) -> None:
    everything = ("backbone", "neck", "head")
    with pytest.raises(UserError, match=r"^prune\.keep: backbone, neck, head and .*; keep less$"):
        prune_detector(*teacher, settings(plan, gflops=0.5, keep=everything), print)
