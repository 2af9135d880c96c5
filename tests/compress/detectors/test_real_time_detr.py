"""D-FINE, RT-DETRv2, RF-DETR and LW-DETR: the library's own numbers, in our two halves."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from compress.config.families import FAMILY_FACTS
from compress.config.methods import Methods
from compress.config.model import Model
from compress.detectors.base import Capability, ImageSize, freeze
from compress.detectors.build import build_detector, inherit, model_of, model_size
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.detectors.transformers import sampling
from compress.detectors.transformers.lw_detr import LwDetr, RfDetr, _joined, _windowed
from compress.detectors.transformers.query_detector import QueryDetector
from compress.detectors.transformers.real_time_detr import DFine, RTDetrV2
from compress.detectors.transformers.row_sums import sum_rows
from compress.detectors.transformers.sampling import sample_rows
from compress.distill.build import build_methods
from compress.distill.weighting import TrainingPosition
from compress.prune.graph import pruning_graph
from compress.training.learner import Learner
from deploy.core.errors import UserError
from tests.helpers import tiny_detr

KINDS = (DFine, RTDetrV2, RfDetr, LwDetr)
each = pytest.mark.parametrize("kind", KINDS)


def library_labels(batch: tiny_detr.Batch) -> list[dict[str, Tensor]]:
    height, width = batch.images.shape[2:]
    labels = []
    for target in batch.targets:
        x1, y1, x2, y2 = target.boxes[~target.ignore].unbind(-1)
        boxes = torch.stack(((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height), -1)
        labels.append({"class_labels": target.labels[~target.ignore], "boxes": boxes})
    return labels


def losses(detector: QueryDetector, batch: tiny_detr.Batch) -> dict[str, Tensor]:
    prediction = detector.predict_in_training(detector.features(batch.images), batch.targets)
    return detector.loss(prediction, detector.assign(prediction, batch.targets))


@each
@pytest.mark.parametrize("empty", [False, True])
def test_losses_are_the_librarys(kind: type[QueryDetector], empty: bool) -> None:
    """With an image without objects, and without one; noisy copies of the labels drawn alike. The first layers of
    a random network turn the order of a sum into percents of their gradient."""
    detector, batch = tiny_detr.tiny(kind).train(), tiny_detr.batch(empty=empty, size=tiny_detr.size_for(kind))
    twin = copy.deepcopy(detector)
    theirs = tiny_detr.library_model(twin)
    torch.manual_seed(3)
    ours = losses(detector, batch)
    torch.manual_seed(3)
    wanted = theirs(detector.normalise(batch.images), labels=library_labels(batch))
    total = torch.stack(list(ours.values())).sum()
    torch.testing.assert_close(total, wanted.loss, rtol=1e-5, atol=1e-5)
    assert len(wanted.loss_dict) > len(ours)
    total.backward()
    wanted.loss.backward()
    for (name, p), (_, q) in zip(detector.network.named_parameters(), twin.network.named_parameters(), strict=True):
        assert (p.grad is not None) == p.requires_grad or q.grad is None, name
        if q.grad is not None:
            most = 0.05 if "backbone." in name else 1e-3
            assert p.grad is not None and bool((p.grad - q.grad).norm() <= most * q.grad.norm() + 1e-5), name


@each
def test_boxes_are_the_librarys(kind: type[QueryDetector]) -> None:
    import transformers

    size = tiny_detr.size_for(kind)
    detector, batch = tiny_detr.tiny(kind).eval(), tiny_detr.batch(size=size)
    theirs = tiny_detr.library_model(detector)
    original = (190, 250)
    with torch.inference_mode():
        prediction = detector(batch.images)
        wanted = theirs(detector.normalise(batch.images))
        found = detector.decode(
            prediction, [ImageSize(size, original)] * 3, score_threshold=0.0, max_detections=prediction.logits.shape[1]
        )
    torch.testing.assert_close(prediction.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction.boxes, wanted.pred_boxes, rtol=1e-5, atol=1e-5)
    processor = transformers.RTDetrImageProcessor()
    rows = processor.post_process_object_detection(wanted, threshold=0.0, target_sizes=[original] * 3)
    limits = torch.tensor([original[1], original[0], original[1], original[0]])
    for ours, row in zip(found, rows, strict=True):
        torch.testing.assert_close(ours.scores, row["scores"])
        assert torch.equal(ours.labels, row["labels"])
        torch.testing.assert_close(ours.boxes, row["boxes"].clamp(min=0).minimum(limits), rtol=1e-5, atol=1e-3)


@each
def test_a_step_is_that_of_a_plain_loop(kind: type[QueryDetector]) -> None:
    detector, batch = tiny_detr.tiny(kind).train(), tiny_detr.batch(size=tiny_detr.size_for(kind))
    twin = copy.deepcopy(detector)
    theirs, images = tiny_detr.library_model(twin), detector.normalise(batch.images)
    for model, loss in (
        (detector.network, lambda: torch.stack(list(losses(detector, batch).values())).sum()),
        (twin.network, lambda: theirs(images, labels=library_labels(batch)).loss),
    ):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        torch.manual_seed(5)
        loss().backward()
        optimizer.step()
    # the first step of Adam is the sign of the gradient: where that is nothing but rounding, so is the step
    for (name, p), (_, q) in zip(detector.network.named_parameters(), twin.network.named_parameters(), strict=True):
        same = (p - q).abs() <= 1e-6
        assert same.float().mean() > 0.98 or bool((q.grad.abs() < 1e-6)[~same].all()), name


@each
def test_losses_are_normalised_by_the_boxes_of_all_processes(
    kind: type[QueryDetector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one image each give the mean of one process with both; but for D-FINE's distillation of its last
    layer, whose normaliser is no sum. Where the library's loss sums over processes, it does so here."""
    detector = tiny_detr.tiny(kind, **({"dropout": 0.0} if kind.reduces else {"num_denoising": 0})).train()
    for module in detector.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    whole = tiny_detr.batch(empty=False)
    whole = tiny_detr.Batch(whole.images[:2], whole.targets[:2])
    together = losses(detector, whole)
    boxes = sum(int((~t.ignore).sum()) for t in whole.targets)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    if kind.reduces:
        monkeypatch.setattr("transformers.loss.loss_lw_detr._is_torch_distributed_initialized", lambda: True)
        of_groups = boxes * tiny_detr.GROUPS["group_detr"]
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op: x.fill_(of_groups))

    def of(index: int) -> dict[str, Tensor]:
        images, targets = whole.images[index : index + 1], whole.targets[index : index + 1]
        prediction = detector.predict_in_training(detector.features(images), targets)
        return detector.loss(prediction, detector.assign(prediction, targets, lambda x: torch.full_like(x, boxes)))

    parts = [of(0), of(1)]
    together.pop("loss_ddf", None)
    for name, value in together.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-4, atol=1e-5, msg=name)


@each
@pytest.mark.parametrize("ours", [sample_rows, sum_rows])
def test_sampling_by_rows_is_grid_sample(kind: type[QueryDetector], ours: Any) -> None:
    """With places outside of the maps, and gradients."""
    network = tiny_detr.tiny(kind).network
    module: Any = sys.modules[type(network).__module__]
    generator = torch.Generator().manual_seed(0)
    shapes, points = [(6, 8), (3, 4), (2, 2)], [2, 2, 2] if kind.reduces else [2, 3, 2]
    inputs = [
        torch.randn(2, 64, 4, 8, generator=generator),
        torch.rand(2, 9, 4, sum(points), 2, generator=generator) * 1.4 - 0.2,
        torch.rand(2, 9, 4, sum(points), generator=generator),
    ]

    def by_levels(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        places, weights = places.unflatten(3, (3, 2)), weights.unflatten(3, (3, 2))
        out: Tensor = module.MultiScaleDeformableAttention()(value, None, shapes, None, places, weights, 64)
        return out

    def one_list(function: Any) -> Any:
        return lambda value, places, weights: function(value, shapes, places, weights, points, "default")

    theirs = by_levels if kind.reduces else one_list(module.multi_scale_deformable_attention_v2)
    results = []
    for function in (theirs, one_list(ours)):
        value, places, weights = (x.clone().requires_grad_() for x in inputs)
        out = function(value, places, weights)
        out.square().sum().backward()
        results.append((out, value.grad, places.grad, weights.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each
def test_the_cpu_samples_by_sums_of_rows(kind: type[QueryDetector], monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and evaluation, and the library is as it was after it."""
    calls = []
    monkeypatch.setattr(sampling, "sum_rows", lambda *inputs: calls.append(1) or sum_rows(*inputs))
    detector = tiny_detr.tiny(kind)
    module: Any = sys.modules[type(detector.network).__module__]
    owner, name = (
        (module.MultiScaleDeformableAttention, "forward")
        if kind.reduces
        else (module, "multi_scale_deformable_attention_v2")
    )
    before = getattr(owner, name)
    calls.clear()
    losses(detector.train(), tiny_detr.batch())
    detector.eval()(tiny_detr.batch().images)
    assert len(calls) == 6 and getattr(owner, name) is before


@each
def test_it_is_saved_and_loaded(kind: type[QueryDetector], tmp_path: Path) -> None:
    model = Model.model_validate({"detector": kind.family, "options": tiny_detr.OPTIONS[kind]})
    detector = build_detector(model, tiny_detr.CLASSES, seed=0).eval()
    record = ModelRecord(model=model_of(detector), num_classes=tiny_detr.CLASSES)
    save_detector(tmp_path / "x.safetensors", detector, metadata=record)
    again, _ = load_detector(tmp_path / "x.safetensors")
    images = tiny_detr.batch().images
    with torch.inference_mode():
        assert torch.equal(again(images).boxes, detector(images).boxes)
    assert again.model == detector.model
    queries = {Capability.QUERIES, Capability.LOCATIONS} | (
        {Capability.QUERY_DISTRIBUTIONS} if kind is DFine else set()
    )
    assert detector.capabilities == {Capability.FEATURES, Capability.BOXES} | queries


@each
def test_it_starts_from_a_folder_with_other_classes(kind: type[QueryDetector], tmp_path: Path) -> None:
    detector = tiny_detr.tiny(kind)
    tiny_detr.library_model(detector).save_pretrained(tmp_path)
    same = kind.build(tiny_detr.CLASSES, size=None, options={}, init=str(tmp_path))
    for (name, p), (_, q) in zip(same.network.named_parameters(), detector.network.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert same.network.renewed == ()
    other = kind.build(3, size=None, options={}, init=str(tmp_path))
    assert other.network.renewed and all("class" in name or "score" in name for name in other.network.renewed)
    assert other(tiny_detr.batch().images).logits.shape[-1] == 3
    wrong = next(k for k in KINDS if k is not kind)
    with pytest.raises(UserError, match=f"is a {kind.family}, not a {wrong.family}"):
        wrong.build(3, size=None, options={}, init=str(tmp_path))
    for folder, said in (("nothing", "no such folder, and no name of the Hub"), ("config.json", "is a file")):
        with pytest.raises(UserError, match=said):
            kind.build(3, size=None, options={}, init=str(tmp_path / folder))
    if "decoder_layers" in tiny_detr.OPTIONS[kind]:
        with pytest.raises(UserError, match=r"with decoder_layers, weights of .* would be left out"):
            kind.build(tiny_detr.CLASSES, size=None, options={"decoder_layers": 2}, init=str(tmp_path))
    with pytest.raises(UserError, match=r"options\.num_querys: is no key of"):
        kind.build(3, size=None, options={"num_querys": 3}, init=str(tmp_path))


@each
@pytest.mark.parametrize("method", ["fgd", "pkd", "cwd", "mgd", "gi"])
@pytest.mark.parametrize("student_first", [True, False])
def test_feature_methods_work_across_kinds(kind: type[QueryDetector], method: str, student_first: bool) -> None:
    """A GFL teacher of a query student and the reverse, on the levels of equal stride, with UET around the method."""
    queries = tiny_detr.tiny(kind)
    dense = build_detector(Model(backbone="nano", neck_channels=32, head_depth=1), tiny_detr.CLASSES, seed=0)
    student, teacher = (queries, dense) if student_first else (dense, queries)
    settings = Methods.model_validate({method: {}, "uet": {"of": method}})
    if method == "gi" and queries.strides != dense.strides[: len(queries.strides)]:
        with pytest.raises(UserError, match=r"methods\.gi compares predictions location by location"):
            build_methods(settings, student, teacher)
        teacher = tiny_detr.tiny(kind)
        student = copy.deepcopy(teacher)
        torch.nn.init.normal_(student.get_parameter("network.class_embed.weight"))
    learner = Learner(student.train(), build_methods(settings, student, freeze(teacher)), teacher, None)
    terms = learner(tiny_detr.batch(), TrainingPosition(0, 10, 10))
    own = {name: value for name, value in terms.items() if name.startswith(method)}
    assert own and all(value.isfinite() and value > 0 for value in own.values())
    torch.stack(list(own.values())).sum().backward()
    assert all(bool(p.grad.any()) for p in student.parameters() if p.grad is not None and p.dim() == 4)


@pytest.mark.parametrize("kind", [DFine, RTDetrV2])
def test_locations_are_those_that_queries_begin_at(kind: type[QueryDetector]) -> None:
    """The boxes of the best-scored ones, in the image and in pixels."""
    detector, batch = tiny_detr.tiny(kind).eval(), tiny_detr.batch()
    with torch.no_grad():
        features = detector.features(batch.images)
        prediction = detector.predict(features)
        found = detector.at_locations(features, prediction)
    assert found.level_sizes == [tuple(x.shape[2:]) for x in features]
    best = found.scores().amax(-1).topk(30, dim=1).indices[..., None].expand(-1, -1, 4)
    shares = torch.cat([x.flatten(2) for x in found.box_deltas], 2).transpose(1, 2)
    torch.testing.assert_close(shares.gather(1, best), prediction.queries.boxes, rtol=1e-5, atol=1e-6)
    height, width = tiny_detr.SIZE
    x, y, w, h = (prediction.queries.boxes * torch.tensor([width, height, width, height])).unbind(-1)
    pixels = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1)
    torch.testing.assert_close(detector.decode_boxes(found).gather(1, best), pixels, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("kinds", "options", "said"),
    [
        (KINDS, {"num_queries": "ten"}, "num_queries"),
        (KINDS[:2], {"num_denoising": -1}, "options.num_denoising: a whole number from 0 on, got -1"),
        (KINDS, {"num_queries": 0}, "options.num_queries: a whole number from 1 on, got 0"),
        (KINDS, {"num_labels": 9}, "is what the detector says itself"),
        (KINDS, {"auxiliary_loss": False}, "must be True here"),
        (KINDS[:2], {"encoder_hidden_dim": 64}, "the layers do not fit together"),
        (KINDS[:2], {"feat_strides": [4, 8, 16]}, r"the maps have strides \[8, 16, 32\]"),
        (KINDS[:2], {"decoder_method": "discrete"}, "must be default here"),
        (KINDS[2:], {"group_detr": 0}, "options: "),
        (KINDS[3:], {"projector_scale_factors": []}, "say which maps there are"),
    ],
)
def test_options_that_do_not_fit_are_told(
    kinds: tuple[type[QueryDetector], ...], options: dict[str, Any], said: str
) -> None:
    for kind in kinds:
        _check_told(kind, options, said)


def _check_told(kind: type[QueryDetector], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        tiny_detr.tiny(kind, **options)
    assert "\n" not in str(error.value)


@each
def test_half_weights_begin_in_float32(kind: type[QueryDetector], tmp_path: Path) -> None:
    tiny_detr.library_model(tiny_detr.tiny(kind)).half().save_pretrained(tmp_path)
    detector = kind.build(tiny_detr.CLASSES, size=None, options={}, init=str(tmp_path))
    assert {p.dtype for p in detector.parameters()} == {torch.float32}


@each
def test_a_student_inherits_no_backbone(kind: type[QueryDetector]) -> None:
    keys = inherit(tiny_detr.tiny(kind), tiny_detr.tiny(kind))
    assert keys and not any("backbone" in key for key in keys if "backbone.projector" not in key)


@each
def test_pruning_and_methods_on_dense_predictions_are_refused(kind: type[QueryDetector]) -> None:
    queries = tiny_detr.tiny(kind)
    with pytest.raises(UserError, match=f"prune: {kind.__name__} cannot be pruned"):
        pruning_graph(queries)
    with pytest.raises(UserError, match=rf"methods\.bckd needs .* of the teacher, which {kind.family} cannot give"):
        build_methods(Methods.model_validate({"bckd": {}}), queries, freeze(tiny_detr.tiny(kind)))


@pytest.mark.parametrize("kind", [RfDetr, LwDetr])
def test_windows_are_rectangles_of_the_image(kind: type[LwDetr]) -> None:
    """Of one that is wider than high, and of one that the windows do not divide: this one as padded with the mean."""
    detector = tiny_detr.tiny(kind).eval()
    rows = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    windows = _windowed(rows, 2)
    assert torch.equal(windows[1], rows[0, :, :2, 3:].flatten(1).T)
    assert torch.equal(windows[4 + 2], rows[1, :, 2:, :3].flatten(1).T)
    assert torch.equal(_joined(windows, 2, 4, 6), rows)
    size = (48, 80) if kind is LwDetr else (112, 112)
    images = tiny_detr.batch(size=size).images
    with torch.inference_mode():
        found = detector(images)
        height, width = found.canvas
        assert (height, width) == tuple(-(-side // 32) * 32 for side in size)
        x = torch.nn.functional.pad(detector.normalise(images), (0, width - size[1], 0, height - size[0]))
        wanted = detector.network(x)
    torch.testing.assert_close(found.boxes, wanted.pred_boxes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [RfDetr, LwDetr])
def test_a_decoder_runs_on_given_queries_as_one_group(kind: type[LwDetr]) -> None:
    """On its own ones it says the same; also in training, where it has several groups of its own."""
    detector, images = tiny_detr.tiny(kind, dropout=0.0).eval(), tiny_detr.batch(empty=False).images
    with torch.no_grad():
        maps = detector.features(images)
        wanted = detector.predict(maps)
        for training in (False, True):
            found = detector.train(training).predict_at(maps, wanted.queries)
            assert len(found) == detector.network.config.decoder_layers
            torch.testing.assert_close(found[-1].logits, wanted.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[-1].boxes, wanted.boxes, rtol=1e-5, atol=1e-5)
    assert detector.network.config.group_detr == 3


def test_maps_with_fewer_locations_than_queries_train() -> None:
    detector, batch = tiny_detr.tiny(RfDetr).train(), tiny_detr.batch(size=(64, 64))
    for target in batch.targets:
        target.boxes /= 2
    prediction = detector.predict_in_training(detector.features(batch.images), batch.targets)
    assert prediction.boxes.shape[1] == 16 < detector.network.config.num_queries
    terms = detector.loss(prediction, detector.assign(prediction, batch.targets))
    assert set(terms) == {"loss_ce", "loss_bbox", "loss_giou"} and all(x.isfinite() for x in terms.values())


@pytest.mark.parametrize("kind", KINDS[:2])
def test_tiny_has_the_gflops_of_a_tiny_gfl(kind: type[QueryDetector]) -> None:
    """So a table of both compares equals; a teacher of twice the width gives what a student can inherit."""
    gfl = Model(backbone="nano", weights="none", neck_channels=64, head_depth=1)
    student, wide, dense = (
        build_detector(model, 8, seed=0)
        for model in (Model(detector=kind.family, size="tiny"), Model(detector=kind.family, size="tiny2x"), gfl)
    )
    gflops = [model_size(x, (96, 96))["gflops"] for x in (student, wide, dense)]
    assert 0.9 * gflops[2] < gflops[0] <= gflops[2] < gflops[1]
    assert any("decoder" in key for key in inherit(student, wide))
    assert FAMILY_FACTS[kind.family].sizes == tuple(kind.sizes)
