"""Weights over training: schedules, automatic balance, what reaches the logs; and building from a recipe."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.config.messages import models_in
from compress.config.methods import Methods
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.data.batch import Batch
from compress.detectors.base import Detector, freeze
from compress.detectors.build import build_detector, inherit
from compress.detectors.checkpoints import load_teacher_checkpoint
from compress.distill.build import METHODS, build_methods
from compress.distill.method import Method, Outputs
from compress.distill.uet import UET
from compress.distill.weighting import TrainingPosition, WeightedMethod, gradient_norm
from compress.run import pipeline, plans
from compress.run.data import open_data
from compress.run.trainings import train
from deploy.core.errors import UserError
from tests.helpers import tiny_detr, tiny_recipe, tiny_vision
from tests.helpers.training_runs import assert_same, fabric, last_checkpoint

ON_QUERIES = ("kd_detr", "ddf")
DENSE = [name for name, record in METHODS.items() if record.needs_teacher and name not in ON_QUERIES]
"""The methods that two GFLs serve."""


class Nothing(Method):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}


def test_schedules() -> None:
    at = [TrainingPosition(step, 100, 10) for step in (0, 30, 49, 50, 99)]
    assert [WeightedMethod(Nothing()).factor(p) for p in at] == [1, 1, 1, 1, 1]
    assert [WeightedMethod(Nothing(), stop_epoch=5).factor(p) for p in at] == [1, 1, 1, 0, 0]
    falling = WeightedMethod(Nothing(), decay=True)
    assert [falling.factor(p) for p in at] == pytest.approx([1, 0.7, 0.51, 0.5, 0.01])
    both = WeightedMethod(Nothing(), stop_epoch=5, decay=True)
    assert [both.factor(p) for p in at] == pytest.approx([1, 0.4, 0.02, 0, 0])


def test_automatic_weight_meets_the_ratio() -> None:
    weighted = WeightedMethod(Nothing(), auto_ratio=0.5)
    assert weighted.scale == 0, "nothing may be learned before it is measured"
    for _ in range(3):
        weighted.measure(torch.tensor(8.0), torch.tensor(4.0))
    assert weighted.scale.item() == pytest.approx(0.25)
    assert weighted.norm.item() == pytest.approx(2.0)  # 0.5 * 4
    weighted.measure(torch.tensor(80.0), torch.tensor(4.0))  # one batch of ten times the norm
    assert weighted.scale.item() == pytest.approx(0.25 * 10**-0.1)
    for norm in (0.0, float("nan"), float("inf")):  # a batch in which the method has nothing to say, or overflows
        before = weighted.scale.clone()
        weighted.measure(torch.tensor(norm), torch.tensor(4.0))
        assert weighted.scale == before


def test_a_fixed_weight_is_only_observed() -> None:
    weighted = WeightedMethod(Nothing())
    weighted.measure(torch.tensor(8.0), torch.tensor(4.0))
    assert weighted.scale == 1 and weighted.norm == 8


def test_gradient_norm() -> None:
    maps = [torch.tensor([3.0, 0.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)]
    loss = maps[0].square().sum() / 2 + maps[1].square().sum() / 2
    assert gradient_norm(loss, maps, None) == 5
    assert gradient_norm(loss, maps, lambda x: 4 * x) == 10  # squares add up over processes
    assert gradient_norm(torch.zeros(()), maps, None) == 0
    other = torch.ones(1, requires_grad=True)
    assert gradient_norm((other * 2).sum(), maps, None) == 0
    half = [torch.full((2,), 0.5, dtype=torch.float16, requires_grad=True)]
    tiny_loss = (half[0].float() * 3e-9).sum()  # below the smallest number that float16 knows
    assert gradient_norm(tiny_loss, half, None).item() == pytest.approx(3e-9 * 2**0.5, rel=0.01)
    loss.backward()  # the graph is still there
    assert all(x.grad is not None for x in maps)


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "student" / "metrics.csv").open()))


COMPOSED = "methods={bckd: {}, fgd: {weight: auto, ratio: 0.5}, uet: {of: [fgd, bckd], certainty: true}}"


def test_composed_methods_train_and_log(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, COMPOSED, "train.steps=20", "teacher.inherit=true")
    run_dir = pipeline.distill(recipe)
    first, second, last = (r for r in rows(run_dir) if r["loss"])
    for row in (first, last):
        assert float(row["grad_detection"]) > 0 and float(row["grad_bckd"]) > 0
        assert float(row["fgd_fg"]) > 0 and float(row["variance_p3_fgd"]) > 0 and float(row["variance_p7_bckd"]) > 0
    assert float(first["grad_fgd"]) == pytest.approx(0.5 * float(first["grad_detection"]), rel=1e-4)
    assert float(first["scale_fgd"]) > 0
    assert first["step"] == "1" and second["step"] == "10"


def test_all_methods_together_in_mixed_precision(tmp_path: Path) -> None:
    names = DENSE
    methods = ", ".join(f"{name}: {{}}" for name in names)
    vision = tiny_vision.saved(tmp_path / "vision")
    recipe = tiny_recipe.recipe(
        tmp_path, f"methods={{{methods}, vfm: {{model: '{vision}'}}, uet: {{of: [{', '.join(names)}]}}}}",
        "train.precision=bf16", "teacher.train.precision=bf16", "train.steps=2", "train.schedule.warmup_steps=1",
        "student.head_depth=1",
    )  # fmt: skip
    logged = [r for r in rows(pipeline.distill(recipe)) if r["loss"]]
    assert all(float(logged[-1][f"grad_{name}"]) >= 0 for name in names) and float(logged[-1]["grad_vfm"]) > 0
    assert sum(float(logged[0][f"grad_{name}"]) > 0 for name in names) >= len(names) - 1, "DKD may have no positives"


def test_composed_methods_resume_exactly(tmp_path: Path) -> None:
    extra = (COMPOSED, "train.steps=10", "methods.fgd.stop_epoch=1", "methods.bckd.decay=linear")  # 6 steps an epoch
    whole = tiny_recipe.recipe(tmp_path / "a", *extra)
    pipeline.distill(whole)

    teacher = whole.run_dir / "teacher.safetensors"
    checkpoint = ("teacher.model=null", "teacher.train=null", f"teacher.checkpoint={teacher}")
    for recipe, stops in (
        (tiny_recipe.recipe(tmp_path / "c", *extra, *checkpoint), (10,)),
        (tiny_recipe.recipe(tmp_path / "d", *extra, *checkpoint), (5, 10)),
    ):
        for stop in stops:
            torch.manual_seed(stop)
            train_taught(recipe, stop)
    c, d = (tiny_recipe.recipe(tmp_path / x, *extra, *checkpoint) for x in "cd")
    assert_same(last_checkpoint(c), last_checkpoint(d))
    assert_same(*(load_file(r.run_dir / "student.safetensors") for r in (c, d)))
    assert_same(load_file(whole.run_dir / "student.safetensors"), load_file(c.run_dir / "student.safetensors"))


def train_taught(recipe: Recipe, stop: int) -> None:
    assert recipe.teacher is not None and recipe.teacher.checkpoint is not None
    data = open_data(plans.data_plan(recipe), fabric())
    teacher = freeze(load_teacher_checkpoint(recipe.teacher.checkpoint)[0])
    plan = replace(plans.student_plan(recipe), teacher=teacher, distillation=pipeline.distillation_plan(recipe))
    train(fabric(), plan, data, resume=True, max_steps=stop)


def test_after_its_last_epoch_a_method_is_gone_from_the_loss(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "methods.bckd.stop_epoch=1", "train.steps=20")  # 6 steps an epoch
    logged = [r for r in rows(pipeline.distill(recipe)) if r["loss"]]
    assert float(logged[0]["bckd_cls"]) > 0
    assert all(row["bckd_cls"] == "" for row in logged[1:])


def test_inherit_copies_neck_and_head_where_shapes_agree(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    assert recipe.teacher is not None and recipe.teacher.model is not None
    teacher = build_detector(recipe.teacher.model, 3, seed=1)
    student = build_detector(recipe.student, 3, seed=2)  # one convolution less in the towers
    before = {key: value.clone() for key, value in student.state_dict().items()}
    copied = inherit(student, teacher)
    assert "neck.fpn_convs.0.weight" in copied and "head.gfl_cls.weight" in copied
    assert not any(key.startswith("backbone") for key in copied)
    after, given = student.state_dict(), teacher.state_dict()
    for key, value in after.items():
        assert torch.equal(value, given[key] if key in copied else before[key])
    wide = build_detector(recipe.student.model_copy(update={"neck_channels": 64}), 3, seed=2)
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    assert inherit(wide, teacher) == [], "biases without their weights are worth nothing"
    assert_same(before, dict(wide.state_dict()))
    unequal = tiny_recipe.recipe(tmp_path, "teacher.inherit=true", "student.neck_channels=64")
    with pytest.raises(UserError, match=r"teacher.inherit: .*width 32.*width 64"):
        pipeline.distill(unequal)


def test_a_method_that_would_end_after_the_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"methods.bckd.stop_epoch 3 is after the end .*\(1.0 epochs\)"):
        pipeline.distill(tiny_recipe.recipe(tmp_path, "methods.bckd.stop_epoch=3"))


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ("{bckd: {ratio: 10}}", "methods.bckd.ratio: only applies with weight: auto"),
        ("{ld: {main: 0, vlr: 0, classification: 0}}", "are all 0; leave the method out"),
        ("{crosskd: {cls_weight: 0, reg_weight: 0}}", "all three weights are 0"),
        ("{fgd: {}, uet: {of: fgd, certainty: true, samples: 1}}", "needs samples that differ"),
        ("{fgd: {}, uet: {of: fgd, certainty: true, p_start: 0, p_step: 0}}", "needs samples that differ"),
        ("{fgd: {}, uet: {of: bckd}}", "bckd is not among the methods; add `bckd: {}`"),
        ("{fgd: {}, uet: {of: [fgd, fgd]}}", "names a method twice"),
        (
            "{fgd: {}, uet: {of: fdg}}",
            f"methods.uet.of: 'fdg' is not one of {', '.join(dict.fromkeys(('fgd', *METHODS)))}; did you mean fgd?",
        ),
        ("{fgd: {}, uet: {of: a:B}}", "methods.uet.of: a:B is not among the methods; add `a:B: {}`"),
        ("{tid: {thr_neg: 0.6}}", "methods.tid.thr_neg: 0.6 is more than thr_pos, 0.5"),
        ("{tid: {top_share: 0}}", "methods.tid.top_share: must be more than 0, got 0"),
        ("{cwd: {on: logits, adapter: always}}", "methods.cwd.adapter: logits are compared as they are"),
        ("{ld: {vlr_overlap: giou}}", "methods.ld.vlr_overlap: 'giou' is not one of iof, diou"),
        ("{ld: {normalise: batch}}", "methods.ld.normalise: 'batch' is not one of official, positives"),
        ("{a:fgd: {}}", "methods.a:fgd: another method is already called fgd; give the class another name"),
        ("{a:B: {}, c:B: {}}", "methods.c:B: another method is already called B; give the class another name"),
        ("{fgd: {}, uet: {of: fgd, samples: 30}}", "rates stay below 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, methods: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe.recipe(tmp_path, f"methods={methods}")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_every_method_builds_from_its_defaults_with_and_without_uet() -> None:
    names = DENSE
    settings = Methods.model_validate({name: {} for name in names} | {"uet": {"of": tuple(names)}})
    detectors = [build_detector(tiny_model(), 3, seed) for seed in (0, 1)]
    built = build_methods(settings, *detectors)
    assert list(built) == names
    assert all(isinstance(b.method, UET) for b in built.values())
    plain = build_methods(Methods.model_validate({name: {} for name in names}), *detectors)
    assert not any(isinstance(b.method, UET) for b in plain.values())
    again = build_methods(settings, *detectors)
    for a, b in zip(built.values(), again.values(), strict=True):
        assert_same(a.state_dict(), b.state_dict())


def test_the_table_of_methods_is_that_of_recipes() -> None:
    fields = {name: next(models_in(field.annotation)) for name, field in Methods.model_fields.items() if name != "uet"}
    assert {name: record.settings for name, record in METHODS.items()} == fields
    assert all(record.needs_teacher == record.settings.needs_teacher for record in METHODS.values())
    for name, record in METHODS.items():
        if not record.needs_teacher:  # it wants another model, and says in tests of its own what it needs
            continue
        detectors = [detr(seed) if name in ON_QUERIES else build_detector(tiny_model(), 3, seed) for seed in (0, 1)]
        for settings in [{}, {"on": "logits"}] if name == "cwd" else [{}]:
            term = record.settings.model_validate(settings)
            needs = record.needs(term) if callable(record.needs) else record.needs
            (built,) = build_methods(Methods.model_validate({name: settings}), *detectors).values()
            assert built.method.needs == needs


def test_compile_reaches_every_method_that_can() -> None:
    names = ("fgd", "tid", "bckd", "crosskd")
    detectors = [build_detector(tiny_model(), 3, seed) for seed in (0, 1)]
    settings = Methods.model_validate({name: {} for name in names} | {"uet": {"of": names}})
    for compiled in (False, True):
        for weighted in build_methods(settings, *detectors, compiled=compiled).values():
            assert isinstance(weighted.method, UET)
            assert weighted.method.compiled == weighted.method.host.compiled == compiled


def tiny_model() -> Model:
    return Model(backbone="nano", weights="none", neck_channels=32, head_depth=1)


def detr(seed: int) -> Detector:
    pytest.importorskip("transformers")
    from compress.detectors.transformers.real_time_detr import DFine

    return build_detector(Model(detector="d_fine", options=tiny_detr.OPTIONS[DFine]), 3, seed)


def test_a_method_that_its_models_cannot_serve_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "methods={crosskd: {}}", "student.neck_channels=64")
    with pytest.raises(UserError, match="crosskd"):
        pipeline.distill(recipe)
    assert not (recipe.run_dir / "teacher").exists(), "the teacher was trained first"

    class BoxesOnly:
        capabilities = frozenset()  # type: ignore[var-annotated]
        family = "boxes only"

    settings = Methods.model_validate({"bckd": {}})
    student = build_detector(tiny_model(), 3, 0)
    with pytest.raises(UserError, match=r"methods.bckd needs dense of the teacher, which boxes only cannot give"):
        build_methods(settings, student, BoxesOnly())  # type: ignore[arg-type]
