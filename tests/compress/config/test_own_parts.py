"""Detectors, backbones, methods, teachers and runners of the user's in a recipe, by import path."""

from __future__ import annotations

import re

import pytest

from compress.config.deploy import Engines
from compress.config.methods import Methods
from compress.config.recipe import dump_recipe, recipe_sha256
from tests.helpers.recipes import Load, problems

OWN = """\
name: own
data: {synthetic: {train: 8, val: 4, size: 64}, short: 64}
student:
  detector: mypkg.models:MyDetector
  options: {width: 32, heads: [1, 2]}
teacher:
  custom: {factory: "mypkg.teachers:MyTeacher", options: {threshold: 0.5}}
methods:
  bckd: {}
  mypkg.losses:MyLoss: {weight: auto, ratio: 0.5, stop_epoch: 2, decay: linear, options: {margin: 2}}
  mypkg.losses:Other: {}
train: {epochs: 3}
deploy:
  precisions: [fp32, fp16]
  engines: {batch: [1, 2, 4], precisions: [fp16]}
  runners: [mypkg.runners:MyRunner]
"""


def test_own_parts(load: Load) -> None:
    recipe = load(OWN, "methods.mypkg.losses:MyLoss.options.margin=3", "student.backbone=mypkg.models:backbone")
    assert (recipe.student.detector, recipe.student.options) == (
        "mypkg.models:MyDetector",
        {"width": 32, "heads": [1, 2]},
    )
    assert (recipe.student.backbone, recipe.student.frozen_stages) == ("mypkg.models:backbone", -1)
    assert list(recipe.methods.enabled()) == ["bckd", "mypkg.losses:MyLoss", "mypkg.losses:Other"]
    mine = recipe.methods.own["mypkg.losses:MyLoss"]
    assert (mine.weight, mine.ratio, mine.stop_epoch, mine.decay) == ("auto", 0.5, 2, "linear")
    assert mine.options == {"margin": 3} and recipe.methods.own["mypkg.losses:Other"].options is None
    assert recipe.teacher is not None and recipe.teacher.given == ("custom",)
    assert recipe.deploy.runners == ("mypkg.runners:MyRunner",)
    assert recipe.deploy.engines is not None and recipe.deploy.engines.batch == (1, 2, 4)
    assert load(dump_recipe(recipe)) == recipe
    assert recipe_sha256(load(OWN)) != recipe_sha256(recipe)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "mypkg.models:MyDetector\n  options: {width: 32, heads: [1, 2]}",
            "gfll\n  backbone: nano",
            "r.yaml:4: student.detector: 'gfll' is not one of gfl, fcos, retinanet, faster_rcnn, d_fine, "
            "rt_detr_v2, rf_detr, lw_detr; did you mean gfl?",
        ),
        (
            "mypkg.models:MyDetector",
            "yolo",
            "r.yaml:4: student.detector: 'yolo' is not one of gfl, fcos, retinanet, faster_rcnn, d_fine, "
            "rt_detr_v2, rf_detr, lw_detr, and no import path "
            "(package.module:Name)",
        ),
        (
            "mypkg.models:MyDetector",
            "mypkg/models.py:MyDetector",
            "r.yaml:4: student.detector: 'mypkg/models.py:MyDetector' is not an import path; write package.module:Name",
        ),
        (
            "mypkg.models:MyDetector\n",
            "gfl\n  backbone: nano\n",
            "r.yaml:6: student.options: is for a detector of your own; gfl has settings by name",
        ),
        (
            "mypkg.models:MyDetector\n  options: {width: 32, heads: [1, 2]}",
            "gfl",
            "r.yaml:3: student.backbone: missing",
        ),
        (
            "  options: {width",
            "  neck_channels: 64\n  options: {width",
            "r.yaml:5: student.neck_channels: is for the built-in detectors; give it to your own under options",
        ),
        (
            "  options: {width",
            "  weights: imagenet\n  options: {width",
            "r.yaml:5: student.weights: a detector without "
            "backbone has none here; use none, and load them in your class",
        ),
        (
            "  options: {width",
            "  backbone: nano\n  backbone_options: {}\n  options: {width",
            "r.yaml:6: student.backbone_options: is for a backbone of your own, and backbone names none",
        ),
        ('factory: "mypkg.teachers:MyTeacher", ', "", "r.yaml:7: teacher.custom.factory: missing"),
        (
            '{factory: "mypkg.teachers:MyTeacher"',
            "{factory: MyTeacher",
            "r.yaml:7: teacher.custom.factory: 'MyTeacher' is not an import path; write package.module:Name",
        ),
        ("  bckd: {}", "  bkcd: {cls_weight: 2}", "r.yaml:9: methods.bkcd: unknown key; did you mean bckd?"),
        (
            "  bckd: {}",
            "  my-loss: {}",
            f"r.yaml:9: methods.my-loss: unknown key; known here: {', '.join(Methods.model_fields)}",
        ),
        ("{margin: 2}", "2", "r.yaml:10: methods.mypkg.losses:MyLoss.options: needs a section of keys, got 2"),
        (
            "Other: {}",
            "Other: {wieght: 2}",
            "r.yaml:11: methods.mypkg.losses:Other.wieght: unknown key; did you mean weight?",
        ),
        (
            "Other: {}",
            "Other: {ratio: 2}",
            "r.yaml:11: methods.mypkg.losses:Other.ratio: only applies with weight: auto",
        ),
        (
            "[1, 2, 4]",
            "[1, 4, 2]",
            "r.yaml:15: deploy.engines.batch: [1, 4, 2] does not increase; write [smallest, best, largest]",
        ),
        (
            "precisions: [fp16]}",
            "precisions: [int8]}",
            "r.yaml:15: deploy.engines.precisions: int8 is not in deploy.precisions; add it there",
        ),
        (
            "[mypkg.runners:MyRunner]",
            "[MyRunner]",
            "r.yaml:16: deploy.runners.0: 'MyRunner' is not an import path; write package.module:Name",
        ),
        ("[mypkg.runners:MyRunner]", "[]", "r.yaml:16: deploy.runners: needs at least 1 items, got []"),
    ],
)
def test_one_problem_of_an_own_part_is_one_line(load: Load, old: str, new: str, line: str) -> None:
    assert old in OWN
    assert problems(load, OWN.replace(old, new, 1)) == [line]


def test_bf16_needs_a_provider_that_computes_it(load: Load) -> None:
    assert OWN.count("precisions: [fp32, fp16]") == 1
    text = OWN.replace("precisions: [fp32, fp16]", "precisions: [fp32, fp16, bf16]")
    (line,) = problems(load, text)
    assert line.endswith("bf16 runs on openvino, openvino-gpu, openvino-npu; add one to deploy.providers")
    assert load(text.replace("bf16]", "bf16]\n  providers: [cpu, openvino]")).deploy.providers == ("cpu", "openvino")


def test_methods_of_your_own_need_a_teacher(load: Load) -> None:
    text = OWN.replace("  bckd: {}\n", "").replace("teacher:\n  custom:", "# ")
    assert problems(load, text) == ["r.yaml:8: methods.mypkg.losses:MyLoss: needs a teacher; add the section teacher"]


def test_engines_have_the_options_of_the_builder() -> None:
    from deploy.tensorrt.card import EngineOptions

    assert Engines().engine_options() == EngineOptions()
    assert {*Engines.model_fields} - {"precisions", "batch"} == {*EngineOptions.model_fields} - {"batches", "strip"}


def test_later_keys_are_in_no_dump_unless_given(load: Load) -> None:
    plain = dump_recipe(load())
    assert not {"options", "backbone_options", "custom", "engines", "runners"} & set(re.findall(r"(\w+):", plain))
