"""VFM alignment against NumPy in float64 and transformers' own forward pass; trainings without a teacher."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.data.batch import Batch
from compress.detectors.base import Detector, freeze
from compress.detectors.build import build_detector
from compress.detectors.transformers.real_time_detr import DFine
from compress.detectors.weights import state_sha256
from compress.distill.build import build_methods
from compress.distill.method import Method
from compress.distill.vfm import VFM, covered, misalignment
from compress.distill.vision_model import VisionModel, load_vision_model
from compress.distill.weighting import TrainingPosition
from compress.run import pipeline, plans
from compress.run.data import open_data
from compress.run.trainings import Distillation, train
from compress.training.learner import Learner
from deploy.core.errors import UserError
from tests.helpers import pyramid_maps, tiny_detr, tiny_recipe, tiny_vision
from tests.helpers.teacher_passes import Passes
from tests.helpers.training_runs import assert_same, fabric, last_checkpoint
from tests.oracles import sine

SIZES = [(64, 96), (33, 64), (10, 10)]
GRID, STRIDE = (2, 3), 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("vision")
    return {kind: tiny_vision.saved(place / kind, kind) for kind in tiny_vision.KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, VisionModel]:
    return {kind: load_vision_model("model", str(folder)) for kind, folder in folders.items()}


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def settings(folder: Path, **changes: Any) -> Methods:
    return Methods.model_validate({"vfm": {"model": str(folder), **changes}})


# ------------------------------------------------------------------------------------------------ the loss


def test_loss_is_the_definition_in_float64() -> None:
    s, t = sine((3, 6, 4), 1.0, 0.7, 0.1), sine((3, 6, 4), 1.4, 0.6, 0.9, 0.3)
    images = []
    for b, (height, width) in enumerate(SIZES):
        values = []
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                if y * STRIDE < height and x * STRIDE < width:
                    a, c = s[b, y * GRID[1] + x].numpy(), t[b, y * GRID[1] + x].numpy()
                    values.append(1 - a @ c / np.sqrt((a @ a) * (c @ c)))
        images.append(np.mean(values))
    assert [round(sum(covered([size], GRID, STRIDE, s.device)[0].tolist())) for size in SIZES] == [6, 4, 1]
    valid = covered(SIZES, GRID, STRIDE, s.device)
    assert misalignment(s, t, valid).item() == pytest.approx(np.mean(images), rel=1e-12)
    shares = [misalignment(s[i : i + 1], t[i : i + 1], valid[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.stack(shares).mean(), misalignment(s, t, valid))  # as of three processes
    assert torch.autograd.gradcheck(lambda x: misalignment(x, t, valid), s.clone().requires_grad_())
    torch.testing.assert_close(misalignment(3 * t, t, valid), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(misalignment(-t, t, valid), torch.full((), 2.0, dtype=torch.float64))


def test_forward_projects_one_map_and_counts_the_published_constant(models: dict[str, VisionModel]) -> None:
    method = VFM(4, models["dinov2"], level=1, stride=STRIDE, weight=0.5)
    maps = [torch.randn(3, 4, 8, 12), torch.randn(3, 4, *GRID, requires_grad=True)]
    batch = pyramid_maps.batch([[]] * 3, SIZES, padded=(64, 96))
    batch = replace(batch, images=pictures(3, 3, 64, 96))
    (value,) = method(pyramid_maps.outputs(maps), None, batch).values()
    weight, bias = (x.detach().double() for x in (method.projection.weight, method.projection.bias))
    projected = torch.einsum("bcyx,dc->byxd", maps[1].detach().double(), weight) + bias
    tokens = method.tokens(batch.images, GRID).double()
    expected = misalignment(projected.flatten(1, 2), tokens, covered(SIZES, GRID, STRIDE, tokens.device))
    assert value.dtype == torch.float32 and not tokens.requires_grad
    torch.testing.assert_close(value.double(), 5.0 * 0.5 * expected, rtol=1e-5, atol=0)
    value.backward()
    assert maps[1].grad is not None and maps[1].grad.any() and all(p.grad is not None for p in method.parameters())
    half = [x.detach().bfloat16() for x in maps]
    low = method(pyramid_maps.outputs(half), None, batch)["vfm"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, value.detach(), rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("kind", tiny_vision.KINDS)
def test_tokens_are_the_patches_of_the_library(
    kind: str, folders: dict[str, Path], models: dict[str, VisionModel]
) -> None:
    import transformers

    model, images, grid = models[kind], pictures(2, 3, 64, 96), (4, 6)
    assert model.width == tiny_vision.WIDTH and not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    network = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    size = [side * model.patch for side in grid]
    pixels = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        hidden = network(pixel_values=(pixels - mean) / std, **more).last_hidden_state
    if kind != "convnext":
        assert hidden.shape[1] == tiny_vision.PREFIX[kind] + 24
        hidden = hidden[:, tiny_vision.PREFIX[kind] :].reshape(2, 4, 6, tiny_vision.WIDTH).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.tokens(images, grid), hidden)


@pytest.mark.parametrize(("patch", "tokens_per_side"), [(16, 2), (14, 2), (8, 2), (32, 1), (14, 1)])
def test_a_place_of_the_image_moves_the_tokens_of_its_location(
    tmp_path: Path, patch: int, tokens_per_side: int
) -> None:
    """In a model without layers, whose tokens know their own patch alone."""
    folder = tiny_vision.saved(tmp_path / "flat", patch_size=patch, image_size=4 * patch, num_hidden_layers=0)
    model = load_vision_model("model", str(folder))
    method = VFM(4, model, level=0, stride=STRIDE, tokens_per_side=tokens_per_side)
    seen: list[tuple[int, ...]] = []
    model.network.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["pixel_values"].shape), with_kwargs=True
    )
    images = pictures(1, 3, 96, 128)
    changed = images.clone()
    changed[:, :, 32:64, 64:96] = 255 - changed[:, :, 32:64, 64:96]
    difference = (method.tokens(images, (3, 4)) - method.tokens(changed, (3, 4))).abs().sum(-1).view(3, 4)
    assert seen[0] == (1, 3, 3 * tokens_per_side * patch, 4 * tokens_per_side * patch)
    assert difference.argmax() == 1 * 4 + 2
    others = difference.flatten()[torch.arange(12) != 6]
    scaled = patch * tokens_per_side != STRIDE  # then the filter reaches a little beyond
    assert others.max() <= (0.5 * difference.max() if scaled else 0)


def test_pictures_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    folder = tiny_vision.saved(tmp_path / "m")
    said = {"image_mean": [0.5, 0.25, 0], "image_std": [0.5, 1, 0.25], "rescale_factor": 1 / 255, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    model = load_vision_model("model", str(folder))
    assert model.mean == pytest.approx((127.5, 63.75, 0)) and model.std == pytest.approx((127.5, 255, 63.75))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    model = load_vision_model("model", str(folder))
    assert model.mean == (0, 0, 0) and model.std == pytest.approx((255,) * 3)


# ------------------------------------------------------------------------------------------------ students


@pytest.mark.parametrize("family", ["fcos", "retinanet", "faster_rcnn", "d_fine"])
def test_every_student_learns_without_a_teacher(family: str, folders: dict[str, Path]) -> None:
    student: Detector
    if family == "d_fine":
        student = tiny_detr.tiny(DFine)
    else:
        student = build_detector(Model(detector=family, backbone="nano", weights="none", neck_channels=32), 5, 0)
    methods = build_methods(settings(folders["dinov3"], weight="auto"), student.train(), None)
    learner = Learner(student, methods, None, None)
    losses = learner(tiny_detr.batch(), TrainingPosition(0, 10, 5))
    assert float(methods["vfm"].scale) > 0 and losses["vfm"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in methods["vfm"].parameters())
    kept = {*learner.state_dict()}
    assert {key for key in kept if key.startswith("methods.vfm.method")} == {
        f"methods.vfm.method.projection.{part}" for part in ("weight", "bias")
    }


def test_a_teacher_beside_it_runs_for_others_alone(folders: dict[str, Path]) -> None:
    student, teacher = (build_detector(tiny_model(), 5, seed) for seed in (0, 1))
    freeze(teacher)
    for more, passes_of_teacher in (({}, 0), ({"pkd": {}}, 1), ({"pkd": {"stop_epoch": 1}}, 0)):
        wanted = Methods.model_validate({"vfm": {"model": str(folders["dinov2"])}, **more})
        learner = Learner(student.train(), build_methods(wanted, student, teacher), teacher, None)
        with Passes(teacher) as passes:
            losses = learner(tiny_detr.batch(), TrainingPosition(7, 20, 5))
        assert (passes.features, passes.head) == (passes_of_teacher, 0) and losses["vfm"] > 0


def tiny_model() -> Model:
    return Model(backbone="nano", weights="none", neck_channels=32, head_depth=0)


class Alone(Method):
    """A user's own method that needs no teacher."""

    needs_teacher = False

    def forward(self, student: Any, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        assert teacher is None
        return {"alone": student.features[0].square().mean()}


def test_a_method_of_ones_own_may_need_no_teacher() -> None:
    student = build_detector(tiny_model(), 5, 0).train()
    learner = Learner(student, build_methods(Methods(), student, None, own={"mine": Alone()}), None, None)
    assert learner(tiny_detr.batch(), TrainingPosition(0, 10, 5))["alone"] > 0
    with pytest.raises(UserError, match=r"^methods.bckd: needs a teacher; add the section teacher, or give one$"):
        build_methods(Methods.model_validate({"bckd": {}}), student, None)


# ----------------------------------------------------------------------------------------------- trainings


def recipe(runs: Path, folder: Path, *more: str, vfm: str = "") -> Recipe:
    return tiny_recipe.recipe(runs, "teacher=null", f"methods={{vfm: {{model: '{folder}'{vfm}}}}}", *more)


def test_a_run_without_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_vision.saved(tmp_path / "m")
    before = state_sha256(load_vision_model("model", str(folder)).network)
    first = recipe(tmp_path, folder, "baseline=true")
    run = pipeline.distill(first)
    with open(run / "student" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert all(float(row["vfm"]) > 0 and float(row["grad_vfm"]) > 0 for row in rows)
    assert not (run / "teacher.safetensors").exists()
    assert {*last_checkpoint(first)["modules"]["methods"]} == {
        "vfm.norm", "vfm.scale", "vfm.method.projection.weight", "vfm.method.projection.bias",
    }  # fmt: skip
    assert len({*load_file(run / "student.safetensors")} ^ {*load_file(run / "baseline.safetensors")}) == 0
    assert state_sha256(load_vision_model("model", str(folder)).network) == before

    capsys.readouterr()
    pipeline.distill(first, resume=True)
    assert "nothing was repeated" in capsys.readouterr().out
    tiny_vision.saved(folder, seed=1)
    pipeline.distill(first, resume=True)
    again = capsys.readouterr().out
    assert "student: step 6/6" in again and "baseline: step" not in again, "another model is another training"

    pipeline.distill(recipe(tmp_path / "zero", folder, "baseline=true", vfm=", weight: 0"))
    plain, taught = (load_file(tmp_path / "zero/runs/tiny" / f"{x}.safetensors") for x in ("baseline", "student"))
    assert all(torch.equal(value, taught[key]) for key, value in plain.items()), "weight 0 is plain training"
    assert any(not torch.equal(value, plain[key]) for key, value in load_file(run / "student.safetensors").items())
    pipeline.distill(recipe(tmp_path / "alone", folder), distillation=False)
    alone = load_file(tmp_path / "alone/runs/tiny/student.safetensors")
    assert all(torch.equal(value, plain[key]) for key, value in alone.items()), "compress train learns from labels"


def test_stop_and_resume_are_exact(tmp_path: Path) -> None:
    folder = tiny_vision.saved(tmp_path / "m")
    for name, stops in (("whole", (6,)), ("parts", (3, 6))):
        here = recipe(tmp_path / name, folder, vfm=", weight: auto")
        data = open_data(plans.data_plan(here), fabric())
        plan = replace(plans.student_plan(here), distillation=Distillation(here.methods))
        for stop in stops:
            torch.manual_seed(stop)
            train(fabric(), plan, data, resume=True, max_steps=stop)
    whole, parts = (last_checkpoint(recipe(tmp_path / name, folder)) for name in ("whole", "parts"))
    for kind in ("student", "methods"):
        assert_same(whole["modules"][kind], parts["modules"][kind])


# --------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_work_is_one_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    detector = tmp_path / "detector"
    tiny_detr.library_model(tiny_detr.tiny(DFine)).save_pretrained(detector)
    student = build_detector(tiny_model(), 5, 0)
    bare = tiny_vision.saved(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    random = tiny_vision.saved(tmp_path / "fit", num_hidden_layers=2)
    (random / "config.json").write_text(
        (random / "config.json").read_text().replace('hidden_layers": 2', 'hidden_layers": 3')
    )
    for wanted, problem in (
        (settings(tmp_path / "none"), f"methods.vfm.model: {tmp_path}/none: no such folder, and no name of the Hub"),
        (settings(bare / "config.json"), "is a file; give the folder that save_pretrained wrote"),
        (settings(bare), f"methods.vfm.model: {bare}: transformers cannot load it: "),
        (settings(random), "its weights do not fit its configuration: the first that is missing is encoder.layer.2."),
        (settings(detector), "is a d_fine, not a vision model with square patches; take one as DINOv2, DINOv3 or ViT"),
        (
            settings(folders["dinov2"], stride=48),
            "methods.vfm.stride: the student (gfl) has maps of stride 8, 16, 32, 64, 128, not 48",
        ),
    ):
        with pytest.raises(UserError) as caught:
            build_methods(wanted, student, None)
        assert problem in str(caught.value) and "\n" not in str(caught.value)
    for methods, problem in (
        ("{vfm: {model: a/b}, uet: {of: vfm}}", "methods.uet.of: vfm learns from no teacher, whose maps uet samples"),
        ("{vfm: {}}", "methods.vfm.model: missing"),
        ("{vfm: {model: a/b}, pkd: {}}", "methods.pkd: needs a teacher; add the section teacher"),
    ):
        with pytest.raises(UserError) as caught:
            tiny_recipe.recipe(tmp_path, "teacher=null", f"methods={methods}")
        assert problem in str(caught.value) and "\n" not in str(caught.value)
