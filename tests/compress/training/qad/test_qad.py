"""Quantization-aware distillation: what the fake-quantized student computes, trains and leaves in the file."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress import cli
from compress.config.methods import Methods
from compress.config.recipe import Recipe
from compress.data.loader import train_loader
from compress.data.views import Views
from compress.detectors.backbones import build_backbone
from compress.detectors.base import freeze
from compress.detectors.checkpoints import load_detector, load_teacher_checkpoint
from compress.detectors.gfl import GFL
from compress.export.deployable import Deployable
from compress.manifest import QAD, RunFolder
from compress.run import pipeline, plans
from compress.run.data import open_data, splits
from compress.run.trainings import Distillation
from compress.training.qad.export import load_grids
from compress.training.qad.fake_quant import (
    FakeQuantized,
    fold_batch_norms,
    round_activation,
    round_weight,
    weight_scales,
)
from compress.training.qad.train import train_quantized
from deploy.core.card import card_from_file
from deploy.core.errors import UserError
from deploy.graph.precision import precisions
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer, dense_outputs, output_error
from deploy.quantize.grids import Grids
from deploy.quantize.qdq import check_format
from tests.helpers import tiny_recipe, tiny_vision
from tests.helpers.teacher_passes import Passes
from tests.helpers.training_runs import assert_same, fabric

pytestmark = pytest.mark.usefixtures("few_rounds")

SETTINGS = (
    "deploy.int8={images: 6, qad: {steps: 6, lr: 1e-3}}",
    "methods={bckd: {}, pkd: {}}",
    "teacher.model.neck_channels=64",  # PKD has adapters
)


def recipe_in(folder: Path, *more: str) -> Recipe:
    return tiny_recipe.recipe(folder, *SETTINGS, *more)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(recipe_in(tmp_path_factory.mktemp("qad")))


@pytest.fixture(scope="module")
def student(run_dir: Path) -> GFL:
    return load_detector(run_dir / "student.safetensors")[0]


@pytest.fixture(scope="module")
def quantizers(run_dir: Path) -> dict[str, Quantizer]:
    recipe = recipe_in(run_dir.parents[1])
    train, _ = splits(recipe.data, recipe.runs)
    images = choose_images(sorted(train.images.glob("*"))[:6], 6)
    targets: tuple[Any, ...] = ("cpu", "tensorrt")
    return {target: Quantizer(run_dir / "student.onnx", images, target) for target in targets}


def dense_of(detector: GFL, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        scores, boxes = Deployable.from_card(detector, quantizer.card).dense(torch.from_numpy(quantizer.canvases))
    return scores.numpy(), boxes.numpy()


def fake_quantized(student: GFL, grids: Grids) -> FakeQuantized:
    detector = copy.deepcopy(student)
    fold_batch_norms(detector)
    return FakeQuantized(detector, grids).eval()


def moved(grids: Grids, seed: int = 0) -> Grids:
    """Scales that no calibration would give: ranges cut by up to two thirds."""
    factors = np.random.default_rng(seed).uniform(0.3, 0.9, len(grids.activations)).tolist()
    pairs = zip(grids.activations, factors, strict=True)
    activations = [g.model_copy(update={"scale": float(np.float32(g.scale * factor))}) for g, factor in pairs]
    return grids.model_copy(update={"activations": tuple(activations)})


# ---------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(("kind", "zero"), [(TensorProto.INT8, 0), (TensorProto.UINT8, 0), (TensorProto.UINT8, 131)])
def test_activations_are_rounded_as_onnx_rounds_them(kind: int, zero: int) -> None:
    low, high = (-128, 127) if kind == TensorProto.INT8 else (0, 255)
    scale = np.float32(0.0371)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 3, 4000), scale * np.arange(-300, 300), scale * (np.arange(-300, 300) + 0.5)])
    x = x.astype(np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "qdq", [value("x", TensorProto.FLOAT, [None])], [value("y", TensorProto.FLOAT, [None])],
        [numpy_helper.from_array(np.array(scale), "s"), helper.make_tensor("z", kind, [], [zero])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    found = round_activation(torch.from_numpy(x), torch.tensor(scale), zero, low, high)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_gradients_of_lsq_against_the_formula() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([-9.0, -0.9, 0.2, 1.6, 70.0], requires_grad=True)
    round_activation(x, scale, 3, 0, 100).sum().backward()  # levels -3..97
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    inside = [round(v / 0.5) - v / 0.5 for v in (-0.9, 0.2, 1.6)]  # equation 3
    assert scale.grad is not None and scale.grad.item() == pytest.approx(-3 + sum(inside) + 97)


def test_weights_are_rounded_by_channel_and_pass_their_gradient() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    weight.requires_grad_()
    rounded = round_weight(weight, 127)
    largest = weight.detach().abs().flatten(1).amax(1)
    assert weight_scales(weight, 127).tolist() == [pytest.approx(x / 127) if x else 1 for x in largest.tolist()]
    steps = rounded.detach() / weight_scales(weight, 127).view(-1, 1, 1, 1)
    assert (steps - steps.round()).abs().max() < 1e-4 and steps.abs().max() == pytest.approx(127)
    rounded.sum().backward()
    assert weight.grad is not None and bool((weight.grad == 1).all())


# ------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize("name", ["nano", "resnet18", "mobilenet_v3_small"])
def test_folding_changes_nothing_that_is_computed(name: str) -> None:
    torch.manual_seed(0)
    detector = GFL(3, build_backbone(name, weights="none", frozen_stages=1), neck_channels=32, head_depth=1)
    norms = [m for m in detector.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        for tensor, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.3, 3), (norm.weight, -1.5, 1.5)):
            assert tensor is not None
            nn.init.uniform_(tensor, low, high)
        nn.init.uniform_(norm.bias, -1, 1)
    folded = copy.deepcopy(detector)
    fold_batch_norms(folded)
    assert {k: v.shape for k, v in folded.state_dict().items()} == {
        k: v.shape for k, v in detector.state_dict().items()
    }
    for norm in (m for m in folded.modules() if isinstance(m, _BatchNorm)):
        assert norm.running_var is not None and not norm.weight.requires_grad
        assert ((norm.running_var + norm.eps).rsqrt() == 1).all() and (norm.weight == 1).all()
        assert norm.bias.requires_grad
    assert folded.backbone.norm_eval and folded.backbone.frozen_stages == -1
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    detector.double().eval()
    folded.double().train()  # its norms stay in eval mode
    with torch.no_grad():
        for ours, theirs in zip(folded.features(images), detector.features(images), strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


# ------------------------------------------------------------------------------------- network against file


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("keep_float", [None, ()], ids=["outputs float", "all"])
def test_the_network_computes_what_the_file_computes(
    student: GFL, quantizers: dict[str, Quantizer], target: str, keep_float: Any
) -> None:
    quantizer = quantizers[target]
    grids = moved(quantizer.grids(keep_float))
    file = dense_outputs(quantizer.graph(trained=grids), quantizer.canvases)
    network = fake_quantized(student, grids)
    own = output_error(file, dense_of(network, quantizer))
    exact = output_error(file, dense_of(student, quantizer))
    calibrated = output_error(file, dense_of(fake_quantized(student, quantizer.grids(keep_float)), quantizer))
    # 8 levels of rounding edges are left; other scales or no rounding are much farther away.
    assert max(own) < 0.01
    assert sum(own) < 0.35 * sum(exact) and sum(own) < 0.35 * sum(calibrated)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_file_has_the_trained_scales_bit_for_bit(
    student: GFL, quantizers: dict[str, Quantizer], target: str
) -> None:
    quantizer = quantizers[target]
    network = fake_quantized(student, quantizer.grids())
    with torch.no_grad():
        network.theta.uniform_(-0.02, 0.02)
    grids = Grids.model_validate_json(network.grids().model_dump_json())
    assert [grid.scale for grid in grids.activations] == network.scales().tolist()
    model = quantizer.graph(trained=grids)
    check_format(model, quantizer.target)
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    found = [
        (float(values[node.input[1]]), int(values[node.input[2]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    ]
    assert sorted(found) == sorted((grid.scale, grid.zero_point) for grid in grids.activations)
    weights = {name: m.weight for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    layers = [layer for layer in quantizer.structure.layers if layer.name not in grids.float_layers]
    assert len(layers) > 10
    for layer in layers:
        # The exporter folds the norms of this file by itself, in float32; the run's own file is compared exactly below.
        scale = weight_scales(weights[layer.name], grids.weight_limit).numpy()
        np.testing.assert_allclose(values[f"{layer.weight}_scale"], scale, rtol=1e-6)


def test_seven_bits(student: GFL, quantizers: dict[str, Quantizer]) -> None:
    quantizer = quantizers["cpu"]
    grids = quantizer.grids().model_copy(update={"weight_bits": 7})
    model = quantizer.graph(trained=grids)
    integers = [numpy_helper.to_array(x) for x in model.graph.initializer if x.name.endswith("weight_quantized")]
    assert integers and max(np.abs(value.astype(int)).max() for value in integers) == 64
    error = output_error(dense_outputs(model, quantizer.canvases), dense_of(fake_quantized(student, grids), quantizer))
    assert max(error) < 0.01


def test_grids_of_another_detector_are_refused(student: GFL, quantizers: dict[str, Quantizer]) -> None:
    grids = quantizers["cpu"].grids()
    fewer = grids.model_copy(update={"activations": grids.activations[:-1]})
    with pytest.raises(UserError, match=r"student\.onnx: the trained grids are for .* activations of a detector"):
        quantizers["cpu"].graph(trained=fewer)
    other = GFL(3, build_backbone("resnet18", weights="none"), neck_channels=32, head_depth=0)
    with pytest.raises(UserError, match=r"name a layer 'backbone\.stem\.0' that the detector does not have"):
        FakeQuantized(other, grids)


def test_an_input_that_was_not_rounded_is_noticed(student: GFL, quantizers: dict[str, Quantizer]) -> None:
    network = fake_quantized(student, quantizers["tensorrt"].grids())
    network.backbone.get_submodule("stem").register_forward_hook(lambda module, args, output: output * 1.0)
    with pytest.raises(RuntimeError, match="its input was not rounded for it"):
        network.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_predict_rounds_foreign_maps_once(student: GFL, quantizers: dict[str, Quantizer]) -> None:
    network = fake_quantized(student, quantizers["cpu"].grids())
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = network.features(images)
        expected, found = network.predict(features), network.predict([x.clone() for x in features])
    for a, b in zip(expected.logits + expected.distribution, found.logits + found.distribution, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_gradients_reach_every_weight_and_scale(student: GFL, quantizers: dict[str, Quantizer], target: str) -> None:
    network = fake_quantized(student, quantizers[target].grids(()))
    prediction = network(torch.from_numpy(quantizers[target].canvases))
    sum(x.square().sum() for x in prediction.logits + prediction.distribution).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert network.theta.grad is not None
    assert (network.theta.grad != 0).sum() >= len(network.theta) - 2  # one may have nothing to clip


# --------------------------------------------------------------------------------------------------- the run


def test_a_run_trains_exports_and_reports(run_dir: Path) -> None:
    for name in ("start.json", "json", "safetensors", "onnx"):
        assert (run_dir / f"student.qad.{name}").is_file()
    card = card_from_file(run_dir / "student.qad.onnx")
    assert card.quantization is not None and card.quantization.method == "trained"
    assert card.quantization.target == "cpu" and card.quantization.float_layers == ["head.gfl_cls", "head.gfl_reg"]
    assert "int8" in precisions(onnx.load(str(run_dir / "student.qad.onnx")))["backbone"]
    start, trained = (load_grids(run_dir / f"student.qad.{name}") for name in ("start.json", "json"))
    pairs = list(zip(start.activations, trained.activations, strict=True))
    assert all(a.place == b.place and a.zero_point == b.zero_point for a, b in pairs)
    assert sum(a.scale != b.scale for a, b in pairs) > len(pairs) / 2
    model = onnx.load(str(run_dir / "student.qad.onnx"))
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    scales = {float(values[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert scales == {grid.scale for grid in trained.activations}

    detector, _ = load_detector(run_dir / "student.qad.safetensors")
    limit, layers = trained.weight_limit, 0
    for name, convolution in detector.named_modules():
        if isinstance(convolution, nn.Conv2d) and name not in trained.float_layers:
            key = next(key for key in values if key.endswith(f"{name}.weight_scale"))
            scale = weight_scales(convolution.weight, limit)
            np.testing.assert_array_equal(values[key], scale.numpy())
            integers = (convolution.weight.detach() / scale.view(-1, 1, 1, 1)).round()
            np.testing.assert_array_equal(values[key.removesuffix("scale") + "quantized"], integers.numpy())
            layers += 1
    assert layers > 10

    report = json.loads((run_dir / "report.json").read_text())
    row = next(row for row in report["artifacts"] if row["file"] == "student.qad.onnx")
    assert row["precision"] == "int8+fp32" and row["map"] is not None and row["latency_ms"]["p50"] > 0
    stages = json.loads((run_dir / "manifest.json").read_text())["stages"]
    assert row["training_drop"] == stages["qad"]["result"]["metrics"]["map"] - row["map"], (
        "not against the float student"
    )
    assert {"qad calibration", "qad", "export qad"} <= stages.keys()
    columns = (run_dir / "student.qad" / "metrics.csv").read_text()
    assert "bckd_cls" in columns and "pkd" in columns


def export_on_the_command_line(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *map(str, words)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_line_exports_the_trained_scales(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = run_dir / "student.qad.safetensors", tmp_path / "mine.onnx"
    assert export_on_the_command_line(checkpoint, "--precision", "int8", "--out", out) == 0
    assert f"layers in int8 on the trained scales of {run_dir / 'student.qad.json'}" in capsys.readouterr().out
    made, of_run = (onnx.load(str(path)) for path in (tmp_path / "mine.int8.onnx", run_dir / "student.qad.onnx"))
    assert [item.SerializeToString() for item in made.graph.initializer] == [
        item.SerializeToString() for item in of_run.graph.initializer
    ]
    card = card_from_file(tmp_path / "mine.int8.onnx")
    assert card.quantization is not None and card.quantization.method == "trained"
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--precision int8 --target tensorrt", "--target: "),
        ("--precision int8 --trt", "--trt: "),
        ("--precision int8 --max-map-drop 1", "--max-map-drop: scales and float layers are those that were trained"),
        ("--precision int8 --calibration-method entropy", "--calibration-method: scales and float layers"),
        ("--precision int8,mixed", "was trained for an int8 file; a mixed one is made of student.safetensors"),
        ("--precision fp32", "student.qad.onnx is the int8 file of"),
    ],
)
def test_what_was_trained_is_settled(run_dir: Path, words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "student.qad.onnx").read_bytes()
    assert export_on_the_command_line(run_dir / "student.qad.safetensors", *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert (run_dir / "student.qad.onnx").read_bytes() == before


def test_the_trained_weights_are_an_ordinary_checkpoint(run_dir: Path) -> None:
    detector, record = load_detector(run_dir / "student.qad.safetensors")
    before, whole = load_detector(run_dir / "student.safetensors")
    assert record.resize_short_long == whole.resize_short_long is not None
    fold_batch_norms(before)
    weight = detector.backbone.state_dict()["stem.0.weight"]
    measured = RunFolder(run_dir).result(QAD)["metrics"]
    assert record.val_map == measured["map"] and weight.shape == before.backbone.state_dict()["stem.0.weight"].shape
    point = None if record.operating_point is None else record.operating_point.model_dump(mode="json")
    assert point == measured.get("operating_point")
    difference = (weight - before.backbone.state_dict()["stem.0.weight"]).abs().max()
    assert 0 < difference < 0.05  # some steps of 1e-3 away from where the student was


def test_resume_is_exact(run_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(run_dir.parents[1])
    f = fabric()
    data = open_data(plans.data_plan(recipe), f)
    teacher = freeze(load_teacher_checkpoint(str(run_dir / "teacher.safetensors"))[0])
    start = load_grids(run_dir / "student.qad.start.json")

    def train(folder: Path, *, resume: bool = False, max_steps: int | None = None) -> None:
        plan = replace(plans.qad_plan(recipe, data), folder=RunFolder(folder))
        train_quantized(
            f, plan.training(f, data, start, identity={}), teacher=teacher, resume=resume, max_steps=max_steps
        )

    train(tmp_path / "whole")
    train(tmp_path / "parts", max_steps=2)
    assert not (tmp_path / "parts" / "student.qad.safetensors").exists()
    torch.manual_seed(123)
    train(tmp_path / "parts", resume=True)
    last = [
        torch.load(tmp_path / name / "student.qad" / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "parts")
    ]
    assert_same(*last)
    grids = [load_grids(tmp_path / name / "student.qad.json") for name in ("whole", "parts")]
    assert grids[0] == grids[1] == load_grids(run_dir / "student.qad.json")


def test_it_shares_views_and_cache_with_the_student(run_dir: Path, tmp_path: Path) -> None:
    """What the teacher says in the first steps is kept under keys that the student's training has, too."""
    recipe = recipe_in(run_dir.parents[1], "train.views=1", f"teacher.cache={tmp_path / 'cache'}")
    f = fabric()
    data = open_data(plans.data_plan(recipe), f)
    teacher = freeze(load_teacher_checkpoint(str(run_dir / "teacher.safetensors"))[0])
    plan = replace(plans.qad_plan(recipe, data), folder=RunFolder(tmp_path))
    training = plan.training(f, data, load_grids(run_dir / "student.qad.start.json"), identity={})
    with Passes(teacher) as passes:
        train_quantized(f, training, teacher=teacher, max_steps=2)
    assert passes.features == passes.head == 8
    loader = train_loader(data.train, batch_size=4, seed=recipe.seed, workers=0, views=Views(1, recipe.seed), keys=True)
    of_student = {target.key for batch in islice(loader, len(loader)) for target in batch.targets}
    kept = {path.stem for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(kept) == 8 and kept < of_student


def test_the_float_control_trains_without_grids(run_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(run_dir.parents[1])
    f = fabric()
    data = open_data(plans.data_plan(recipe), f)
    plan = replace(plans.qad_plan(recipe, data), folder=RunFolder(tmp_path), distillation=Distillation())
    result = train_quantized(f, plan.training(f, data, None, identity={}, name="control"), teacher=None)
    assert result["steps"] == 6 and not (tmp_path / "control.json").exists()
    load_detector(tmp_path / "control.safetensors")


def test_a_vision_model_teaches_on_grids_without_a_teacher(run_dir: Path, tmp_path: Path) -> None:
    methods = Methods.model_validate({"vfm": {"model": str(tiny_vision.saved(tmp_path / "vision"))}})
    recipe, f = recipe_in(run_dir.parents[1]), fabric()
    data = open_data(plans.data_plan(recipe), f)
    plan = replace(
        plans.qad_plan(recipe, data),
        folder=RunFolder(tmp_path),
        adapters=tmp_path / "none",
        distillation=Distillation(methods),
    )
    start = load_grids(run_dir / "student.qad.start.json")
    train_quantized(f, plan.training(f, data, start, identity={}), teacher=None, max_steps=1)
    (first, *_) = csv.DictReader((plan.folder.training("student.qad").metrics).open())
    assert float(first["vfm"]) > 0 and float(first["grad_vfm"]) > 0


def test_damaged_grids_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_grids(tmp_path / "student.qad.json")
    (tmp_path / "student.qad.json").write_text('{"target": "cpu"}')
    with pytest.raises(UserError, match="not the grids of a run"):
        load_grids(tmp_path / "student.qad.json")


def test_trained_grids_for_tensorrt_parse_and_build(quantizers: dict[str, Quantizer], tmp_path: Path) -> None:
    from tests.helpers.tensorrt_build import build

    quantizer = quantizers["tensorrt"]
    path = tmp_path / "student.qad.onnx"
    report = quantizer.save(path, trained=moved(quantizer.grids()))
    assert build(path).quantized > report.layers
