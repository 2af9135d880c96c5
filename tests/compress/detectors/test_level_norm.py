"""BatchNorm in the head: folding, padding, pruning, methods from and to GroupNorm, its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from compress.config.deploy import Deploy
from compress.config.methods import Methods
from compress.config.model import Model
from compress.data.batch import pad_images
from compress.detectors.base import freeze
from compress.detectors.build import inherit, model_of
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.detectors.level_norm import LevelNorm, PerLevel
from compress.distill.build import build_methods
from compress.distill.method import Outputs
from compress.export.folded import folded
from compress.export.onnx import export_checkpoint
from compress.run import pipeline
from compress.training.qad.export import _dense
from compress.training.qad.fake_quant import FakeQuantized, fold_batch_norms, load_quantizable
from deploy.core.card import OperatingPoint, card_from_file
from deploy.graph.structure import structure_of
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer, dense_outputs, output_error
from tests.helpers import tiny_recipe
from tests.helpers.pruned import SIZE, batch, detector, masked, outputs, pictures, pruned

FAMILIES = ("gfl", "fcos")


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, of the largest value of its map."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_gives_one_convolution_a_level(family: str) -> None:
    whole = detector(family, head_norm="batch", head_depth=2)
    small = folded(whole)
    assert not any(isinstance(module, LevelNorm) for module in small.modules())
    layers = [module for module in small.modules() if isinstance(module, PerLevel)]
    assert len(layers) == 4 and all(len(layer) == 5 for layer in layers)
    assert len({float(each.weight[0, 0, 0, 0].detach()) for each in layers[0]}) == 5, (
        "each level has factors of its own"
    )
    assert off(outputs(small, pictures(2, size=96)), outputs(whole, pictures(2, size=96))) < 1e-4
    assert sum(isinstance(module, LevelNorm) for module in whole.modules()) == 4, "the detector itself is left alone"
    assert folded(detector(family)) is not small and not any(
        isinstance(m, PerLevel) for m in detector(family).modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_moves_detections_with_group_norm_alone(family: str) -> None:
    """A picture on a canvas whose border is farther away than any of its locations sees, and on a larger one."""

    @torch.no_grad()
    def found(norm: str, side: int) -> list[Tensor]:
        """Scores and boxes at the locations of the picture, those of a level beside each other."""
        model = detector(family, head_norm=norm)
        prediction = model(pad_images([pictures()[0]], (side, side)))
        both = torch.cat((model.decode_boxes(prediction), prediction.scores()), 2)
        levels = both.split(prediction.counts, 1)
        sizes, strides = prediction.level_sizes, prediction.strides
        maps = [x.unflatten(1, size) for x, size in zip(levels, sizes, strict=True)]
        return [x[:, : max(1, SIZE // s), : max(1, SIZE // s)] for x, s in zip(maps, strides, strict=True)]

    assert off(found("batch", 640), found("batch", 512)) < 1e-5
    assert off(found("group", 640), found("group", 512)) > 1e-3


def test_a_map_of_one_location_is_normalised_by_the_running_statistics() -> None:
    norm = LevelNorm(4, levels=2)
    x = torch.arange(4.0).view(1, 4, 1, 1)
    assert torch.allclose(norm.train()(x, 1), x, rtol=1e-4)
    assert torch.equal(norm[1].running_mean, torch.zeros(4)), "one value moves no statistics"
    both = norm(torch.cat((x, x + 2)), 1)
    assert torch.allclose(both[0] + both[1], torch.zeros(4, 1, 1), atol=1e-5) and norm[1].running_mean.abs().min() > 0
    assert torch.equal(norm[0].running_mean, torch.zeros(4)), "levels have statistics of their own"
    norm.frozen = True
    assert norm.train().training and not any(each.training for each in norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_inherits_the_factors_of_a_group_norm(family: str) -> None:
    student, teacher = detector(family, head_norm="batch"), detector(family)
    keys = inherit(student, teacher)
    norms = [module for module in student.modules() if isinstance(module, LevelNorm)]
    assert sum(".bn." in key or ".conv.1." in key for key in keys) == 2 * 2 * 5
    assert all(any(torch.equal(each.weight, p) for p in teacher.head.parameters()) for norm in norms for each in norm)
    assert inherit(detector(family), student), "the convolutions go the other way, too"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_head_loses_single_channels_and_comes_back_from_its_file(family: str, tmp_path: Path) -> None:
    whole = detector(family, head_norm="batch")
    smaller = pruned(whole)
    assert off(outputs(smaller, pictures(2)), outputs(masked(whole, smaller), pictures(2))) < 1e-4
    norm = next(module for module in smaller.modules() if isinstance(module, LevelNorm))
    assert len({each.num_features for each in norm}) == 1 and norm[0].num_features < 32
    record = ModelRecord(model=model_of(smaller), num_classes=3)
    assert json.loads(record.to_json())["schema_version"] == 4
    save_detector(tmp_path / "half.safetensors", smaller, metadata=record)
    loaded, again = load_detector(tmp_path / "half.safetensors")
    assert again == record and again.model.head_norm == "batch" and again.model.widths
    assert off(outputs(loaded, pictures(2)), outputs(smaller, pictures(2))) == 0
    data = batch()
    loaded.train()
    prediction = loaded(data.images)
    torch.stack(list(loaded.loss(prediction, loaded.assign(prediction, data.targets)).values())).sum().backward()
    assert all(each.weight.grad is not None for each in next(m for m in loaded.modules() if isinstance(m, LevelNorm)))


def test_other_families_have_none() -> None:
    with pytest.raises(ValueError, match="retinanet has no head with BatchNorm; leave it out"):
        Model(detector="retinanet", backbone="nano", head_norm="batch")
    assert Model(detector="retinanet", backbone="nano", head_norm="group").head_norm == "group"
    assert "head_norm" not in Model(backbone="nano").model_dump(), "as version 0.1 wrote it"


METHODS = ("bckd", "fgd", "pkd", "cwd", "mgd", "gi", "ld", "dkd", "tid", "crosskd")


@pytest.mark.parametrize("norms", [("batch", "group"), ("group", "batch")], ids=["student", "teacher"])
def test_every_method_teaches_from_one_norm_to_the_other(norms: tuple[str, str]) -> None:
    student, teacher = (detector(head_norm=norm, head_depth=2) for norm in norms)
    methods = {name: {} for name in METHODS} | {"uet": {"of": ("fgd", "bckd")}}
    built = build_methods(Methods.model_validate(methods), student.train(), freeze(teacher))
    data, seen = batch(), []
    for model in (student, teacher):
        features = model.features(data.images)
        prediction = model.predict(features)
        targets = model.assign(prediction, data.targets) if model is student else None
        seen.append(Outputs(features, prediction, model, targets))
    found = {key: value for method in built.values() for key, value in method.method(*seen, data).items()}
    assert len(found) >= len(METHODS) and all(value.isfinite() for value in found.values())
    assert found["crosskd_cls"] > 0 and found["crosskd_reg"] > 0
    torch.stack(list(found.values())).sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None or ".bn." not in name
        assert parameter.grad is None or not name.endswith("conv.weight") or parameter.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------- its files

POINT = OperatingPoint(score=0.27, f1=0.5, precision=0.6, recall=3 / 7, class_scores=[0.25, None, 1.0], images=9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    student = detector(head_norm="batch")
    with torch.no_grad():
        student.head.gfl_cls.weight.mul_(0.1)  # no two scores are 1
    path = tmp_path_factory.mktemp("files") / "student.safetensors"
    names = ("a", "b", "c")
    record = ModelRecord(
        model=model_of(student), num_classes=3, class_names=names, category_ids=(1, 2, 3), operating_point=POINT
    )
    save_detector(path, student, metadata=record)
    return path


@pytest.fixture(scope="module")
def quantizer(checkpoint: Path, few_rounds: None) -> Quantizer:
    """Of the float file, which is there now."""
    images = []
    for number in range(3):
        images.append(checkpoint.with_name(f"{number}.png"))
        Image.fromarray(pictures(seed=number)[0].permute(1, 2, 0).numpy()).save(images[-1])
    file = checkpoint.with_name("student.onnx")
    export_checkpoint(checkpoint, file, Deploy(max_batch=2), input_size=(SIZE, SIZE), images=images)
    return Quantizer(file, choose_images(images, 3), "cpu")


def test_a_file_has_no_norm_and_a_layer_for_each_level(quantizer: Quantizer) -> None:
    model = quantizer.graph()
    assert not {"BatchNormalization", "InstanceNormalization"} & {node.op_type for node in model.graph.node}
    names = sorted(layer.name for layer in structure_of(model.graph).layers)
    assert [name for name in names if "cls_convs" in name] == [f"head.cls_convs.0.conv.{level}" for level in range(5)]


def test_the_operating_point_is_on_the_card_of_every_file(quantizer: Quantizer, tmp_path: Path) -> None:
    assert quantizer.card.operating_point == POINT and quantizer.card.shown_score == 0.27
    card = card_from_file(quantizer.save(tmp_path / "student.int8.onnx").path)
    assert card.operating_point == POINT and card.quantization is not None


@pytest.mark.parametrize("keep_float", [None, ()], ids=["outputs float", "all"])
def test_a_network_on_grids_computes_what_its_file_computes(
    checkpoint: Path, quantizer: Quantizer, keep_float: Any
) -> None:
    """Its weights are rounded before the factors of the levels, those of the file behind them."""
    student, _ = load_quantizable(checkpoint)
    grids = quantizer.grids(keep_float)
    halves = [grid.model_copy(update={"scale": grid.scale / 2}) for grid in grids.activations]  # ranges that cut much
    grids = grids.model_copy(update={"activations": tuple(halves)})
    levels = {call[0] for grid in grids.activations for call in grid.taken_by if call[0].startswith("head.cls_convs")}
    assert levels == {f"head.cls_convs.0.conv.{level}" for level in range(5)}
    fold_batch_norms(student)
    network = FakeQuantized(student, grids).eval()
    file = dense_outputs(quantizer.graph(trained=grids), quantizer.canvases)
    own, exact = (output_error(file, _dense(model, quantizer.card, quantizer.canvases)) for model in (network, student))
    assert max(own) < 0.05 and sum(own) < 0.35 * sum(exact)
    network.train()
    assert not any(each.training for m in network.modules() if isinstance(m, LevelNorm) for each in m)


@pytest.mark.exhaustive
def test_a_whole_run_learns_from_a_group_norm(tmp_path: Path, few_rounds: None) -> None:
    """By every method, with a moving average, to an int8 file that was trained on its grids."""
    settings = (
        "student.head_norm=batch", "student.head_depth=1", "teacher.inherit=true", "baseline=false", "train.steps=4",
        "methods={" + ", ".join(f"{name}: {{}}" for name in METHODS) + ", uet: {of: [fgd, bckd]}}",
        "deploy.precisions=[fp32, int8]", "deploy.int8={images: 6, qad: {steps: 4, lr: 1e-3}}",
    )  # fmt: skip
    run_dir = pipeline.run(tiny_recipe.recipe(tmp_path, *settings))
    student, record = load_detector(run_dir / "student.safetensors")
    assert record.model.head_norm == "batch" and (run_dir / "student.qad.onnx").is_file()
    norms = [module for module in student.modules() if isinstance(module, LevelNorm)]
    assert len(norms) == 2 and all(each.running_mean.abs().sum() > 0 for norm in norms for each in norm)
