"""Students of torchvision's families from recipe to file, teachers of other families, and refusals before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import cli
from compress.config.methods import Methods
from compress.config.model import Model
from compress.data.batch import Batch, Target
from compress.detectors.base import DensePrediction, Detector
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import load_detector
from compress.distill.bckd import BCKD
from compress.distill.build import build_methods
from compress.distill.level_matching import describe, match_levels
from compress.distill.method import Outputs
from compress.run import pipeline, plans
from compress.run.data import open_data
from compress.run.trainings import train
from compress.training.distributed import launch
from deploy.core.errors import UserError
from kernels.ops.iou_loss import giou_loss
from tests.helpers import tiny_recipe
from tests.helpers.methods import build

pytestmark = pytest.mark.usefixtures("few_rounds")

K = 3
SMALL = {"retinanet": {"anchor_scale": 2.0}, "faster_rcnn": {"anchor_scale": 4.0, "head_depth": 0, "roi_samples": 16}}


def model(family: str, seed: int = 0, **settings: Any) -> Detector:
    shape = {"backbone": "nano", "neck_channels": 32, "head_depth": 1} | SMALL.get(family, {}) | settings
    return build_detector(Model.model_validate({"detector": family, **shape}), K, seed)


def batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 10, 90, 60]])
    none = torch.zeros(2, dtype=torch.bool)
    return Batch(images, [Target(boxes, torch.tensor([0, 2]), none, None, i, (64, 96), (64, 96)) for i in range(2)])


def outputs(detector: Detector, data: Batch, *, teacher: bool = False) -> Outputs:
    if teacher:
        detector.requires_grad_(False).eval()
    features = detector.features(data.images)
    prediction = detector.predict(features)
    targets = None if teacher else detector.assign(prediction, data.targets)
    return Outputs(features, prediction, detector, targets)


def terms(methods: str | dict[str, Any], student: Detector, teacher: Detector) -> dict[str, Tensor]:
    built = build_methods(Methods.model_validate(methods), student, teacher)
    data = batch()
    pair = outputs(student, data), outputs(teacher, data, teacher=True)
    return {key: value for method in built.values() for key, value in method.method(*pair, data).items()}


FAMILIES = ("gfl", "fcos", "retinanet", "faster_rcnn")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [  # each family once as student and once as teacher of another one; the other pairs in `make test-exhaustive`
        pytest.param(a, b, marks=[] if FAMILIES[i - 1] == b else pytest.mark.exhaustive)
        for i, a in enumerate(FAMILIES)
        for b in FAMILIES
    ],
)
def test_features_teach_across_families(student: str, teacher: str) -> None:
    learner = model(student)
    methods = {name: {} for name in ("fgd", "pkd", "cwd", "mgd")} | {"uet": {"of": ("fgd", "pkd")}}
    found = terms(methods, learner, model(teacher, 1, neck_channels=64))
    assert len(found) == 7 and all(value.isfinite() for value in found.values())
    assert found["fgd_rela"] > 0 and found["pkd"] > 0
    sum(found.values()).backward()
    assert next(learner.parameters()).grad is not None


@pytest.mark.parametrize(
    ("student", "teacher"), [("fcos", "gfl"), ("gfl", "fcos"), ("fcos", "fcos"), ("retinanet",) * 2]
)
def test_dense_methods_teach_where_places_agree(student: str, teacher: str) -> None:
    learner = model(student)
    methods: dict[str, Any] = {name: {} for name in ("bckd", "dkd", "gi")} | {"cwd": {"on": "logits"}}
    methods |= {"uet": {"of": "bckd", "certainty": True}} | ({} if student == "retinanet" else {"tid": {}})
    found = terms(methods, learner, model(teacher, 1))
    assert {"bckd_cls", "bckd_loc", "dkd_target", "gi", "cwd"} <= found.keys()
    assert all(value.isfinite() for value in found.values()) and found["bckd_cls"] > 0 and found["bckd_loc"] > 0
    sum(found.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


@pytest.mark.parametrize("family", ["fcos", "retinanet"])
def test_bckd_is_its_formula_on_any_head(family: str) -> None:
    """Reference by rows of (image, location) instead of maps; in RetinaNet anchors between its thresholds do not
    count."""
    data = batch()
    student, teacher = outputs(model(family), data), outputs(model(family, 1), data, teacher=True)
    found = build(BCKD)(student, teacher, data)
    targets = student.targets
    assert targets is not None
    s, t = student.prediction, teacher.prediction
    p_s, p_t = (torch.cat([x.class_logits(level) for level in range(5)], 2).sigmoid() for x in (s, t))  # [B, K, A]
    gate = torch.cat([torch.full((n,), float(p > 0)) for n, p in zip(s.counts, targets.level_positives, strict=True)])
    v = targets.assignment.valid.float() * gate
    bce = -(p_t * p_s.log() + (1 - p_t) * (1 - p_s).log())
    expected = ((bce * (p_t - p_s).abs()).sum(1) * v).sum() / targets.avg_factor
    torch.testing.assert_close(found["bckd_cls"], expected, rtol=1e-4, atol=1e-6)
    boxes = [x.detector.decode_boxes(x.prediction) for x in (student, teacher)]
    rows = giou_loss(*boxes) * (p_t - p_s).abs().amax(1)
    torch.testing.assert_close(found["bckd_loc"], 4 * (rows * v).sum() / targets.avg_factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "student", "teacher", "message"),
    [
        ({"ld": {}}, "fcos", "gfl", "methods.ld needs box distributions of the student, which fcos cannot give"),
        ({"crosskd": {}}, "retinanet", "retinanet", "methods.crosskd needs box distributions of the teacher"),
        ({"bckd": {}}, "retinanet", "gfl", r"the student \(retinanet\) has 9 anchors .* the teacher \(gfl\) one at a"),
        ({"gi": {}}, "faster_rcnn", "gfl", "methods.gi needs scores and boxes at every location of the student"),
        ({"bckd": {}}, "gfl", "faster_rcnn", "methods.bckd needs dense of the teacher"),
        ({"tid": {}}, "retinanet", "retinanet", "methods.tid weighs locations by their one prediction"),
    ],
)
def test_what_makes_no_sense_is_one_line(methods: Any, student: str, teacher: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_methods(Methods.model_validate(methods), model(student), model(teacher))


def test_anchors_of_other_sizes_are_other_places() -> None:
    with pytest.raises(UserError, match="location by location"):
        terms({"bckd": {}}, model("retinanet"), model("retinanet", anchor_scale=4.0))


def test_levels_are_matched_by_stride() -> None:
    assert match_levels((8, 16, 32, 64, 128), (8, 16, 32, 64, 128)) == [(i, i) for i in range(5)]
    assert match_levels((4, 8, 16, 32), (8, 16, 32, 64, 128)) == [(1, 0), (2, 1), (3, 2)]
    assert match_levels((8, 16, 32), (7, 14, 28)) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(UserError, match="2 levels of about the same stride"):
        match_levels((8, 16), (16, 32))
    assert describe((8, 16), (8, 16)) is None
    note = describe((8, 16, 32), (4, 9, 16))
    assert note is not None and "8 resized to 9, 16" in note and "student's of stride 32" in note
    assert "teacher's of stride 4 " in note


def test_maps_of_other_strides_are_resized_to_the_teachers_grid() -> None:
    """A student whose maps are linear ramps: on the teacher's grid they are the same ramps."""
    from compress.distill.level_matching import LevelMatched
    from compress.distill.method import Method

    seen: list[Outputs] = []

    class Look(Method):
        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
            seen.extend((student, teacher))
            return {}

    ramp = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(1, 2, 8, 16)
    student = Outputs([ramp, ramp[..., ::2]], DensePrediction([], [], (8, 16)), model("gfl"))
    grids = [torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 7, 14), torch.zeros(1, 2, 8, 8)]
    weights = [torch.full((1, *x.shape[2:]), float(i)) for i, x in enumerate(grids)]
    teacher = Outputs(grids, DensePrediction([], [], (32, 9, 16)), model("gfl"), certainty=weights)
    LevelMatched(Look(), [(0, 1), (1, 2)])(student, teacher, batch())
    assert [x.shape for x in seen[0].features] == [x.shape for x in seen[1].features]
    assert seen[0].features[1] is student.features[1]
    assert seen[0].features[0][0, 0, 0].diff().min() > 0
    assert seen[1].certainty is not None and [float(x.mean()) for x in seen[1].certainty] == [1.0, 2.0]


@pytest.mark.parametrize("family", ["fcos", "retinanet", "faster_rcnn"])
def test_checkpoints_hold_what_they_need(family: str, tmp_path: Path) -> None:
    from compress.detectors.checkpoints import ModelRecord, save_detector

    saved = model(family).eval()
    record = ModelRecord.model_validate(
        {"detector": family, "backbone": "nano", "num_classes": K, "neck_channels": 32, "head_depth": 1}
        | SMALL.get(family, {})
    )
    save_detector(tmp_path / "x.safetensors", saved, metadata=record)
    loaded, again = load_detector(tmp_path / "x.safetensors")
    assert again == record and loaded.family == family
    data = batch()
    for ours, theirs in zip(*(d.decode(d(data.images), data.sizes) for d in (saved, loaded)), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)


def settings_of(family: str) -> list[str]:
    text = "".join(f", {key}: {value}" for key, value in ({"head_depth": 1} | SMALL.get(family, {})).items())
    one = f"{{detector: {family}, backbone: nano, weights: none, neck_channels: 32{text}}}"
    methods = "methods={fgd: {weight: 1e-3}, uet: {of: fgd}}"
    return [f"student={one}", f"teacher.model={one}", methods, "teacher.inherit=true", "baseline=true"]


@pytest.mark.parametrize(
    ("family", "teacher", "precisions"),
    [
        ("fcos", "faster_rcnn", ["fp32"]),
        pytest.param("retinanet", "retinanet", ["fp32"], marks=pytest.mark.exhaustive),
        pytest.param("fcos", "fcos", ["fp32", "fp16"], marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_of_another_family_ends_in_a_proven_file(
    family: str, teacher: str, precisions: list[str], tmp_path: Path
) -> None:
    taught = [settings_of(family)[0], *settings_of(teacher)[1:3]]
    run_dir = pipeline.run(tiny_recipe.recipe(tmp_path, *taught, f"deploy.precisions={precisions}"))
    report = json.loads((run_dir / "report.json").read_text())
    files = {row["file"]: row for row in report["artifacts"]}
    assert files["student.onnx"]["gate"] == "pass"
    assert ("student.fp16.onnx" in files) == ("fp16" in precisions)
    assert files["student.onnx"]["map"] == pytest.approx(files["student.safetensors"]["map"], abs=0.1)
    assert load_detector(run_dir / "student.safetensors")[1].model.detector == family


def test_a_run_of_faster_rcnn_trains_and_says_that_it_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.export.onnx import torch_runner

    recipe = tiny_recipe.recipe(tmp_path, *settings_of("faster_rcnn"))
    options = [word for setting in settings_of("faster_rcnn") for word in ("--set", setting)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(tmp_path / "tiny.yaml"), *options])
    captured, run_dir = capsys.readouterr(), recipe.run_dir
    assert stop.value.code == 0 and captured.err == ""
    assert "not exported" in captured.out and "next:" not in captured.out
    assert (run_dir / "student.safetensors").is_file() and not (run_dir / "student.onnx").exists()
    with pytest.raises(UserError, match="faster_rcnn cannot be exported"):
        torch_runner(str(run_dir / "student.safetensors"), recipe.deploy, (64, 64))
    stages = json.loads((run_dir / "manifest.json").read_text())["stages"]
    assert {"teacher", "baseline", "student"} <= stages.keys()


def test_a_dry_run_names_the_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.distill(tiny_recipe.recipe(tmp_path, settings_of("fcos")[0]), dry_run=True, distillation=False)
    assert "student: fcos nano, " in capsys.readouterr().out


def test_training_goes_on_exactly(tmp_path: Path) -> None:
    """Faster R-CNN draws samples: also those are the same after a resume."""
    whole = tiny_recipe.recipe(tmp_path / "a", *settings_of("faster_rcnn"), "baseline=false")
    weights = []
    for folder, stops in (("a", [None]), ("b", [3, None])):
        recipe = tiny_recipe.recipe(tmp_path / folder, *settings_of("faster_rcnn"), "baseline=false")
        fabric = launch(recipe.train, unused_parameters=recipe.methods.end_early)
        data = open_data(plans.data_plan(recipe), fabric)
        for stop in stops:
            train(fabric, plans.student_plan(recipe), data, resume=True, max_steps=stop)
        weights.append(load_detector(recipe.run_dir / "student.safetensors")[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    assert whole.student.detector == "faster_rcnn" and isinstance(model("fcos"), nn.Module)
